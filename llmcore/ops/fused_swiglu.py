"""fused_swiglu: y = silu(x @ w_gate.T) * (x @ w_up.T), the first half of a gated feed-forward, in one pass over x.

Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202).
Backward, with (gate, up) = h the two products:   (dgate, dup) = swiglu's gradient of dy
    dx = dgate @ w_gate + dup @ w_up        dw_gate = dgate.T @ x        dw_up = dup.T @ x
Saved: the inputs and h; y, which is a third as large as both, is not needed.

M rows, C width, F inner width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.ops import _checks, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public
from llmcore.ops.swiglu import _swiglu, _swiglu_backward

OP = Op("fused_swiglu", kernels=("triton",))


def reference(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)


@public(reference)
def fused_swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """Both products of a SwiGLU layer with the activation in their epilogue. Sums are taken in float32.

    Where there is no kernel, as on the CPU, it is PyTorch's products and activation; `ops.swiglu` after two products is
    then the faster way.

    Args:
        x: (..., C), float32, bfloat16 or float16 (float64 on the torch backend).
        w_gate, w_up: (F, C), x's dtype.

    Under autocast all three are cast to its dtype.

    Returns:
        (..., F) in x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: a dtype that is not allowed.
    """
    for name, tensor in (("x", x), ("w_gate", w_gate), ("w_up", w_up)):
        _checks.floating("fused_swiglu", name, tensor)
    if x.dim() == 0:
        raise ValueError("fused_swiglu: x must be (..., C), but its shape is ().")
    _checks.rank("fused_swiglu", "w_gate", w_gate, "(F, C)", 2)
    x, w_gate, w_up = _checks.autocast(x, w_gate, w_up)
    _checks.shape("fused_swiglu", "w_gate", w_gate, "(F, C) with x's C", (w_gate.shape[0], x.shape[-1]))
    _checks.shape("fused_swiglu", "w_up", w_up, "w_gate's shape, (F, C)", tuple(w_gate.shape))
    for name, tensor in (("w_gate", w_gate), ("w_up", w_up)):
        _checks.like("fused_swiglu", name, tensor, "x", x)
    keep = torch.is_grad_enabled() and (x.requires_grad or w_gate.requires_grad or w_up.requires_grad)
    return _fused_swiglu(x, w_gate, w_up, keep, resolve("fused_swiglu", x))[0]


def _outputs(x: Tensor, w_gate: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """y, and h (M, 2F), the gate's columns first, or nothing."""
    inner, rows = w_gate.shape[0], math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], inner)), x.new_empty((rows, 2 * inner) if keep else (0,))


def _forward(x: Tensor, w_gate: Tensor, w_up: Tensor, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
    y, h = _outputs(x, w_gate, keep)
    if y.numel() == 0:
        return y, h
    inner, rows = w_gate.shape[0], _native.rows(x)
    if backend == "triton":
        from llmcore.kernels import fused_swiglu as kernel

        kernel.fused_swiglu_fwd(rows, w_gate, w_up, h if keep else None, y.view(-1, inner))
        return y, h
    if not keep:
        h = x.new_empty(len(rows), 2 * inner)
    with torch.autocast(x.device.type, enabled=False):
        torch.mm(rows, w_gate.T, out=h[:, :inner])
        torch.mm(rows, w_up.T, out=h[:, inner:])
    y = _swiglu(h[:, :inner], h[:, inner:], backend).view(y.shape)
    return y, h if keep else h.new_empty(0)


def _fake(x: Tensor, w_gate: Tensor, w_up: Tensor, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _outputs(x, w_gate, keep)


def _backward(
    dy: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, h: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    inner = w_gate.shape[0]
    dx, dw_gate, dw_up = _backward_fake(dy, x, w_gate, w_up, h, backend)
    if h.numel() == 0 or x.shape[-1] == 0:
        return dx.zero_(), dw_gate.zero_(), dw_up.zero_()
    rows, dx_rows = _native.rows(x), dx.view(-1, x.shape[-1])
    dgate, dup = _swiglu_backward(_native.rows(dy), h[:, :inner], h[:, inner:], backend)
    with torch.autocast(x.device.type, enabled=False):
        torch.mm(dgate, w_gate, out=dx_rows)
        dx_rows.addmm_(dup, w_up)
        torch.mm(dgate.T, rows, out=dw_gate)
        torch.mm(dup.T, rows, out=dw_up)
    return dx, dw_gate, dw_up


def _backward_fake(
    dy: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, h: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _native.empty_like(x), _native.empty_like(w_gate), _native.empty_like(w_up)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    x, w_gate, w_up, keep, ctx.backend = inputs
    if not keep:
        raise RuntimeError("fused_swiglu: a gradient is asked for, but keep is false; call llmcore.ops.fused_swiglu.")
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(x, w_gate, w_up, outputs[1])


def _differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    return *_fused_swiglu_backward(dy, *ctx.saved_tensors, ctx.backend), None, None


_fused_swiglu = operator(
    "fused_swiglu(Tensor x, Tensor w_gate, Tensor w_up, bool keep, str backend) -> (Tensor y, Tensor h)",
    _forward,
    _fake,
    _save,
    _differentiate,
)
_fused_swiglu_backward = operator(
    "fused_swiglu_backward(Tensor dy, Tensor x, Tensor w_gate, Tensor w_up, Tensor h, str backend) -> "
    "(Tensor dx, Tensor dw_gate, Tensor dw_up)",
    _backward,
    _backward_fake,
)
