"""How llmcore decides that a kernel is right: one rule, for tests and benchmarks alike.

Each output and each gradient is compared with the float64 reference on the same inputs. The allowed error is not a
number someone chose but what plain PyTorch makes in the same dtype: with e the exact value, p plain PyTorch's and a the
kernel's, and with s the largest value among the inputs, the outputs, their cotangents
and the gradient itself,
    |a - e| <= 2 max|p - e| + 2 ulp(e) + 4 eps32 s   for every element,
    rms(a - e) <= 2 rms(p - e) + (ulp(rms(e)) + eps32 s) (1/2 + 2 / sqrt(n)), of n elements.
The last term, a few units of float32, is what is left where terms of size s cancel: kernels accumulate in float32, and
no order of summation is owed the luck of another's. For the same reason few elements are allowed a larger share of it.
Outputs that are no floating-point numbers are compared exactly.
Outputs are filled with NaN, or the largest integer, before a kernel runs, so that an element it forgets is seen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Errors of one output or gradient: the kernel's and the allowed, worst element and root mean square."""

    name: str
    worst: float
    worst_allowed: float
    rms: float
    rms_allowed: float

    @property
    def ok(self) -> bool:
        return self.worst <= self.worst_allowed and self.rms <= self.rms_allowed

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        return (
            f"{self.name}: {verdict}, worst error {self.worst:.3g} (allowed {self.worst_allowed:.3g}), "
            f"rms {self.rms:.3g} (allowed {self.rms_allowed:.3g})"
        )


def compare(name: str, actual: Tensor, plain: Tensor, exact: Tensor, scale: float) -> Comparison:
    """Holds `actual` against `exact` (float64), allowing twice `plain`'s error and the few ulp of the rule above.

    Infinities and NaN of `exact` must stand at the same places in `actual`. Raises AssertionError for another shape,
    and where tensors that are not of floating-point numbers differ.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} instead of {tuple(exact.shape)}")
    if not exact.is_floating_point() and not torch.equal(actual, exact):
        raise AssertionError(f"{name}: {int((actual != exact).sum())} of {exact.numel()} elements are wrong")
    if exact.numel() == 0 or not exact.is_floating_point():
        return Comparison(name, 0.0, 0.0, 0.0, 0.0)
    limits = torch.finfo(actual.dtype)
    a, p, e = (t.detach().double().cpu() for t in (actual, plain, exact))
    finite = e.isfinite()
    if not torch.equal(a.masked_fill(finite, 0).nan_to_num(nan=0.5), e.masked_fill(finite, 0).nan_to_num(nan=0.5)):
        return Comparison(f"{name} (infinities)", float("inf"), 0.0, float("inf"), 0.0)
    a, p, e = (t.masked_fill(~finite, 0) for t in (a, p, e))
    # Where plain PyTorch overflows it allows nothing; a kernel's infinity or NaN there stays an error.
    error, plain_error = (a - e).abs(), (p - e).abs().masked_fill(~p.isfinite(), 0)
    floor = torch.finfo(torch.float32).eps * scale if actual.dtype != torch.float64 else limits.eps * scale
    ulp = limits.eps * e.abs() + limits.eps * limits.smallest_normal
    excess = error - 2 * ulp
    worst = int(excess.nan_to_num(nan=float("inf")).argmax())
    rms = error.square().mean().sqrt().item()
    share = 0.5 + 2 / exact.numel() ** 0.5
    rms_allowed = 2 * plain_error.square().mean().sqrt() + (ulp.square().mean().sqrt() + floor) * share
    return Comparison(
        name,
        error.flatten()[worst].nan_to_num(nan=float("inf")).item(),
        (2 * plain_error.max() + 2 * ulp.flatten()[worst] + 4 * floor).item(),
        float("inf") if rms != rms else rms,
        rms_allowed.item(),
    )


def evaluate(
    function: Callable[..., Any], inputs: dict[str, Any], cotangents: Sequence[Tensor | None] | None
) -> Values:
    """The outputs of function(**inputs) and, when cotangents are given, the gradients of its floating-point inputs.

    Inputs that require a gradient get one; an output whose cotangent is None takes no part in the backward.
    """
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    result = function(**{**inputs, **leaves})
    outputs = result if isinstance(result, tuple) else (result,)
    values = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if cotangents is None or not leaves:
        return values
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], list(leaves.values()), [c for _, c in pairs], allow_unused=True
    )
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        values[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return values


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block, memory that PyTorch hands out uninitialised holds NaN, or the largest integer."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return allocate_and_fill

    with (
        mock.patch.object(torch, "empty", filled(torch.empty)),
        mock.patch.object(torch, "empty_like", filled(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", filled(Tensor.new_empty)),
    ):
        yield


def largest(tensors: Sequence[Tensor]) -> float:
    """The largest finite magnitude in any of the tensors."""
    return max((t[t.isfinite()].abs().max().item() for t in tensors if t.isfinite().any()), default=0.0)


def widen(value: Any) -> Any:
    """Floating-point tensors in float64, everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def verify(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    *,
    backward: bool = True,
    seed: int = 0,
    plain_torch: Sequence[Callable[..., Any]] = (),
) -> list[Comparison]:
    """Runs `function` (poisoned), plain PyTorch in the same dtypes and `reference` in float64; compares all they give.

    Args:
        inputs: keyword arguments; tensors that require a gradient are differentiated.
        backward: also compare gradients, for random cotangents drawn from `seed`.
        plain_torch: other algorithms in plain PyTorch. The one furthest off sets what is allowed, output by output: one
            alone may be lucky.
    """
    wide_inputs = {name: widen(value) for name, value in inputs.items()}
    plain_outputs = evaluate(reference, inputs, None)
    generator = torch.Generator().manual_seed(seed)
    cotangents = None
    if backward:
        cotangents = [
            torch.randn(o.shape, generator=generator).to(device=o.device, dtype=o.dtype)
            if o.is_floating_point()
            else None
            for o in plain_outputs.values()
        ]
    exact = evaluate(reference, wide_inputs, cotangents)
    plains = [evaluate(plain, inputs, cotangents) for plain in (reference, *plain_torch)]
    plain = {n: _furthest([values[n] for values in plains], exact[n]) for n in exact}
    with poisoned():
        actual = evaluate(function, inputs, cotangents)
    for name in exact:
        if actual[name].dtype != plain[name].dtype:
            raise AssertionError(f"{name}: dtype {actual[name].dtype} instead of {plain[name].dtype}")
    outputs = [v for name, v in exact.items() if name.startswith("output") and v.is_floating_point()]
    tensors = [t for t in wide_inputs.values() if isinstance(t, Tensor) and t.is_floating_point()]
    base = largest([*outputs, *tensors, *(c for c in cotangents or [] if c is not None)])
    return [compare(n, actual[n], plain[n], exact[n], max(base, largest([exact[n]]))) for n in exact]


def _furthest(tensors: Sequence[Tensor], exact: Tensor) -> Tensor:
    def deviation(t: Tensor) -> float:
        error = (t.detach().double() - exact).square()
        return error[error.isfinite()].sum().item()

    return max(tensors, key=deviation)


def assert_accurate(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    *,
    backward: bool = True,
    seed: int = 0,
    plain_torch: Sequence[Callable[..., Any]] = (),
) -> None:
    """`verify`, raising AssertionError with the offending comparisons."""
    made = verify(function, reference, inputs, backward=backward, seed=seed, plain_torch=plain_torch)
    wrong = [str(c) for c in made if not c.ok]
    if wrong:
        raise AssertionError("\n".join(wrong))
