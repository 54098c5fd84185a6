"""What attention's forward and backward share: which tile a program takes, which tiles it visits, how one is loaded.

Letters: B batch, T time, H query heads, K key heads, D head size of q and k, DV of v; m counts queries, n keys.
Query m sees key n when m + shift - window_left <= n <= m + shift + window_right, shift = Tk - Tq.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import device

# Heads whose tiles run at the same time share this much of the L2 cache.
SECTION_BYTES = 24 * 1024 * 1024

# (BLOCK_M, BLOCK_N, warps, stages) by architecture and kind of product, then by the largest padded head size an entry
# is for. "half" is bf16 and fp16, which on sm_90 have other tiles when they come by pointers and not by descriptors;
# fp32 is "ieee" or "tf32".
Table = dict[tuple[str, str], dict[int, tuple[int, int, int, int]]]


@triton.jit
def my_tile(num_tiles, num_heads, heads_per_section, LAST_FIRST: tl.constexpr):
    """(tile, head) of this program.

    Heads come in sections whose keys and values fit the L2 cache together; within one, programs that visit many tiles
    (the last, when attention is causal) start first, so that the short ones fill the gaps at the end.
    """
    pid = tl.program_id(0)
    section = pid // (num_tiles * heads_per_section)
    first_head = section * heads_per_section
    heads = tl.minimum(heads_per_section, num_heads - first_head)
    rest = pid - first_head * num_tiles
    tile = rest // heads
    if LAST_FIRST:
        tile = num_tiles - 1 - tile
    return tile, first_head + rest % heads


@triton.jit
def visited(
    start, end, shift, reach_back, reach_ahead, length, LIMIT_BACK: tl.constexpr, LIMIT_AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Which blocks of 0 .. length - 1 the rows start .. end - 1 are paired with, when row is paired with the positions
    row + shift - reach_back .. row + shift + reach_ahead.

    Returns (a, b, c, d): blocks are visited from a up to d; those that begin in [b, c) pair entirely with every row.
    """
    a = 0
    b = 0
    c = length
    d = length
    if LIMIT_BACK:
        a = tl.maximum(start + shift - reach_back, 0) // BLOCK * BLOCK
        b = tl.maximum(end - 1 + shift - reach_back, 0)
    if LIMIT_AHEAD:
        c = tl.minimum(start + shift + reach_ahead + 1, length)
        d = tl.minimum(end + shift + reach_ahead, length)
    return a, b, c - (BLOCK - 1), d


