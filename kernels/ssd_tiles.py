"""What ssd's forward and backward share: chunks and their tiles, decays, and the states that pass from chunk to chunk.

A sequence, or each document of it, is cut into chunks of CHUNK steps, of which the last may be shorter; a chunk into
blocks of BLOCK_T. Three launches find the states before each chunk: steps, with running sums of their logarithms in the
chunk; what each chunk adds to the state; the carry from chunk to chunk. Documents of any length make no more than
B L / CHUNK + S chunks; the chunks beyond theirs have no steps. What belongs to chunk k and head h has the row k H + h.

The logarithm of a decay is a difference of two running sums, each a float32 and what rounding took from it: of sums of
thousands that may be a thousandth, and the difference is exact where decays are strong before and weak after.

Products follow the kind. "bf16": operands rounded to it. "tf32" for float16: it has the same ten bits, but the range of
float32, which states and scaled gradients need. For float32 "ieee", or "tf32" where PyTorch has been told so.

B sequences, L time, K chunks, H heads, P head size, N states, G groups of heads that share B and C, S documents.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import device
from .scan_math import decay_of, sigmoid, softplus


class Tile(NamedTuple):
    """chunk: steps of a chunk; block: steps of a tile; slab: rows or columns of a state in one product; warps of a
    program, and of one that holds more than a tile or two; stages of a loop's loads."""

    chunk: int
    block: int
    slab: int
    warps: int
    many_warps: int
    stages: int


# By architecture and kind of product, then by the larger of the padded P and N. A chunk of Q steps costs, per step and
# head, about 12 P N / Q bytes of states and Q (N + P) operations on pairs: at 4 TB/s and 350 TFLOP/s least together
# with Q = 210 for P = 64, N = 128, and with Q = 180 for P = N = 64.
_SM_80 = {
    "bf16": {64: Tile(128, 64, 64, 4, 8, 2), 128: Tile(256, 64, 64, 4, 8, 2), 256: Tile(256, 32, 64, 8, 8, 1)},
    "tf32": {64: Tile(128, 64, 64, 4, 8, 2), 128: Tile(128, 32, 32, 4, 8, 1), 256: Tile(128, 32, 32, 8, 8, 1)},
    "ieee": {64: Tile(128, 32, 32, 4, 4, 1), 128: Tile(128, 32, 32, 8, 8, 1), 256: Tile(128, 32, 16, 8, 8, 1)},
}
# Asynchronous products take 64 rows.
_SM_90 = {
    "bf16": _SM_80["bf16"] | {256: Tile(256, 64, 64, 8, 8, 1)},
    "tf32": _SM_80["tf32"] | {128: Tile(128, 64, 32, 8, 8, 1)},
    "ieee": _SM_80["ieee"],
}
_INTERPRETER = {kind: {256: Tile(64, 64, 256, 4, 4, 1)} for kind in _SM_80}
_TABLES = {"sm_90": _SM_90, "sm_80": _SM_80, "sm_86": _SM_80, device.INTERPRETER: _INTERPRETER}
TILES = {(arch, kind): sizes for arch, table in _TABLES.items() for kind, sizes in table.items()}

CARRIED = 1024  # elements of a state in one program of the carry
HEADS_OF_STEPS = 16

# Below it a decay is 0 in float32; sums stay finite.
LOWEST_LOG = tl.constexpr(-128.0)


