"""fused_swiglu: y = silu(x @ w_gate.T) * (x @ w_up.T), the first half of a gated feed-forward, in one pass over x.

Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202).
Backward, with gate and up the two products:   (dgate, dup) = swiglu's gradient of dy
    dx = dgate @ w_gate + dup @ w_up        dw_gate = dgate.T @ x        dw_up = dup.T @ x
Saved: the inputs, gate and up.

M rows, C width, F inner width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.ops import _checks, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public
from llmcore.ops.swiglu import _swiglu, _swiglu_backward

# On the CPU PyTorch multiplies, and swiglu's kernels do the rest.
OP = Op("fused_swiglu", kernels=("triton", "cpu"), parts=("swiglu",))


def reference(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)


@public(reference)
def fused_swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """Both products of a SwiGLU layer with the activation in their epilogue. Sums are taken in float32.

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


def _outputs(x: Tensor, w_gate: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, and gate and up (M, F), or nothing."""
    inner, rows = w_gate.shape[0], math.prod(x.shape[:-1])
    kept = (rows, inner) if keep else (0,)
    return x.new_empty((*x.shape[:-1], inner)), x.new_empty(kept), x.new_empty(kept)


def _forward(x: Tensor, w_gate: Tensor, w_up: Tensor, keep: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, inner = _native.rows(x), w_gate.shape[0]
    if backend == "triton":
        y, gate, up = _outputs(x, w_gate, keep)
        if y.numel():
            from llmcore.kernels import fused_swiglu as kernel

            kept = (gate, up) if keep else (None, None)
            kernel.fused_swiglu_fwd(rows, w_gate, w_up, kept[0], kept[1], y.view(-1, inner))
        return y, gate, up
    with torch.autocast(x.device.type, enabled=False):
        gate, up = rows @ w_gate.T, rows @ w_up.T
    y = _swiglu(gate, up, backend).view(*x.shape[:-1], inner)
    return (y, gate, up) if keep else (y, gate.new_empty(0), up.new_empty(0))


def _fake(x: Tensor, w_gate: Tensor, w_up: Tensor, keep: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, w_gate, keep)


def _backward(
    dy: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, gate: Tensor, up: Tensor, needed: Sequence[bool], backend: str
) -> tuple[Tensor, ...]:
    rows, nothing = _native.rows(x), x.new_empty
    need_dx, need_dw_gate, need_dw_up = needed
    dgate, dup = _swiglu_backward(dy.reshape(gate.shape), gate, up, backend)
    with torch.autocast(x.device.type, enabled=False):
        return (
            torch.addmm(dgate @ w_gate, dup, w_up).view(x.shape) if need_dx else nothing(0),
            dgate.T @ rows if need_dw_gate else nothing(0),
            dup.T @ rows if need_dw_up else nothing(0),
        )


def _backward_fake(
    dy: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, gate: Tensor, up: Tensor, needed: Sequence[bool], backend: str
) -> tuple[Tensor, ...]:
    return _native.gradients(needed, x, w_gate, w_up)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w_gate, w_up, keep, ctx.backend = inputs
    if not keep:
        raise RuntimeError("fused_swiglu: a gradient is asked for, but keep is false; call llmcore.ops.fused_swiglu.")
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(x, w_gate, w_up, *outputs[1:])


def _differentiate(ctx: Any, dy: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    needed = ctx.needs_input_grad[:3]
    gradients = _fused_swiglu_backward(dy, *ctx.saved_tensors, needed, ctx.backend)
    return *_native.only(needed, gradients), None, None


_fused_swiglu = operator(
    "fused_swiglu(Tensor x, Tensor w_gate, Tensor w_up, bool keep, str backend) -> (Tensor y, Tensor gate, Tensor up)",
    _forward,
    _fake,
    _save,
    _differentiate,
)
_fused_swiglu_backward = operator(
    "fused_swiglu_backward(Tensor dy, Tensor x, Tensor w_gate, Tensor w_up, Tensor gate, Tensor up, "
    "bool[3] needed, str backend) -> (Tensor dx, Tensor dw_gate, Tensor dw_up)",
    _backward,
    _backward_fake,
)
