"""The recipe every op follows to become a PyTorch operator.

`operator` defines `llmcore::name` with its implementation, its shape function and its backward, and returns the
function that the op calls. Eager calls are short: where nothing but autograd could take an interest in a call, it goes
to the implementation without PyTorch's dispatcher, whose way through Python kernels costs as much as a small kernel.
Whoever listens (torch.compile, fake tensors, modes, transforms, tensor subclasses, the profiler) meets the operator.
The backward is an `autograd.Function` on the Autograd key, which costs less per call than
`torch.library.register_autograd` and passes the same opcheck and fullgraph tests (`python -m bench overhead`).
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
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _observed(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether something other than autograd must see a call with these tensors, so that it has to be dispatched."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return True
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta):
            return True
    return False


def _autograd_excluded() -> bool:
    """Inside another operator's implementation: its own backward answers for what is called here."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def operator(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines `llmcore::<schema>` and returns the function to call: positional arguments only, tensors first.

    Args:
        impl: runs on every device.
        fake: gives outputs of the same shape, dtype and strides from tensors without data.
        save: `save(ctx, inputs, outputs)` keeps what the backward needs.
        backward: `backward(ctx, *grads)` returns one gradient (or None) for each argument. Gradients that nothing asked
            for arrive as None. Without it, no gradient flows.
    """
    name = schema[: schema.index("(")]
    first = not hasattr(_namespace, name)
    if first:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llmcore::{name}", fake, lib=_library)
    op = getattr(_namespace, name).default
    tensors = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)
    direct = _without_autograd(impl)
    if save is not None and backward is not None:
        if first:
            _library.impl(name, _differentiable(name, tensors, _without_autograd(op), save, backward), "Autograd")
        direct = _differentiable(name, tensors, direct, save, backward)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _observed(args[:tensors]) or _autograd_excluded():
            return op(*args)
        return direct(*args)

    return call


def _without_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with _below_autograd():
            return function(*args)

    return call


def _differentiable(
    name: str, tensors: int, compute: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`compute`, whose first arguments are `tensors` tensors, with this backward where a gradient is asked for."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = compute(*args)
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

    def differentiable(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(tensor) for tensor in args[:tensors]):
            raise RuntimeError(f"{name} has no forward-mode derivative; use llmcore.ops.{name}.reference.")
        if torch.is_grad_enabled():
            for tensor in args[:tensors]:
                if tensor is not None and tensor.requires_grad:
                    return Function.apply(*args)
        return compute(*args)

    return differentiable


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
