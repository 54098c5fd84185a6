"""Both products of a SwiGLU layer and its activation in one kernel: y = silu(x @ w_gate.T) * (x @ w_up.T).

A tile has two sums, the gate's and the up's, from one load of x; they are stored only where a backward pass will come.
Tiles and configurations are those of products of groups, of which there is one here (group_tiles.py).
"""

import torch
import triton
import triton.language as tl

from . import device
from .group_tiles import dense, load_rows, load_weight, plan
from .scan_math import sigmoid

# Rows of tiles that are taken together, so that their columns find the weights in the L2 cache.
TOGETHER = 8


@triton.jit(do_not_specialize=["rows"])
def fused_swiglu_fwd_kernel(
    x, w_gate, w_up, gate_ptr, up_ptr, y_ptr, rows, inner, width, x_stride, gate_stride_n, gate_stride_k, up_stride_n,
    up_stride_k,
    ROWS_TMA: tl.constexpr, GATE_TMA: tl.constexpr, UP_TMA: tl.constexpr, GATE_K_CONTIGUOUS: tl.constexpr,
    UP_K_CONTIGUOUS: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = (inner + BLOCK_N - 1) // BLOCK_N
    first = tl.program_id(0) // (TOGETHER * columns) * TOGETHER
    together = tl.minimum((rows + BLOCK_M - 1) // BLOCK_M - first, TOGETHER)
    rest = tl.program_id(0) % (TOGETHER * columns)
    start = (first + rest % together) * BLOCK_M
    n = rest // together * BLOCK_N
    i = tl.arange(0, BLOCK_M)
    row = (start + i).to(tl.int64)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    group = first * 0
    for k in range(0, width, BLOCK_K):
        x_tile = load_rows(x, row, row < rows, start, k, width, x_stride, BLOCK_K, ROWS_TMA)
        gate_tile = load_weight(
            w_gate, group, n, k, inner, width, 0, gate_stride_n, gate_stride_k, BLOCK_N, BLOCK_K, GATE_K_CONTIGUOUS,
            GATE_TMA,
        )  # fmt: skip
        up_tile = load_weight(
            w_up, group, n, k, inner, width, 0, up_stride_n, up_stride_k, BLOCK_N, BLOCK_K, UP_K_CONTIGUOUS, UP_TMA
        )
        gate = tl.dot(x_tile, gate_tile, gate, input_precision=PRECISION)
        up = tl.dot(x_tile, up_tile, up, input_precision=PRECISION)
    # What the backward pass reads is what y is made of.
    rounded_gate = gate.to(y_ptr.dtype.element_ty)
    rounded_up = up.to(y_ptr.dtype.element_ty)
    column = n + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (column < inner)[None, :]
    at = row[:, None] * inner + column[None, :]
    if gate_ptr is not None:
        tl.store(gate_ptr + at, rounded_gate, mask=mask)
        tl.store(up_ptr + at, rounded_up, mask=mask)
    gate = rounded_gate.to(tl.float32)
    y = gate * sigmoid(gate) * rounded_up.to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def fused_swiglu_fwd(
    x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, gate: torch.Tensor | None, up: torch.Tensor | None,
    y: torch.Tensor,
) -> None:  # fmt: skip
    """Fills y (M, F) and, if they are asked for, gate and up (M, F), all contiguous; x (M, C) has rows without gaps
    between elements, w_gate and w_up are (F, C)."""
    (rows, width), inner = x.shape, w_gate.shape[0]
    p = plan(x, rows, 1)
    options = p.options()
    options["BLOCK_N"] = block_n = options["BLOCK_N"] // 2  # there are two products
    w_gate, w_up = dense(w_gate), dense(w_up)
    x_source = p.rows(x)
    (gate_source, gate_k), (up_source, up_k) = (p.weights(w[None], block_n) for w in (w_gate, w_up))
    tiles = triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(inner, block_n)
    with device.current(x.device):
        fused_swiglu_fwd_kernel[(tiles,)](
            x_source, gate_source, up_source, gate, up, y, rows, inner, width, x.stride(0), *w_gate.stride(),
            *w_up.stride(),
            ROWS_TMA=x_source is not x, GATE_TMA=not isinstance(gate_source, torch.Tensor),
            UP_TMA=not isinstance(up_source, torch.Tensor), GATE_K_CONTIGUOUS=gate_k, UP_K_CONTIGUOUS=up_k,
            TOGETHER=TOGETHER, **options,
        )  # fmt: skip
