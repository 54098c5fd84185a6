"""swiglu: y = silu(gate) * up, with silu(g) = g * sigmoid(g).

Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202).
Backward, with p = sigmoid(gate):   dgate = dy * up * p * (1 + gate * (1 - p))      dup = dy * gate * p
Saved: the two inputs; p is computed again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.ops import _checks, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public

OP = Op("swiglu", kernels=("triton", "cpu"))


def reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@public(reference)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation silu(gate) * up (Shazeer, 2020), computed in float32.

    Args:
        gate: any shape, float32, bfloat16 or float16 (float64 on the torch backend).
        up: gate's shape and dtype. Halves of one tensor, split on its last dimension, are read in place.

    Returns:
        gate's shape and dtype.

    Raises:
        ValueError: different shapes or devices. TypeError: a dtype that is not allowed.
    """
    _checks.floating("swiglu", "gate", gate)
    _checks.floating("swiglu", "up", up)
    _checks.shape("swiglu", "up", up, "gate's shape", gate.shape)
    _checks.like("swiglu", "up", up, "gate", gate)
    return _swiglu(gate, up, resolve("swiglu", gate))


def _rows(x: Tensor) -> Tensor:
    return _native.rows(x) if x.dim() else x.view(1, 1)


def _forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    if backend == "torch":
        wide = gate.dtype if gate.dtype == torch.float64 else torch.float32
        return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype).contiguous()
    gate_RC, up_RC = _rows(gate), _rows(up)
    if backend == "triton":
        from llmcore.kernels import swiglu as kernel

        return kernel.swiglu_fwd(gate_RC, up_RC).view(gate.shape)
    y = _native.empty_like(gate)
    _native.module(backend).swiglu_fwd(
        gate_RC.data_ptr(), up_RC.data_ptr(), y.data_ptr(), *gate_RC.shape, gate_RC.stride(0), up_RC.stride(0),
        _native.code(gate), *_native.stream(backend, gate),
    )  # fmt: skip
    return y


def _fake(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return _native.empty_like(gate)


def _backward(dy: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        wide = gate.dtype if gate.dtype == torch.float64 else torch.float32
        dy_w, gate_w, up_w = dy.to(wide), gate.to(wide), up.to(wide)
        p = torch.sigmoid(gate_w)
        dgate = dy_w * up_w * p * (1 + gate_w * (1 - p))
        return dgate.to(gate.dtype).contiguous(), (dy_w * gate_w * p).to(up.dtype).contiguous()
    dy_RC, gate_RC, up_RC = _rows(dy), _rows(gate), _rows(up)
    if backend == "triton":
        from llmcore.kernels import swiglu as kernel

        dgate, dup = kernel.swiglu_bwd(dy_RC, gate_RC, up_RC)
        return dgate.view(gate.shape), dup.view(gate.shape)
    dgate, dup = _native.empty_like(gate), _native.empty_like(gate)
    _native.module(backend).swiglu_bwd(
        dy_RC.data_ptr(), gate_RC.data_ptr(), up_RC.data_ptr(), dgate.data_ptr(), dup.data_ptr(), *gate_RC.shape,
        dy_RC.stride(0), gate_RC.stride(0), up_RC.stride(0), _native.code(gate), *_native.stream(backend, gate),
    )  # fmt: skip
    return dgate, dup


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _fake(gate, up, backend), _fake(gate, up, backend)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    return (*_swiglu_backward(dy, *ctx.saved_tensors, ctx.backend), None)


_swiglu = operator("swiglu(Tensor gate, Tensor up, str backend) -> Tensor", _forward, _fake, _save, _differentiate)
_swiglu_backward = operator(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, str backend) -> (Tensor dgate, Tensor dup)",
    _backward,
    _backward_fake,
)
