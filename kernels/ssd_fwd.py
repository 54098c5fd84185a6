"""ssd, forward: from the states before each chunk its outputs, by blocks of pairs as in causal attention.

The maths is in the op's module, what a chunk is in ssd_tiles.py.
"""

import torch
import triton
import triton.language as tl

from . import device
from .scan_math import sigmoid
from .ssd_tiles import (
    Plan,
    chunk_of,
    find_states,
    find_steps,
    load_rows,
    log_sums,
    padded,
    pair_decays,
    plan,
    product,
    step_sizes,
    strides,
)


@triton.jit(do_not_specialize=["length"])
def ssd_outputs_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dout_ptr, steps_ptr, states_ptr, chunks_ptr, y_ptr, dz_ptr, dy_ptr,
    length, heads, groups, x_stride_b, x_stride_t, x_stride_h, B_stride_b, B_stride_t, B_stride_g,
    C_stride_b, C_stride_t, C_stride_g, D_stride_h, D_stride_p, z_stride_b, z_stride_t, z_stride_h,
    dout_stride_b, dout_stride_t, dout_stride_h,
    KIND: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """A block of y; or, from dout, of dz, which needs y again, and of dy, the gradient of y before the gate."""
    tiles: tl.constexpr = CHUNK // BLOCK_T
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_T  # those that see most first
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    k = tl.program_id(0) // (tiles * heads)
    sequence, first, count = chunk_of(chunks_ptr, k, length, CHUNK)
    if start >= count:
        return
    row = k.to(tl.int64) * heads + h
    group = h // (heads // groups)
    x_of_head = x_ptr + sequence * x_stride_b + first * x_stride_t + h * x_stride_h
    B_of_group = B_ptr + sequence * B_stride_b + first * B_stride_t + group * B_stride_g
    C_of_group = C_ptr + sequence * C_stride_b + first * C_stride_t + group * C_stride_g
    i = tl.arange(0, BLOCK_T)
    t = start + i
    p = tl.arange(0, BLOCK_P)
    high_t, low_t = log_sums(steps_ptr, row, t, CHUNK)

    acc = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for n in tl.static_range(0, BLOCK_N, SLAB):
        C = load_rows(C_of_group, start, count, C_stride_t, N, BLOCK_T, SLAB, n)
        states = load_rows(states_ptr + row * (P * N), 0, P, N, N, BLOCK_P, SLAB, n)
        acc = product(C, tl.trans(states), acc, KIND)
    acc *= tl.exp(high_t + low_t)[:, None]
    C = load_rows(C_of_group, start, count, C_stride_t, N, BLOCK_T, BLOCK_N)
    for start_s in range(0, start + BLOCK_T, BLOCK_T):
        s = start_s + i
        high_s, low_s = log_sums(steps_ptr, row, s, CHUNK)
        B = load_rows(B_of_group, start_s, count, B_stride_t, N, BLOCK_T, BLOCK_N)
        weights = product(C, tl.trans(B), tl.zeros((BLOCK_T, BLOCK_T), tl.float32), KIND)
        weights *= pair_decays(t[:, None], s[None, :], high_t[:, None], low_t[:, None], high_s[None, :], low_s[None, :])
        weights *= step_sizes(steps_ptr, row, s, CHUNK)[None, :]
        x = load_rows(x_of_head, start_s, count, x_stride_t, P, BLOCK_T, BLOCK_P)
        acc = product(weights, x, acc, KIND)

    if D_ptr is not None:
        D = tl.load(D_ptr + h * D_stride_h + p * D_stride_p, mask=p < P, other=0.0)
        acc += D[None, :] * load_rows(x_of_head, start, count, x_stride_t, P, BLOCK_T, BLOCK_P).to(tl.float32)
    at = (((sequence * length + first + t) * heads + h) * P)[:, None] + p[None, :]
    mask = (t < count)[:, None] & (p < P)[None, :]
    if z_ptr is not None:
        z_of_head = z_ptr + sequence * z_stride_b + first * z_stride_t + h * z_stride_h
        z = load_rows(z_of_head, start, count, z_stride_t, P, BLOCK_T, BLOCK_P).to(tl.float32)
        open = sigmoid(z)
        if dout_ptr is not None:
            dout_of_head = dout_ptr + sequence * dout_stride_b + first * dout_stride_t + h * dout_stride_h
            dout = load_rows(dout_of_head, start, count, dout_stride_t, P, BLOCK_T, BLOCK_P).to(tl.float32)
            dz = dout * acc * (open * (1 + z * (1 - open)))
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            tl.store(dy_ptr + at, (dout * (z * open)).to(dy_ptr.dtype.element_ty), mask=mask)
        acc *= z * open
    if y_ptr is not None:
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def per_element(D: torch.Tensor | None, heads: int) -> tuple[int, int]:
    """D's strides as (H, P), whichever shape it has."""
    if D is None:
        return 0, 0
    return (D.stride(0), D.stride(1)) if D.dim() == 2 else (1, 0)


def find_outputs(
    p: Plan, x: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None,
    dout: torch.Tensor | None, steps: torch.Tensor, states: torch.Tensor, y: torch.Tensor | None,
    dz: torch.Tensor | None, dy: torch.Tensor | None,
) -> None:  # fmt: skip
    _, length, heads, P, groups, N = p.sizes
    ssd_outputs_kernel[(p.tile.chunk // p.tile.block * heads * p.num_chunks,)](
        x, B, C, D, z, dout, steps, states, p.chunks, y, dz, dy, length, heads, groups,
        *strides(x), *strides(B), *strides(C), *per_element(D, heads), *strides(z), *strides(dout),
        BLOCK_P=padded(P), BLOCK_N=padded(N), SLAB=min(p.tile.slab, padded(N)), **p.constants,
        **p.options(many=dout is not None),
    )  # fmt: skip


def ssd_fwd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    documents: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    y: torch.Tensor,
    final: torch.Tensor,
) -> None:
    """Fills y and, where a document has steps, final, which the caller has allocated, both contiguous; shapes are the
    op's, the last strides of x, B, C and z are 1, documents is as in `plan`."""
    p = plan(x, B, documents)
    with device.current(x.device):
        steps = find_steps(p, dt, A, dt_bias, dt_softplus, dt_min, dt_max)
        states, _ = find_states(p, x, B, steps, initial_states, final)
        find_outputs(p, x, B, C, D, z, None, steps, states, y, None, None)
