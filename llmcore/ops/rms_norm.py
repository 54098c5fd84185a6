"""rms_norm: y = s / sqrt(mean(s^2) + eps) * (weight + weight_offset), with s = x + residual.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467).
Backward, with g = dy * (weight + weight_offset), r = 1 / sqrt(mean(s^2) + eps) and n = s * r:
    ds_total = r * (g - n * mean(g * n)) + ds        dweight = sum over rows of dy * n
x and residual receive the same gradient. Saved: s (or x), weight, and r, one float per row.

R rows, C channels.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llmcore.ops import _checks, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public

OP = Op(
    "rms_norm",
    kernels=("triton", "cuda", "cpu"),
    opt_in={"cuda": "proven thread by thread on a CPU, not yet run on a GPU"},
)

Result = Tensor | tuple[Tensor, Tensor]


def _computing_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Result:
    s = x if residual is None else x + residual
    s_wide = s.to(_computing_dtype(s.dtype))
    y = s_wide * torch.rsqrt(s_wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    y = y.to(x.dtype)
    return y if residual is None else (y, s)


@public(reference)
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Result:
    """Root-mean-square normalisation of the last dimension (Zhang and Sennrich, 2019), residual addition fused.

    Args:
        x: (..., C), float32, bfloat16 or float16 (float64 on the torch backend).
        weight: (C,), any of these dtypes, or None for no scaling.
        eps: added to the mean of squares.
        residual: x's shape; s = x + residual is computed in the promoted dtype and rounded to it.
        weight_offset: added to the weight; 1.0 is Gemma's convention.

    Returns:
        y (..., C) in x's dtype; with a residual (y, s), y computed from the returned s.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not floating point.
    """
    _checks.floating("rms_norm", "x", x)
    if x.dim() == 0:
        raise ValueError("rms_norm: x must be (..., C), but its shape is ().")
    if weight is not None:
        _checks.floating("rms_norm", "weight", weight)
        _checks.shape("rms_norm", "weight", weight, "(C,)", x.shape[-1:])
        _checks.like("rms_norm", "weight", weight, "x", x, dtype=False)
    if residual is not None:
        _checks.floating("rms_norm", "residual", residual)
        _checks.shape("rms_norm", "residual", residual, "x's shape", x.shape)
        _checks.like("rms_norm", "residual", residual, "x", x, dtype=False)
    for name, other in (("weight", weight), ("residual", residual)):
        if other is not None and other.dtype == torch.float64 and x.dtype != torch.float64:
            raise TypeError(
                f"rms_norm: {name} has dtype float64, but x has {_checks.name_of(x.dtype)}; "
                f"float64 is allowed only with a float64 x."
            )
    _checks.number("rms_norm", "eps", eps)
    _checks.number("rms_norm", "weight_offset", weight_offset)
    y, s, _ = _rms_norm(x, weight, residual, eps, weight_offset, resolve("rms_norm", x))
    return y if residual is None else (y, s)


def _forward(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_offset: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        return _forward_torch(x, weight, residual, eps, weight_offset)
    if backend != "triton":
        return _forward_native(x, weight, residual, eps, weight_offset, backend)
    from llmcore.kernels import rms_norm as kernel

    residual_RC = None if residual is None else _native.rows(residual)
    y, s, rstd = kernel.rms_norm_fwd(_native.rows(x), weight, residual_RC, eps, weight_offset)
    return y.view(x.shape), x.new_empty(0) if s is None else s.view(x.shape), rstd


def _forward_torch(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    s = x if residual is None else (x + residual).contiguous()
    y = reference(s, weight, eps, weight_offset=weight_offset)
    assert isinstance(y, Tensor)
    s_wide = s.to(_computing_dtype(s.dtype))
    rstd = torch.rsqrt(s_wide.square().mean(-1) + eps).flatten()
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else s, rstd


def _forward_native(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_offset: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    x_RC = _native.rows(x)
    R, C = x_RC.shape
    residual_RC = None if residual is None else _native.rows(residual)
    y, s = _native.empty_like(x), _s_like(x, residual)
    rstd = x.new_empty(R, dtype=torch.float32)
    weight = None if weight is None else weight.contiguous()
    _native.module(backend).rms_norm_fwd(
        x_RC.data_ptr(), _native.ptr(residual_RC), _native.ptr(weight), y.data_ptr(), s.data_ptr(), rstd.data_ptr(), R,
        C, x_RC.stride(0), 0 if residual_RC is None else residual_RC.stride(0), eps, weight_offset,
        _native.code(x), _native.code(x if residual is None else residual), _native.code(weight),
        *_native.stream(backend, x),
    )  # fmt: skip
    return y, s, rstd


def _s_like(x: Tensor, residual: Tensor | None) -> Tensor:
    """Memory for s; no elements without a residual."""
    if residual is None:
        return x.new_empty(0)
    if residual.dtype == x.dtype:
        return _native.empty_like(x)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


def _fake(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_offset: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    s = _s_like(x, residual)
    return _native.empty_like(x), s, x.new_empty(math.prod(x.shape[:-1]), dtype=_computing_dtype(s.dtype))


def _backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = s.shape
    dy, s = _native.rows(dy), _native.rows(s)
    ds = None if ds is None else _native.rows(ds)
    need_dweight = need_dweight and weight is not None
    other_dtype = None if residual_dtype == x_dtype else residual_dtype
    args = (dy, ds, s, weight, rstd, weight_offset, x_dtype, other_dtype, need_dweight)
    if backend == "torch":
        dx, dresidual, dweight = _backward_torch(*args)
    elif backend == "triton":
        from llmcore.kernels import rms_norm as kernel

        dx, dresidual, dweight = kernel.rms_norm_bwd(*args)
    else:
        dx, dresidual, dweight = _backward_native(*args, backend)
    return (
        dx.view(shape),
        dx.new_empty(0) if dresidual is None else dresidual.view(shape),
        dx.new_empty(0) if dweight is None else dweight,
    )


def _backward_torch(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    need_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dy_wide, rstd_R1 = dy.to(rstd.dtype), rstd[:, None]
    normed = s.to(rstd.dtype) * rstd_R1
    g = dy_wide if weight is None else dy_wide * (weight.to(rstd.dtype) + weight_offset)
    total = rstd_R1 * (g - normed * (g * normed).mean(-1, keepdim=True))
    if ds is not None:
        total = total + ds
    dweight = (dy_wide * normed).sum(0).to(weight.dtype) if need_dweight and weight is not None else None
    dresidual = None if residual_dtype is None else total.to(residual_dtype, copy=True)
    return total.to(x_dtype).contiguous(), dresidual, dweight


def _backward_native(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    R, C = s.shape
    dx = s.new_empty((R, C), dtype=x_dtype)
    dresidual = None if residual_dtype is None else s.new_empty((R, C), dtype=residual_dtype)
    weight = None if weight is None else weight.contiguous()
    dweight = torch.empty_like(weight) if need_dweight and weight is not None else None
    _native.module(backend).rms_norm_bwd(
        dy.data_ptr(), _native.ptr(ds), s.data_ptr(), _native.ptr(weight), rstd.data_ptr(), dx.data_ptr(),
        _native.ptr(dresidual), _native.ptr(dweight), R, C, dy.stride(0), 0 if ds is None else ds.stride(0),
        s.stride(0), weight_offset, _native.code(dx), _native.code(s),
        _native.code(dx if dresidual is None else dresidual), _native.code(weight), *_native.stream(backend, s),
    )  # fmt: skip
    return dx, dresidual, dweight


def _backward_fake(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = s.new_empty(s.shape, dtype=x_dtype)
    dresidual = dx.new_empty(0)
    if residual_dtype is not None and residual_dtype != x_dtype:
        dresidual = s.new_empty(s.shape, dtype=residual_dtype)
    dweight = dx.new_empty(0)
    if need_dweight and weight is not None:
        dweight = _native.empty_like(weight)
    return dx, dresidual, dweight


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, residual, _, ctx.weight_offset, ctx.backend = inputs
    _, s, rstd = outputs
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else s, weight, rstd)
    ctx.mark_non_differentiable(rstd, *((s,) if residual is None else ()))


def _differentiate(ctx: Any, dy: Tensor | None, ds: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    s, weight, rstd = ctx.saved_tensors
    same = ctx.residual_dtype in (None, ctx.x_dtype)
    if dy is None:
        if ds is None:
            return (None,) * 6
        dx = ds.to(ctx.x_dtype)
        return dx, None, None if ctx.residual_dtype is None else ds.to(ctx.residual_dtype), None, None, None
    dx, dresidual, dweight = _rms_norm_backward(
        dy,
        ds,
        s,
        weight,
        rstd,
        ctx.weight_offset,
        ctx.x_dtype,
        ctx.residual_dtype,
        ctx.needs_input_grad[1],
        ctx.backend,
    )
    return (
        dx,
        dweight if ctx.needs_input_grad[1] else None,
        (dx if same else dresidual) if ctx.needs_input_grad[2] else None,
        None,
        None,
        None,
    )


_rms_norm = operator(
    "rms_norm(Tensor x, Tensor? weight, Tensor? residual, float eps, float weight_offset, str backend)"
    " -> (Tensor y, Tensor s, Tensor rstd)",
    _forward,
    _fake,
    _save,
    _differentiate,
)
_rms_norm_backward = operator(
    "rms_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor rstd, float weight_offset,"
    " ScalarType x_dtype, ScalarType? residual_dtype, bool need_dweight, str backend)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight)",
    _backward,
    _backward_fake,
)
