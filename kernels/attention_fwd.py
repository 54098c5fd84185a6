"""Attention, forward: FlashAttention-2 (Dao, 2023, arXiv:2307.08691), with no T x T matrix in memory.

    S = softmax_scale * Q K^T over the visible keys      out = softmax(S) V      lse = log sum exp S

A program holds a tile of queries and visits the tiles of keys they see, keeping the softmax's maximum and sum online,
in powers of two (Milakov & Gimelshein, 2018, arXiv:1805.02867). Only tiles that some query of the program does not see
entirely are masked. A query that sees no key gets out 0, lse -inf.
Letters and the rule of visibility: attention_tiles.py. GQA: query head h reads key head h // (H / K).
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

# On sm_90 up to head size 128 two programs share a multiprocessor, so that one's exponentials run beside the other's
# products.
CONFIGS: Table = {
    ("sm_90", "half"): {64: (128, 128, 4, 2), 128: (128, 64, 4, 2), 256: (128, 64, 8, 2)},
    ("sm_90", "half by pointer"): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
    ("sm_90", "tf32"): {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    ("sm_90", "ieee"): {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    ("sm_80", "half"): {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 3)},
    ("sm_80", "tf32"): {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("sm_80", "ieee"): {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 2)},
    ("sm_86", "half"): {64: (128, 64, 4, 3), 128: (128, 32, 8, 3), 256: (64, 32, 4, 2)},
    ("sm_86", "tf32"): {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 4, 2)},
    ("sm_86", "ieee"): {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 16, 4, 2)},
    (device.INTERPRETER, "half"): {256: (64, 64, 4, 1)},
    (device.INTERPRETER, "tf32"): {256: (64, 64, 4, 1)},
    (device.INTERPRETER, "ieee"): {256: (64, 64, 4, 1)},
}

# Below every score, yet finite: the difference of two maxima is 0 and not NaN in a row that has seen no key.
LOWEST = tl.constexpr(-3.3e38)
LN2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=["B", "H", "Tq", "Tk", "heads_in_section", "window_left", "window_right"])
def attention_fwd_kernel(
    q_source, k_source, v_source, out_ptr, lse_ptr, B, H, group, Tq, Tk, heads_in_section, qk_scale,
    window_left, window_right, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h,
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
    q = load_tile(q_of_head, b, h, first_m, Tq, q_stride_t, BLOCK_M, D, BLOCK_D, TMA)
    if NEGATIVE_SCALE:
        q = -q
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

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
        # The scale is positive: it passes through the maximum, and joins the subtraction in one instruction.
        new_largest = tl.maximum(largest, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = load_tile(v_of_head, b, k_head, first_n, Tk, v_stride_t, BLOCK_N, DV, BLOCK_DV, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        largest = new_largest

    lse = tl.where(total == 0.0, float("-inf"), (largest + tl.log2(total)) * LN2)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * Tq + m, lse, mask=m < Tq)
    out = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    d = tl.arange(0, BLOCK_DV)[None, :]
    row = (tl.cast(b, tl.int64) * Tq + m)[:, None]
    pointers = out_ptr + ((row * H + h) * DV + d)
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(m < Tq)[:, None] & (d < DV))


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, window_left: int, window_right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: (B, Tq, H, D), k: (B, Tk, K, D), v: (B, Tk, K, DV), last stride 1.

    Returns out (B, Tq, H, DV) in q's dtype and lse (B, H, Tq) in float32.
    """
    B, Tq, H, _ = q.shape
    Tk, K, DV = v.shape[1:]
    out = torch.empty((B, Tq, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    if Tk == 0:
        return out.zero_(), lse.fill_(-math.inf)
    launch = plan(q, k, v, (), softmax_scale, window_left, window_right)
    block_m, block_n, keywords = launch.tiles(CONFIGS)
    section = heads_per_section((k[0, :, 0].numel() + v[0, :, 0].numel()) * k.element_size(), B * H, H // K)
    with device.current(q.device):
        attention_fwd_kernel[(triton.cdiv(Tq, block_m) * B * H,)](
            launch.source(q, block_m), launch.source(k, block_n), launch.source(v, block_n), out, lse,
            B, H, H // K, Tq, Tk, section, scale_of_powers_of_two(softmax_scale), *launch.window,
            *launch.strides(q, k, v), **keywords,
        )  # fmt: skip
    return out, lse
