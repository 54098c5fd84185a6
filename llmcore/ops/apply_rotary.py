"""apply_rotary: rotates pairs of channels of q and k by an angle that grows with the position.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021 (arXiv:2104.09864).
For a pair (a, b) at position p with angle t(p):   a' = a cos t - b sin t      b' = b cos t + a sin t
Pairs are (i, i + R/2) (the layout of Llama's published weights in Hugging Face form) or, interleaved, (2i, 2i + 1).
The backward is the inverse rotation of the gradients: nothing but the tables is saved.

B batch, T time, H query heads, K key heads, D head size, R rotated channels (R <= D, even).
"""

import os
from typing import Any

import torch
from torch import Tensor

from llmcore.ops import _checks, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public

OP = Op("apply_rotary", kernels=("triton", "cpu"))

_CHECK_VALUES_ON_CUDA = os.environ.get("LLMCORE_CHECK") == "1"


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: (B, T, H, D); cos, sin: (B or 1, T, 1, R/2) in the computing dtype."""
    R = 2 * cos.shape[-1]
    wide = x[..., :R].to(cos.dtype)
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., : R // 2], wide[..., R // 2 :])
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((rotated.to(x.dtype), x[..., R:]), -1)


def reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if positions is None:
        cos_T, sin_T = cos[: q.shape[1]], sin[: q.shape[1]]
    else:
        cos_T, sin_T = cos[positions], sin[positions]
    if cos_T.dim() == 2:
        cos_T, sin_T = cos_T[None], sin_T[None]
    cos_T, sin_T = cos_T[:, :, None].to(wide), sin_T[:, :, None].to(wide)
    return _rotate(q, cos_T, sin_T, interleaved), _rotate(k, cos_T, sin_T, interleaved)


@public(reference)
def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys (Su et al., 2021).

    Args:
        q: (B, T, H, D), float32, bfloat16 or float16 (float64 on the torch backend).
        k: (B, T, K, D), q's dtype.
        cos, sin: (T_max, R/2), the tables of the angles' cosine and sine; R <= D channels are rotated, the rest copied.
            They get no gradient.
        positions: (B, T) or (T,), int32 or int64, in [0, T_max); None means 0 .. T-1. Values are checked on the CPU;
            on CUDA only with LLMCORE_CHECK=1.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + R/2).

    Returns:
        (q, k) rotated, new tensors of the same shapes and dtype.

    Raises:
        ValueError: shapes, devices or positions that do not fit.
        TypeError: a dtype that is not allowed.
    """
    _checks.floating("apply_rotary", "q", q)
    _checks.floating("apply_rotary", "k", k)
    _checks.rank("apply_rotary", "q", q, "(B, T, H, D)", 4)
    _checks.rank("apply_rotary", "k", k, "(B, T, K, D)", 4)
    _checks.like("apply_rotary", "k", k, "q", q)
    B, T, _, D = q.shape
    _checks.shape("apply_rotary", "k", k, "(B, T, K, D)", (B, T, k.shape[2], D))
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.floating("apply_rotary", name, table)
        _checks.rank("apply_rotary", name, table, "(T_max, R/2)", 2)
        _checks.like("apply_rotary", name, table, "q", q, dtype=False)
    T_max, columns = cos.shape
    _checks.shape("apply_rotary", "sin", sin, "cos's shape", (T_max, columns))
    if 2 * columns > D:
        raise ValueError(
            f"apply_rotary: cos has {columns} columns, which rotate {2 * columns} channels, "
            f"but the head size is {D}; at most {D // 2} columns are allowed."
        )
    if positions is None:
        if T > T_max:
            raise ValueError(f"apply_rotary: q has {T} positions, but cos has only {T_max} rows.")
    else:
        _checks.is_tensor("apply_rotary", "positions", positions)
        if positions.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"apply_rotary: positions has dtype {_checks.name_of(positions.dtype)}; allowed: int64, int32."
            )
        if tuple(positions.shape) not in ((B, T), (T,)):
            raise ValueError(
                f"apply_rotary: positions must be (B, T) = {(B, T)} or (T,) = {(T,)}, "
                f"but its shape is {tuple(positions.shape)}."
            )
        _checks.like("apply_rotary", "positions", positions, "q", q, dtype=False)
    if cos.requires_grad or sin.requires_grad:
        cos, sin = cos.detach(), sin.detach()
    return _apply_rotary(q, k, cos, sin, positions, interleaved, False, resolve("apply_rotary", q))


def _check_positions(positions: Tensor, limit: int) -> None:
    if positions.numel() == 0 or not (positions.device.type == "cpu" or _CHECK_VALUES_ON_CUDA):
        return
    low, high = (int(v) for v in torch.aminmax(positions))
    if low < 0 or high >= limit:
        raise ValueError(f"apply_rotary: positions lie in [{low}, {high}], but cos has rows 0 to {limit - 1}.")


def _rotated(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if positions is not None:
        _check_positions(positions, cos.shape[0])
        positions = positions.long()
    if backend == "torch":
        sin = -sin if inverse else sin
        q_out, k_out = reference(q, k, cos, sin, positions=positions, interleaved=interleaved)
        return q_out.contiguous(), k_out.contiguous()
    q, k = _native.unit_stride(q), _native.unit_stride(k)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    if backend == "triton":
        from llmcore.kernels import apply_rotary as kernel

        return kernel.apply_rotary(q, k, cos, sin, positions, interleaved, inverse)
    q_out, k_out = _native.empty_like(q), _native.empty_like(k)
    pos_b, pos_t = (
        (0, 0) if positions is None else (0 if positions.dim() == 1 else positions.stride(0), positions.stride(-1))
    )
    _native.module(backend).apply_rotary(
        q.data_ptr(), k.data_ptr(), q_out.data_ptr(), k_out.data_ptr(), cos.data_ptr(), sin.data_ptr(),
        _native.ptr(positions), q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3], 2 * cos.shape[1],
        *q.stride()[:3], *k.stride()[:3], pos_b, pos_t, interleaved, inverse, _native.code(q),
        *_native.stream(backend, q),
    )  # fmt: skip
    return q_out, k_out


def _fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _native.empty_like(q), _native.empty_like(k)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, positions, ctx.interleaved, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin, positions)


def _differentiate(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    given = dq if dq is not None else dk
    if given is None:
        return (None,) * 8
    # A missing gradient stands for a tensor of no heads.
    none = given[:, :, :0]
    q_grad, k_grad = _apply_rotary(
        none if dq is None else dq, none if dk is None else dk, cos, sin, positions, ctx.interleaved, not ctx.inverse,
        ctx.backend,
    )  # fmt: skip
    return (None if dq is None else q_grad, None if dk is None else k_grad, None, None, None, None, None, None)


_apply_rotary = operator(
    "apply_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse,"
    " str backend) -> (Tensor q_out, Tensor k_out)",
    _rotated,
    _fake,
    _save,
    _differentiate,
)
