"""Products of groups of rows, each with its group's weight, and of groups of rows with each other.

    rows_times_weights    y[rows of g] = a[rows of g] @ w[g].T, times the rows' weights where there are some
    rows_times_rows       w[g] = a[rows of g].T @ b[rows of g]: a group's rows are what is summed over
Rows may be gathered as they are loaded: those of the tokens that order names, not a copy in the groups' order.
"""

import torch
import triton
import triton.language as tl

from . import device
from .group_tiles import Plan, dense, load_rows, load_weight, my_rows, plan, tiles_of_groups, tokens_of

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) of rows_times_rows, by architecture and kind as in group_tiles.ROWS.
PAIRS = {
    ("sm_90", "half"): (128, 256, 64, 8, 3),
    ("sm_90", "tf32"): (128, 128, 32, 8, 3),
    ("sm_90", "ieee"): (64, 64, 16, 4, 2),
    ("sm_80", "half"): (128, 128, 32, 8, 4),
    ("sm_80", "tf32"): (128, 128, 32, 8, 3),
    ("sm_80", "ieee"): (64, 64, 16, 4, 2),
    ("sm_86", "half"): (128, 128, 32, 8, 4),
    ("sm_86", "tf32"): (64, 128, 32, 8, 3),
    ("sm_86", "ieee"): (64, 64, 16, 4, 2),
    (device.INTERPRETER, "half"): (64, 64, 64, 4, 1),
    (device.INTERPRETER, "ieee"): (64, 64, 64, 4, 1),
    (device.INTERPRETER, "tf32"): (64, 64, 64, 4, 1),
}


@triton.jit(do_not_specialize=["rows", "groups"])
def rows_times_weights_kernel(
    a, w, y_ptr, order_ptr, weights_ptr, offsets_ptr, rows, groups, N, K, top_k, a_stride, w_stride_g, w_stride_n,
    w_stride_k,
    GATHER: tl.constexpr, ROWS_TMA: tl.constexpr, WEIGHT_TMA: tl.constexpr, K_CONTIGUOUS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    begin, count, end_tile = tiles_of_groups(offsets_ptr, groups, BLOCK_M, BLOCK_G)
    columns = (N + BLOCK_N - 1) // BLOCK_N
    for tile in range(tl.program_id(0), tl.max(end_tile, 0) * columns, tl.num_programs(0)):
        group, start, left = my_rows(tile // columns, begin, count, end_tile, BLOCK_M, BLOCK_G)
        n = tile % columns * BLOCK_N
        i = tl.arange(0, BLOCK_M)
        row = (start + i).to(tl.int64)
        source = row
        if GATHER:
            _, source = tokens_of(order_ptr, start, left, top_k, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a_tile = load_rows(a, source, i < left, start, k, K, a_stride, BLOCK_K, ROWS_TMA)
            w_tile = load_weight(
                w, group, n, k, N, K, w_stride_g, w_stride_n, w_stride_k, BLOCK_N, BLOCK_K, K_CONTIGUOUS, WEIGHT_TMA
            )
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
        if weights_ptr is not None:
            pair = tl.load(order_ptr + row, mask=i < left, other=0)
            acc *= tl.load(weights_ptr + pair, mask=i < left, other=0.0)[:, None]
        column = n + tl.arange(0, BLOCK_N)
        mask = (i < left)[:, None] & (column < N)[None, :]
        tl.store(y_ptr + row[:, None] * N + column[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)
    # Rows of no group, which only wrong offsets leave, are no number.
    for row in range(tl.load(offsets_ptr + groups) + tl.program_id(0), rows, tl.num_programs(0)):
        for n in range(0, N, BLOCK_N):
            column = n + tl.arange(0, BLOCK_N)
            tl.store(y_ptr + tl.cast(row, tl.int64) * N + column, float("nan"), mask=column < N)


@triton.jit
def rows_times_rows_kernel(
    a_ptr, b_ptr, w_ptr, order_ptr, offsets_ptr, M, N, top_k, a_stride, b_stride,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows_of_tiles = (M + BLOCK_M - 1) // BLOCK_M
    columns = (N + BLOCK_N - 1) // BLOCK_N
    group = (tl.program_id(0) // (rows_of_tiles * columns)).to(tl.int64)
    m = tl.program_id(0) // columns % rows_of_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        exists = row < end
        source_a = row
        source_b = row
        if GATHER_A:
            source_a = (tl.load(order_ptr + row, mask=exists, other=0) // top_k).to(tl.int64)
        if GATHER_B:
            source_b = (tl.load(order_ptr + row, mask=exists, other=0) // top_k).to(tl.int64)
        a = tl.load(
            a_ptr + source_a[:, None] * a_stride + m[None, :], mask=exists[:, None] & (m < M)[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + source_b[:, None] * b_stride + n[None, :], mask=exists[:, None] & (n < N)[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = w_ptr + group * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(w_ptr.dtype.element_ty), mask=mask)


def rows_times_weights(
    a: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor, p: Plan | None = None,
    order: torch.Tensor | None = None, top_k: int = 1, gather: bool = False, weights: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Fills y (rows, N), NaN where a row is of no group, from a (rows or tokens, K), w (G, N, K) and offsets (G + 1,).

    gather: the rows are a's rows order[row] // top_k. weights (pairs,): factors weights[order[row]] of the rows.
    """
    groups, N, K = w.shape
    rows = y.shape[0]
    if rows == 0 or groups == 0 or N == 0:
        return
    a, w = _unit_stride(a), dense(w)
    p = p or plan(a, rows, groups)
    block_n = p.tile[1]
    a_source = a if gather else p.rows(a)
    w_source, k_contiguous = p.weights(w, block_n)
    with device.current(y.device):
        rows_times_weights_kernel[(p.programs(rows, groups, N, block_n, y.device),)](
            a_source, w_source, y, order, weights, offsets, rows, groups, N, K, top_k, a.stride(0), *w.stride(),
            GATHER=gather, ROWS_TMA=a_source is not a, WEIGHT_TMA=w_source is not w, K_CONTIGUOUS=k_contiguous,
            BLOCK_G=triton.next_power_of_2(groups), **p.options(),
        )  # fmt: skip


def rows_times_rows(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, w: torch.Tensor, order: torch.Tensor | None = None,
    top_k: int = 1, gather_a: bool = False, gather_b: bool = False,
) -> None:  # fmt: skip
    """Fills w (G, M, N) from a (rows, M) and b (rows, N), zeros where a group has no row. A gathered one has a row for
    each token, and its rows are order[row] // top_k."""
    groups, M, N = w.shape
    if w.numel() == 0:
        return
    a, b = _unit_stride(a), _unit_stride(b)
    p = plan(a, a.shape[0], groups)
    block_m, block_n, block_k, warps, stages = PAIRS[p.arch, p.kind]
    tiles = groups * triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    with device.current(w.device):
        rows_times_rows_kernel[(tiles,)](
            a, b, w, order, offsets, M, N, top_k, a.stride(0), b.stride(0), GATHER_A=gather_a, GATHER_B=gather_b,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
            PRECISION="tf32" if p.kind == "tf32" else "ieee",
        )  # fmt: skip


def _unit_stride(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