@triton.jit
def masked(
    s, m, n, shift, window_left, window_right, Tk, LIMIT_LEFT: tl.constexpr, LIMIT_RIGHT: tl.constexpr
):  # fmt: skip
    """Scores, -inf where query m does not see key n."""
    visible = n < Tk
    if LIMIT_LEFT:
        visible = visible & (n - (shift - window_left) >= m)
    if LIMIT_RIGHT:
        visible = visible & (n - (shift + window_right) <= m)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def load_tile(
    source, b, h, start, length, stride_t,
    BLOCK_T: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + BLOCK_T - 1 of one head, zeros outside the tensor.

    source is a tensor descriptor (TMA), or a pointer to the head's first row.
    """
    if TMA:
        tile = tl.reshape(source.load([b, h, start, 0]), (BLOCK_T, BLOCK_SIZE))
    else:
        t = tl.arange(0, BLOCK_T)[:, None]
        d = tl.arange(0, BLOCK_SIZE)[None, :]
        mask = t < length - start
        if SIZE < BLOCK_SIZE:
            mask = mask & (d < SIZE)
        pointers = source + tl.cast(start, tl.int64) * stride_t + (t.to(tl.int64) * stride_t + d)
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def head_of(source, b, h, stride_b, stride_h, TMA: tl.constexpr):
    """What load_tile takes as source: the descriptor itself, or the pointer to a head's first row."""
    if TMA:
        return source
    else:
        return source + (tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h)


def padded(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)


def heads_per_section(bytes_per_head: int, num_heads: int, group: int) -> int:
    """Query heads that run together: whole groups, at least one, as many as fit the cache."""
    return min(max(SECTION_BYTES // max(bytes_per_head, 1), 1) * group, num_heads)


def scale_of_powers_of_two(softmax_scale: float) -> float:
    """The kernels compute exp2(scale * s) with a positive scale; the sign goes to s.

    One too small for a difference stands for zero: masked scores are -inf, and -inf * 0 is no number.
    """
    return max(abs(float(softmax_scale)) * math.log2(math.e), 1e-30)


def limits(window_left: int, window_right: int, Tq: int, Tk: int) -> tuple[int, int]:
    """The window with -1 where it limits nothing: no key is farther back than Tk - 1, or ahead than Tq - 1."""
    left = window_left if 0 <= window_left < Tk - 1 else -1
    right = window_right if 0 <= window_right < Tq - 1 else -1
    return left, right


def _describable(tensor: torch.Tensor) -> bool:
    """Bulk copies want (B, T, H, D) aligned to 16 bytes and no broadcast dimension."""
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]
    aligned = all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in strides)
    return aligned and tensor.data_ptr() % 16 == 0


@dataclass(frozen=True)
class Plan:
    """What the forward and both passes of the backward settle before they launch."""

    arch: str
    kind: str
    tma: bool
    window: tuple[int, int]
    constants: dict[str, Any]

    def tiles(self, table: Table) -> tuple[int, int, dict[str, Any]]:
        """(BLOCK_M, BLOCK_N, keyword arguments of the launch): the entry of the smallest head size that is enough."""
        by_pointer = (self.arch, f"{self.kind} by pointer")
        sizes = table[by_pointer if not self.tma and by_pointer in table else (self.arch, self.kind)]
        wanted = max(self.constants["BLOCK_D"], self.constants["BLOCK_DV"])
        block_m, block_n, num_warps, num_stages = sizes[min(size for size in sizes if size >= wanted)]
        tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
        # The exponents are one fused multiply-add each, which Triton 3.10 no longer takes for granted.
        return block_m, block_n, self.constants | tile | {"enable_fp_fusion": True}

    def source(self, tensor: torch.Tensor, block_t: int) -> torch.Tensor | TensorDescriptor:
        """What load_tile reads from: the tensor, or a descriptor of tiles of one head's rows."""
        if not self.tma:
            return tensor
        # Only because the dimensions of size one lead does the compiler see a plain matrix in a tile. The stride of a
        # dimension of size one is arbitrary, and may be unaligned.
        B, T, H, D = tensor.shape
        b, t, h, _ = (stride if size > 1 else 64 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return TensorDescriptor(tensor, [B, H, T, D], [b, h, t, 1], [1, 1, block_t, padded(D)])

    def strides(self, *tensors: torch.Tensor) -> list[int]:
        """Strides of B, T, H for load_tile; a descriptor has its own."""
        return [0 if self.tma else stride for tensor in tensors for stride in tensor.stride()[:3]]


def plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, others: tuple[torch.Tensor, ...], softmax_scale: float,
    window_left: int, window_right: int,
) -> Plan:  # fmt: skip
    arch = device.architecture(q.device)
    kind = "half"
    if q.dtype == torch.float32:
        # Exact, unless PyTorch has been told otherwise.
        kind = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    # Exact products read their operands from registers, where tiles that arrive by bulk copies cost spills.
    tma = arch in ("sm_90", device.INTERPRETER) and kind != "ieee" and all(map(_describable, (q, k, v, *others)))
    left, right = limits(window_left, window_right, q.shape[1], k.shape[1])
    D, DV = q.shape[3], v.shape[3]
    constants = {
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV), "LIMIT_LEFT": left >= 0,
        "LIMIT_RIGHT": right >= 0, "NEGATIVE_SCALE": softmax_scale < 0,
        "PRECISION": "tf32" if kind == "tf32" else "ieee", "TMA": tma,
    }  # fmt: skip
    return Plan(arch, kind, tma, (left, right), constants)
