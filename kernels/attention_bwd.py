"""Attention, backward, in two passes without atomics: the same bits every time, no T x T matrix in memory.

    delta = rowsum(dout * out) - dlse        P = exp(softmax_scale * Q K^T - lse)        dS = P * (dout V^T - delta)
    dV = P^T dout        dK = softmax_scale * dS^T Q        dQ = softmax_scale * dS K

(Dao, 2023, arXiv:2307.08691, but P is recomputed twice where others add to dQ atomically.) One pass holds a tile of
keys and visits the queries that see it, of all query heads that share the key head; the other holds a tile of queries.
Letters and the rule of visibility: attention_tiles.py.
"""

import math

import torch
import triton
import triton.language as tl

from . import device
from .attention_tiles import (
    Table,
    head_of,
    heads_per_section,
    load_tile,
    masked,
    my_tile,
    plan,
    scale_of_powers_of_two,
    visited,
)

# lse and delta are kept for this multiple of queries, so that no tile reads past their end.
QUERY_MULTIPLE = 128


LOG2E = tl.constexpr(math.log2(math.e))

DKDV_CONFIGS: Table = {
    ("sm_90", "half"): {64: (128, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 64, 8, 2)},
    ("sm_90", "half by pointer"): {64: (64, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 64, 8, 1)},
    ("sm_90", "tf32"): {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    ("sm_90", "ieee"): {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
    ("sm_80", "half"): {
        16: (64, 32, 4, 2),
        32: (32, 64, 4, 2),
        64: (64, 32, 4, 2),
        128: (32, 64, 8, 2),
        256: (32, 64, 8, 1),
    },
    ("sm_80", "tf32"): {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
    ("sm_80", "ieee"): {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
    ("sm_86", "half"): {
        16: (64, 32, 4, 2),
        32: (32, 64, 4, 2),
        64: (64, 32, 4, 2),
        128: (32, 64, 8, 2),
        256: (16, 64, 8, 1),
    },
    ("sm_86", "tf32"): {64: (32, 64, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 1)},
    ("sm_86", "ieee"): {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
    (device.INTERPRETER, "half"): {256: (64, 64, 4, 1)},
    (device.INTERPRETER, "tf32"): {256: (64, 64, 4, 1)},
    (device.INTERPRETER, "ieee"): {256: (64, 64, 4, 1)},
}
DQ_CONFIGS: Table = {
    ("sm_90", "half"): {64: (128, 64, 4, 2), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},
    ("sm_90", "half by pointer"): {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
    ("sm_90", "tf32"): {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    ("sm_90", "ieee"): {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
    ("sm_80", "half"): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("sm_80", "tf32"): {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    ("sm_80", "ieee"): {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
    ("sm_86", "half"): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
    ("sm_86", "tf32"): {64: (64, 64, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 1)},
    ("sm_86", "ieee"): {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
    (device.INTERPRETER, "half"): {256: (64, 64, 4, 1)},
    (device.INTERPRETER, "tf32"): {256: (64, 64, 4, 1)},
    (device.INTERPRETER, "ieee"): {256: (64, 64, 4, 1)},
}
DELTA_ELEMENTS = 4096


@triton.jit(do_not_specialize=["H", "Tq"])
def attention_bwd_delta_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, lse2_ptr, H, Tq, Tq_padded, do_stride_b, do_stride_t, do_stride_h,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta, and lse in powers of two; a query that sees no key, or lies past the end, gets lse +inf: its P is 0."""
    tiles = Tq_padded // BLOCK_M
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b = head // H
    h = head % H
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_DV)[None, :]
    mask = (m < Tq)[:, None] & (d < DV)
    row = m[:, None].to(tl.int64)
    dout = tl.load(dout_ptr + (b * do_stride_b + h * do_stride_h) + row * do_stride_t + d, mask=mask, other=0.0)
    out = tl.load(out_ptr + ((b * Tq + row) * H + h) * DV + d, mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + head * Tq + m, mask=m < Tq, other=0.0)
    lse = tl.load(lse_ptr + head * Tq + m, mask=m < Tq, other=float("-inf"))
    tl.store(delta_ptr + head * Tq_padded + m, delta)
    tl.store(lse2_ptr + head * Tq_padded + m, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E))


@triton.jit(do_not_specialize=["B", "H", "K", "Tq", "Tk", "heads_in_section", "window_left", "window_right"])
def attention_bwd_dkdv_kernel(
    q_source, k_source, v_source, do_source, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, B, H, K, group, Tq, Tq_padded, Tk,
    heads_in_section, qk_scale, softmax_scale, window_left, window_right,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LIMIT_LEFT: tl.constexpr, LIMIT_RIGHT: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    tile, k_head_of_all = my_tile(tl.cdiv(Tk, BLOCK_N), B * K, heads_in_section, False)
    b = k_head_of_all // K
    k_head = k_head_of_all % K
    first_n = tile * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    shift = Tk - Tq

    k_of_head = head_of(k_source, b, k_head, k_stride_b, k_stride_h, TMA)
    v_of_head = head_of(v_source, b, k_head, v_stride_b, v_stride_h, TMA)
    k = load_tile(k_of_head, b, k_head, first_n, Tk, k_stride_t, BLOCK_N, D, BLOCK_D, TMA)
    v = load_tile(v_of_head, b, k_head, first_n, Tk, v_stride_t, BLOCK_N, DV, BLOCK_DV, TMA)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    last_n = tl.minimum(first_n + BLOCK_N, Tk)
    start, inner_start, inner_end, end = visited(
        first_n, last_n, -shift, window_right, window_left, Tq, LIMIT_RIGHT, LIMIT_LEFT, BLOCK_M
    )
    for member in range(0, group):
        h = k_head * group + member
        q_of_head = head_of(q_source, b, h, q_stride_b, q_stride_h, TMA)
        do_of_head = head_of(do_source, b, h, do_stride_b, do_stride_h, TMA)
        first_of_head = (b * H + h).to(tl.int64) * Tq_padded
        for first_m in tl.range(start, end, BLOCK_M):
            m = first_m + tl.arange(0, BLOCK_M)
            q = load_tile(q_of_head, b, h, first_m, Tq, q_stride_t, BLOCK_M, D, BLOCK_D, TMA)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if NEGATIVE_SCALE:
                s = -s
            if (first_m < inner_start) | (first_m >= inner_end):
                s = masked(s, m[None, :], n[:, None], shift, window_left, window_right, Tk, LIMIT_LEFT, LIMIT_RIGHT)
            lse2 = tl.load(lse2_ptr + first_of_head + m)
            p = tl.exp2(s * qk_scale - lse2[None, :])
            dout = load_tile(do_of_head, b, h, first_m, Tq, do_stride_t, BLOCK_M, DV, BLOCK_DV, TMA)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            delta = tl.load(delta_ptr + first_of_head + m)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    row = (tl.cast(b, tl.int64) * Tk + n)[:, None] * K + k_head
    inside = (n < Tk)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(dk_ptr + (row * D + d), (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=inside & (d < D))
    d = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(dv_ptr + (row * DV + d), dv.to(dv_ptr.dtype.element_ty), mask=inside & (d < DV))


@triton.jit(do_not_specialize=["B", "H", "Tq", "Tk", "heads_in_section", "window_left", "window_right"])
def attention_bwd_dq_kernel(
    q_source, k_source, v_source, do_source, lse2_ptr, delta_ptr, dq_ptr, B, H, group, Tq, Tq_padded, Tk,
    heads_in_section, qk_scale, softmax_scale, window_left, window_right,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    do_stride_b, do_stride_t, do_stride_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LIMIT_LEFT: tl.constexpr, LIMIT_RIGHT: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    tile, head = my_tile(tl.cdiv(Tq, BLOCK_M), B * H, heads_in_section, LIMIT_RIGHT)
    b = head // H
    h = head % H
    k_head = h // group
    first_m = tile * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    shift = Tk - Tq

    q_of_head = head_of(q_source, b, h, q_stride_b, q_stride_h, TMA)
    k_of_head = head_of(k_source, b, k_head, k_stride_b, k_stride_h, TMA)
    v_of_head = head_of(v_source, b, k_head, v_stride_b, v_stride_h, TMA)
    do_of_head = head_of(do_source, b, h, do_stride_b, do_stride_h, TMA)
    q = load_tile(q_of_head, b, h, first_m, Tq, q_stride_t, BLOCK_M, D, BLOCK_D, TMA)
    if NEGATIVE_SCALE:
        q = -q
    dout = load_tile(do_of_head, b, h, first_m, Tq, do_stride_t, BLOCK_M, DV, BLOCK_DV, TMA)
    first_of_head = head.to(tl.int64) * Tq_padded
    lse2 = tl.load(lse2_ptr + first_of_head + m)
    delta = tl.load(delta_ptr + first_of_head + m)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    last_m = tl.minimum(first_m + BLOCK_M, Tq)
    start, inner_start, inner_end, end = visited(
        first_m, last_m, shift, window_left, window_right, Tk, LIMIT_LEFT, LIMIT_RIGHT, BLOCK_N
    )
    for first_n in tl.range(start, end, BLOCK_N):
        k = load_tile(k_of_head, b, k_head, first_n, Tk, k_stride_t, BLOCK_N, D, BLOCK_D, TMA)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if (first_n < inner_start) | (first_n >= inner_end):
            n = first_n + tl.arange(0, BLOCK_N)
            s = masked(s, m[:, None], n[None, :], shift, window_left, window_right, Tk, LIMIT_LEFT, LIMIT_RIGHT)
        p = tl.exp2(s * qk_scale - lse2[:, None])
        v = load_tile(v_of_head, b, k_head, first_n, Tk, v_stride_t, BLOCK_N, DV, BLOCK_DV, TMA)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    d = tl.arange(0, BLOCK_D)[None, :]
    row = (tl.cast(b, tl.int64) * Tq + m)[:, None] * H + h
    mask = (m < Tq)[:, None] & (d < D)
    tl.store(dq_ptr + (row * D + d), (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=mask)


def _delta(dout, dlse, out, lse) -> tuple[torch.Tensor, torch.Tensor]:
    B, Tq, H, DV = out.shape
    Tq_padded = triton.cdiv(Tq, QUERY_MULTIPLE) * QUERY_MULTIPLE
    delta = torch.empty((B, H, Tq_padded), dtype=torch.float32, device=out.device)
    lse2 = torch.empty_like(delta)
    block_dv = triton.next_power_of_2(DV)
    block_m = min(QUERY_MULTIPLE, DELTA_ELEMENTS // block_dv)
    attention_bwd_delta_kernel[(Tq_padded // block_m * B * H,)](
        dout, out, lse, dlse, delta, lse2, H, Tq, Tq_padded, *dout.stride()[:3],
        DV=DV, BLOCK_DV=block_dv, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    return delta, lse2


def attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes as in attention_fwd; out and lse are what it returned, dlse is contiguous or None. Returns dq, dk, dv."""
    B, Tq, H, D = q.shape
    Tk, K, DV = v.shape[1:]
    dq = torch.empty((B, Tq, H, D), dtype=q.dtype, device=q.device)
    dk = torch.empty((B, Tk, K, D), dtype=k.dtype, device=q.device)
    dv = torch.empty((B, Tk, K, DV), dtype=v.dtype, device=q.device)
    if lse.numel() == 0 or Tk == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    launch = plan(q, k, v, (dout,), softmax_scale, window_left, window_right)
    scales = (scale_of_powers_of_two(softmax_scale), float(softmax_scale))
    group, bytes_per_row = H // K, (D + DV) * q.element_size()

    def sources(block_m, block_n):
        return [launch.source(*tile) for tile in ((q, block_m), (k, block_n), (v, block_n), (dout, block_m))]

    with device.current(q.device):
        delta, lse2 = _delta(dout, dlse, out, lse)
        common = (group, Tq, delta.shape[2], Tk)
        last = (*scales, *launch.window, *launch.strides(q, k, v, dout))
        block_m, block_n, keywords = launch.tiles(DKDV_CONFIGS)
        section = heads_per_section(group * Tq * bytes_per_row, B * K, 1)
        attention_bwd_dkdv_kernel[(triton.cdiv(Tk, block_n) * B * K,)](
            *sources(block_m, block_n), lse2, delta, dk, dv, B, H, K, *common, section, *last, **keywords
        )
        block_m, block_n, keywords = launch.tiles(DQ_CONFIGS)
        section = heads_per_section(Tk * bytes_per_row, B * H, group)
        attention_bwd_dq_kernel[(triton.cdiv(Tq, block_m) * B * H,)](
            *sources(block_m, block_n), lse2, delta, dq, B, H, *common, section, *last, **keywords
        )
    return dq, dk, dv
