"""The recipe every op follows to become a PyTorch operator.

`operator` defines `llmcore::name` with its implementation and its shape function; `differentiable` registers the
backward on the Autograd key. An `autograd.Function` registered there by hand costs less per
eager call than `torch.library.register_autograd` (forward 0.6 of it, forward and backward 0.75, on one Zen 3 core) and
passes the same opcheck and fullgraph tests.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

# Below view tracking as well: implementations return views of what they allocate, and callers may write into results.
_below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
_namespace: Any = torch.ops.llmcore
# A second import finds the first one's registrations alive and goes on using them.
if not hasattr(_namespace, "_library"):
    _namespace._library = torch.library.Library("llmcore", "FRAGMENT")
_library: torch.library.Library = _namespace._library


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def operator(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines `llmcore::<schema>` (positional arguments only) and returns the operator to call.

    impl runs on every device; fake gives outputs of the same shape, dtype and strides from tensors without data.
    """
    name = schema[: schema.index("(")]
    if not hasattr(_namespace, name):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llmcore::{name}", fake, lib=_library)
    return getattr(_namespace, name).default


def differentiable(op: Any, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives `op` a backward. `save(ctx, inputs, outputs)` keeps what it needs; `backward(ctx, *grads)` returns one
    gradient (or None) for each argument of `op`. Gradients that nothing asked for arrive as None."""
    name = op._schema.name.split("::")[1]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"llmcore::{name}", "Autograd"):
        return

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with _below_autograd():
                outputs = op(*args)
            ctx.set_materialize_grads(False)
            save(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name} cannot be differentiated twice; call backward or grad without create_graph, "
                    f"or use llmcore.ops.{name}.reference."
                )
            return backward(ctx, *grads)

    Function.__name__ = Function.__qualname__ = name

    def autograd_kernel(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(a) for a in args):
            raise RuntimeError(f"{name} has no forward-mode derivative; use llmcore.ops.{name}.reference.")
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return Function.apply(*args)
        with _below_autograd():
            return op(*args)

    _library.impl(name, autograd_kernel, "Autograd")


class OpFunction(Protocol[P, R_co]):
    """A public op: call it, or call its `.reference`, the plain-PyTorch definition with the same arguments."""

    reference: Callable[P, Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def public(reference: Callable[P, Any]) -> Callable[[Callable[P, R]], OpFunction[P, R]]:
    """Decorates an op's public function with its reference."""

    def attach(function: Callable[P, R]) -> OpFunction[P, R]:
        function.reference = reference  # type: ignore[attr-defined]
        return cast(OpFunction[P, R], function)

    return attach
