"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864) of queries and keys in one launch.

    x1' = x1 * cos - x2 * sin    x2' = x2 * cos + x1 * sin    (the inverse rotation, which is the backward: -sin)

The pairs (x1, x2) are elements (i, i + R/2), or (2i, 2i + 1) when interleaved; elements from R on are copied.
q: (B, T, H, D), k: (B, T, K, D), last stride 1; cos, sin: (T_max, R/2) float32 contiguous; positions: (B, T) or (T,)
int64, or None for 0 .. T-1. A position outside the tables gives NaN. A program takes a few tokens and all their heads,
so that the angles are loaded once.
"""

import torch
import triton
import triton.language as tl

from . import device

# (pairs of a tile, warps)
TILES = {
    "sm_90": (2048, 4),
    "sm_80": (2048, 4),
    "sm_86": (2048, 4),
    device.INTERPRETER: (16384, 4),
}


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, x_offset, out_offset, x_stride_h, num_heads, cos, sin, token_mask,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    for start in range(0, num_heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)[None, :, None]
        mask = token_mask & (head < num_heads)
        x_head = x_ptr + (x_offset + head.to(tl.int64) * x_stride_h)
        out_head = out_ptr + (out_offset + head * D)
        if INTERLEAVED:
            i = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
            x = tl.load(x_head + i, mask=mask & (i < R), other=0.0).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(x, (BLOCK_T, BLOCK_H, BLOCK_HALF, 2)))
            pairs = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
            rotated = tl.reshape(pairs, (BLOCK_T, BLOCK_H, 2 * BLOCK_HALF))
            tl.store(out_head + i, rotated.to(out_ptr.dtype.element_ty), mask=mask & (i < R))
        else:
            i = tl.arange(0, BLOCK_HALF)[None, None, :]
            half_mask = mask & (i < R // 2)
            x1 = tl.load(x_head + i, mask=half_mask, other=0.0).to(tl.float32)
            x2 = tl.load(x_head + (i + R // 2), mask=half_mask, other=0.0).to(tl.float32)
            tl.store(out_head + i, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=half_mask)
            tl.store(out_head + (i + R // 2), (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=half_mask)
        if D > R:
            i = R + tl.arange(0, BLOCK_REST)[None, None, :]
            rest = tl.load(x_head + i, mask=mask & (i < D), other=0.0)
            tl.store(out_head + i, rest, mask=mask & (i < D))


@triton.jit(do_not_specialize=["tokens", "T", "H", "K", "T_max"])
def apply_rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, tokens, T, H, K, T_max,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, position_stride_b, position_stride_t,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    token_mask = token < tokens
    b = token // T
    t = token % T
    if positions_ptr is not None:
        position = tl.load(positions_ptr + b * position_stride_b + t * position_stride_t, mask=token_mask, other=0)
    else:
        position = t
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    known = token_mask & (position >= 0) & (position < T_max) & (pair < R // 2)
    cos = tl.load(cos_ptr + position * (R // 2) + pair, mask=known, other=float("nan"))
    sin = tl.load(sin_ptr + position * (R // 2) + pair, mask=known, other=float("nan"))
    if INVERSE:
        sin = -sin
    _rotate_heads(
        q_ptr, q_out_ptr, b * q_stride_b + t * q_stride_t, token * H * D, q_stride_h, H, cos, sin, token_mask,
        D, R, INTERLEAVED, BLOCK_T, BLOCK_H, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _rotate_heads(
        k_ptr, k_out_ptr, b * k_stride_b + t * k_stride_t, token * K * D, k_stride_h, K, cos, sin, token_mask,
        D, R, INTERLEAVED, BLOCK_T, BLOCK_K, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


def apply_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rotated q and k, contiguous."""
    B, T, H, D = q.shape
    K, R = k.shape[2], 2 * cos.shape[1]
    q_out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    k_out = torch.empty((B, T, K, D), dtype=k.dtype, device=k.device)
    if B * T * (H + K) * D == 0:
        return q_out, k_out
    position_strides = (0, 0)
    if positions is not None:
        position_strides = (0 if positions.dim() == 1 else positions.stride(0), positions.stride(-1))
    pairs, warps = TILES[device.architecture(q.device)]
    block_half = triton.next_power_of_2(max(R // 2, 1))
    block_h = min(triton.next_power_of_2(max(H, 1)), max(pairs // block_half, 1))
    block_t = min(max(pairs // (block_half * block_h), 1), triton.next_power_of_2(B * T))
    with device.current(q.device):
        apply_rotary_kernel[(triton.cdiv(B * T, block_t),)](
            q, k, q_out, k_out, cos, sin, positions, B * T, T, H, K, cos.shape[0],
            *q.stride()[:3], *k.stride()[:3], *position_strides,
            D=D, R=R, INTERLEAVED=interleaved, INVERSE=inverse, BLOCK_T=block_t, BLOCK_H=block_h,
            BLOCK_K=min(triton.next_power_of_2(max(K, 1)), block_h), BLOCK_HALF=block_half,
            BLOCK_REST=triton.next_power_of_2(max(D - R, 1)), num_warps=warps,
        )  # fmt: skip
    return q_out, k_out