@triton.jit
def chunk_of(chunks_ptr, k, length, CHUNK: tl.constexpr):
    """(sequence, first step, number of steps) of chunk k: from a table, or by arithmetic where sequences are alike."""
    if chunks_ptr is not None:
        row = chunks_ptr + k.to(tl.int64) * 3
        sequence = tl.load(row)
        first = tl.load(row + 1)
        count = tl.load(row + 2).to(tl.int32)
    else:
        of_sequence = tl.cdiv(length, CHUNK)
        sequence = (k // of_sequence).to(tl.int64)
        begin = (k % of_sequence) * CHUNK
        count = tl.minimum(length - begin, CHUNK)
        first = begin.to(tl.int64)
    return sequence, first, count


@triton.jit
def load_rows(
    ptr, start, count, stride, SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr = 0
):
    """Rows start .. start + BLOCK_T - 1, columns FIRST .. FIRST + BLOCK - 1; zeros from row count, column SIZE on."""
    i = start + tl.arange(0, BLOCK_T)[:, None]
    j = FIRST + tl.arange(0, BLOCK)[None, :]
    mask = i < count
    if FIRST + BLOCK > SIZE:
        mask = mask & (j < SIZE)
    return tl.load(ptr + (i.to(tl.int64) * stride + j), mask=mask, other=0.0)


@triton.jit
def operand(t, KIND: tl.constexpr):
    """t as the tensor cores take it. They would cut a float32 off after ten bits: it is rounded to nearest before."""
    if KIND == "bf16":
        result = t.to(tl.bfloat16)
    else:
        result = t.to(tl.float32)
        if KIND == "tf32" and t.dtype == tl.float32:
            bits = result.to(tl.int32, bitcast=True)
            nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            result = tl.where(result == result, nearest, result)
    return result


@triton.jit
def product(a, b, acc, KIND: tl.constexpr):
    """acc + a b"""
    PRECISION: tl.constexpr = "tf32" if KIND == "tf32" else "ieee"
    return tl.dot(operand(a, KIND), operand(b, KIND), acc, input_precision=PRECISION)


@triton.jit
def log_sums(steps_ptr, row, i, CHUNK: tl.constexpr):
    """Running sums of the logarithms at steps i of a chunk, in two parts."""
    sums = steps_ptr + (row * 4 + 1) * CHUNK
    return tl.load(sums + i), tl.load(sums + CHUNK + i)


@triton.jit
def step_sizes(steps_ptr, row, i, CHUNK: tl.constexpr):
    return tl.load(steps_ptr + row * 4 * CHUNK + i)


@triton.jit
def pair_decays(t, s, high_t, low_t, high_s, low_s):
    """L_ts, 0 where s > t. One rounding of the exponential for each pair, and not for each step between."""
    between = (high_t - high_s) + (low_t - low_s)
    return tl.exp(tl.where(s <= t, between, float("-inf")))


@triton.jit(do_not_specialize=["length"])
def ssd_steps_kernel(
    dt_ptr, A_ptr, bias_ptr, chunks_ptr, steps_ptr, length, heads, dt_min, dt_max,
    dt_stride_b, dt_stride_t, dt_stride_h, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """steps (K, H, 4, CHUNK): dt as the recurrence takes it, 0 past the end; the running sum of dt A, in two parts; and
    dt's derivative by what was given."""
    blocks = tl.cdiv(heads, BLOCK_H)
    k = tl.program_id(0) // blocks
    sequence, first, count = chunk_of(chunks_ptr, k, length, CHUNK)
    if count == 0:
        return
    h = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    i = tl.arange(0, CHUNK)[:, None]
    mask = (i < count) & (h < heads)
    begin = dt_ptr + sequence * dt_stride_b + first * dt_stride_t
    raw = tl.load(begin + (i.to(tl.int64) * dt_stride_t + h.to(tl.int64) * dt_stride_h), mask=mask, other=0.0)
    raw = raw.to(tl.float32)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + h, mask=h < heads, other=0.0)
    step = raw
    slope = tl.full((CHUNK, BLOCK_H), 1.0, tl.float32)
    if SOFTPLUS:
        step = softplus(raw)
        slope = sigmoid(raw)
    slope = tl.where((step < dt_min) | (step > dt_max), 0.0, slope)
    step = tl.maximum(step, dt_min, propagate_nan=tl.PropagateNan.ALL)
    step = tl.minimum(step, dt_max, propagate_nan=tl.PropagateNan.ALL)
    step = tl.where(mask, step, 0.0)
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0)
    sums = tl.cumsum(tl.maximum(step * A, LOWEST_LOG).to(tl.float64), 0)
    high = sums.to(tl.float32)
    low = (sums - high.to(tl.float64)).to(tl.float32)
    to = steps_ptr + ((k.to(tl.int64) * heads + h) * 4 * CHUNK + i)
    tl.store(to, step, mask=h < heads)
    tl.store(to + CHUNK, high, mask=h < heads)
    tl.store(to + 2 * CHUNK, low, mask=h < heads)
    tl.store(to + 3 * CHUNK, slope, mask=h < heads)


@triton.jit(do_not_specialize=["length"])
def ssd_states_kernel(
    x_ptr, z_ptr, B_ptr, steps_ptr, chunks_ptr, gains_ptr, length, heads, groups,
    x_stride_b, x_stride_t, x_stride_h, z_stride_b, z_stride_t, z_stride_h, B_stride_b, B_stride_t, B_stride_g,
    BACKWARD: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """gains (K, H, P, N): what a chunk adds to the state, sum_s L_es dt_s x_s B_s^T; BACKWARD, for dout and C as x
    and B, what it adds to the gradient of the state before it, sum_t L_tb dy_t C_t^T, with dy from dout and the gate:
    the one that products take may be rounded, and would be twice."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P * tiles_n
    tile = tl.program_id(0) % tiles
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    k = tl.program_id(0) // (tiles * heads)
    sequence, first, count = chunk_of(chunks_ptr, k, length, CHUNK)
    if count == 0:
        return
    row = k.to(tl.int64) * heads + h
    p = tile // tiles_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_of_head = x_ptr + sequence * x_stride_b + first * x_stride_t + h * x_stride_h
    z_of_head = x_of_head
    if z_ptr is not None:
        z_of_head = z_ptr + sequence * z_stride_b + first * z_stride_t + h * z_stride_h
    B_of_group = B_ptr + sequence * B_stride_b + first * B_stride_t + h // (heads // groups) * B_stride_g
    high_e, low_e = log_sums(steps_ptr, row, CHUNK - 1, CHUNK)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, count, BLOCK_T):
        s = start + tl.arange(0, BLOCK_T)
        high, low = log_sums(steps_ptr, row, s, CHUNK)
        if BACKWARD:
            weight = tl.exp(high + low)
        else:
            weight = tl.exp((high_e - high) + (low_e - low)) * step_sizes(steps_ptr, row, s, CHUNK)
        at = s[:, None].to(tl.int64)
        of_x = (s < count)[:, None] & (p < P)[None, :]
        x = tl.load(x_of_head + (at * x_stride_t + p[None, :]), mask=of_x, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_of_head + (at * z_stride_t + p[None, :]), mask=of_x, other=0.0).to(tl.float32)
            x *= z * sigmoid(z)
        B = tl.load(
            B_of_group + (at * B_stride_t + n[None, :]), mask=(s < count)[:, None] & (n < N)[None, :], other=0.0
        )
        acc = product(tl.trans(operand(x * weight[:, None], KIND)), B, acc, KIND)
    to = gains_ptr + row * (P * N) + (p[:, None] * N + n[None, :])
    tl.store(to, acc, mask=(p < P)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["length"])
def ssd_carry_kernel(
    gains_ptr, steps_ptr, documents_ptr, first_ptr, last_ptr, other_ptr, states_ptr, inner_ptr, length, heads, size,
    BACKWARD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """states (K, H, P N): those before each chunk of a document, from `first` or zeros; the one after the last is for
    `last`. BACKWARD the same from the last chunk to the first; and inner (K, H, tiles): their products with `other`."""
    tiles = tl.cdiv(size, BLOCK)
    tile = tl.program_id(0) % tiles
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    document = tl.program_id(0) // (tiles * heads)
    begin = document.to(tl.int64)
    row_in = begin
    row_out = begin
    if documents_ptr is not None:
        entry = documents_ptr + begin * 4
        begin = tl.load(entry)
        chunks = tl.load(entry + 1).to(tl.int32)
        row_in = tl.load(entry + 2)
        row_out = tl.load(entry + 3)
    else:
        chunks = tl.cdiv(length, CHUNK)
        begin *= chunks
    if BACKWARD:
        row_in, row_out = row_out, row_in
    i = tile * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    state = tl.zeros((BLOCK,), tl.float32)
    if first_ptr is not None:
        state = tl.load(first_ptr + (row_in * heads + h) * size + i, mask=mask & (row_in >= 0), other=0.0)
    at = begin
    ahead = 1
    if BACKWARD:
        at += chunks - 1
        ahead = -1
    gain = tl.load(gains_ptr + (at * heads + h) * size + i, mask=mask & (chunks > 0), other=0.0)
    for j in range(chunks):
        row = at * heads + h
        at += ahead
        next_gain = tl.load(gains_ptr + (at * heads + h) * size + i, mask=mask & (j + 1 < chunks), other=0.0)
        tl.store(states_ptr + row * size + i, state.to(states_ptr.dtype.element_ty), mask=mask)
        if inner_ptr is not None:
            other = tl.load(other_ptr + row * size + i, mask=mask, other=0.0).to(tl.float32)
            tl.store(inner_ptr + row * tiles + tile, tl.sum(state * other, 0))
        high, low = log_sums(steps_ptr, row, CHUNK - 1, CHUNK)
        state = decay_of(high + low) * state + gain
        gain = next_gain
    if last_ptr is not None:
        tl.store(last_ptr + (row_out * heads + h) * size + i, state, mask=mask & (row_out >= 0))


def padded(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)


def kind_of(dtype: torch.dtype) -> str:
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if dtype == torch.float16 or torch.get_float32_matmul_precision() != "highest" else "ieee"


@dataclass(frozen=True)
class Plan:
    """What all launches of a call share. chunks (K, 3): sequence, first step, number of steps; documents (S, 4): first
    chunk, number of chunks, row of the initial state, row of the final one; both None for sequences of one length."""

    kind: str
    tile: Tile
    sizes: tuple[int, int, int, int, int, int]  # B, L, H, P, G, N
    num_chunks: int
    num_documents: int
    chunks: torch.Tensor | None
    documents: torch.Tensor | None

    @property
    def constants(self) -> dict[str, Any]:
        _, _, _, P, _, N = self.sizes
        return {"KIND": self.kind, "P": P, "N": N, "CHUNK": self.tile.chunk, "BLOCK_T": self.tile.block}

    def options(self, many: bool = False) -> dict[str, Any]:
        """many: warps for more than a tile or two; those of head sizes over 64 are larger."""
        warps = self.tile.many_warps if many or self.sizes[3] > 64 else self.tile.warps
        return {"num_warps": warps, "num_stages": self.tile.stages}

    @property
    def operands(self) -> torch.dtype:
        """What is rounded to before it is multiplied, and so may be kept in."""
        return torch.bfloat16 if self.kind == "bf16" else torch.float32


def plan(x: torch.Tensor, B: torch.Tensor, documents: torch.Tensor | None) -> Plan:
    """documents (S, 5), int64: sequence, first step, end, rows of the initial and the final state or -1. None: each
    sequence is one."""
    (batch, length, heads, P), (groups, N) = x.shape, B.shape[2:]
    kind = kind_of(x.dtype)
    tiles = TILES[device.architecture(x.device), kind]
    tile = tiles[min(size for size in tiles if size >= max(padded(P), padded(N)))]
    sizes = (batch, length, heads, P, groups, N)
    if documents is None:
        return Plan(kind, tile, sizes, batch * triton.cdiv(length, tile.chunk), batch, None, None)
    sequence, first, end, initial, final = documents.unbind(1)
    counts = (end - first + tile.chunk - 1) // tile.chunk
    through = counts.cumsum(0)
    num_chunks = batch * length // tile.chunk + documents.shape[0]
    k = torch.arange(num_chunks, device=x.device)
    of = torch.searchsorted(through, k, right=True).clamp(max=documents.shape[0] - 1)
    begin = first[of] + (k - (through - counts)[of]) * tile.chunk
    chunks = torch.stack([sequence[of], begin, (end[of] - begin).clamp(0, tile.chunk)], 1)
    table = torch.stack([through - counts, counts, initial, final], 1)
    return Plan(kind, tile, sizes, num_chunks, documents.shape[0], chunks, table)


def strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Of batch, time and head or group."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def find_steps(
    p: Plan, dt: torch.Tensor, A: torch.Tensor, bias: torch.Tensor | None, softplus: bool, low: float, high: float
) -> torch.Tensor:
    heads = p.sizes[2]
    steps = A.new_empty(p.num_chunks, heads, 4, p.tile.chunk)
    ssd_steps_kernel[(p.num_chunks * triton.cdiv(heads, HEADS_OF_STEPS),)](
        dt, A, bias, p.chunks, steps, p.sizes[1], heads, low, high, *dt.stride(),
        SOFTPLUS=softplus, CHUNK=p.tile.chunk, BLOCK_H=HEADS_OF_STEPS, num_warps=8,
    )  # fmt: skip
    return steps


def find_states(
    p: Plan, x: torch.Tensor, B: torch.Tensor, steps: torch.Tensor, first: torch.Tensor | None,
    last: torch.Tensor | None, *, z: torch.Tensor | None = None, other: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The states before each chunk (K, H, P, N); or, where these are given as `other`, for dout and C as x and B, the
    gradients of those after it, and their products with `other`, in parts. Documents start from first, end in last."""
    backward = other is not None
    _, length, heads, P, groups, N = p.sizes
    block_p, block_n = (min(padded(size), 2 * p.tile.slab) for size in (P, N))
    gains = steps.new_empty(p.num_chunks, heads, P, N)
    ssd_states_kernel[(triton.cdiv(P, block_p) * triton.cdiv(N, block_n) * heads * p.num_chunks,)](
        x, z, B, steps, p.chunks, gains, length, heads, groups, *strides(x), *strides(z), *strides(B),
        BACKWARD=backward, BLOCK_P=block_p, BLOCK_N=block_n, **p.constants, **p.options(many=True),
    )  # fmt: skip
    states = gains if p.operands == torch.float32 else gains.new_empty(gains.shape, dtype=p.operands)
    tiles = triton.cdiv(P * N, CARRIED)
    inner = gains.new_empty(p.num_chunks, heads, tiles) if backward else None
    ssd_carry_kernel[(p.num_documents * heads * tiles,)](
        gains, steps, p.documents, first, last, other, states, inner, length, heads, P * N,
        BACKWARD=backward, CHUNK=p.tile.chunk, BLOCK=CARRIED, num_warps=4,
    )  # fmt: skip
    return states, inner
