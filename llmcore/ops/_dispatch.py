"""Which backend runs an op: the forced one, or the best that can run where the tensor lives.

The choice is made once, at the call, and travels into the operator as an argument, so that a backward uses its
forward's backend whatever thread it runs on and whatever context has ended.
"""

import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from llmcore import _extension

BACKENDS = ("triton", "cuda", "cpu", "torch")
PREFERENCE = {"cuda": ("triton", "cuda", "torch"), "cpu": ("triton", "cpu", "torch")}

_log = logging.getLogger("llmcore")


@dataclass(frozen=True)
class Op:
    """What is known of an op's kernels: the table of `llmcore doctor`, and the rules of `resolve`. parts: the ops whose
    C++ kernels it calls, where it has none of its own."""

    name: str
    kernels: tuple[str, ...]
    opt_in: dict[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        registry[self.name] = self


registry: dict[str, Op] = {}


class _Forced(threading.local):
    def __init__(self) -> None:
        self.name: str | None = None


_forced = _Forced()
_process_backend = os.environ.get("LLMCORE_BACKEND") or None


def _check_name(name: object, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, which is not a backend; allowed: {', '.join(BACKENDS)}.")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces every op called inside the block, in this thread, to `name`: "triton", "cuda", "cpu" or "torch".

    An op that has no such kernel, or cannot run it here, raises RuntimeError and says what is missing. The environment
    variable LLMCORE_BACKEND does the same for a process; the block wins over it. A backward uses its forward's backend,
    but activation checkpointing runs forwards again, outside the block if the backward is: use LLMCORE_BACKEND there.
    """
    _check_name(name, "backend(...)")
    before = _forced.name
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = before


@functools.cache
def missing(name: str, backend: str, device: str) -> str | None:
    """Why `backend` cannot run the op `name` on tensors of `device`: one clause, or None when it can."""
    op = registry[name]
    if backend == "torch":
        return None
    if backend not in op.kernels:
        return f"{name} has no {backend} kernel"
    if backend == "cpu":
        return "the cpu kernels take CPU tensors" if device != "cpu" else _extension.cpu_reason()
    if backend == "cuda":
        return "the cuda kernels take CUDA tensors" if device != "cuda" else _extension.cuda_reason()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and not interpreted:
        return "triton takes CPU tensors only under its interpreter (TRITON_INTERPRET=1)"
    if device not in ("cpu", "cuda"):
        return f"triton does not take {device} tensors"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@functools.cache
def _default(name: str, device: str) -> str:
    op = registry[name]
    reasons: list[str] = []
    is_slower = False  # than a kernel that there is would be
    for candidate in PREFERENCE.get(device, ("torch",)):
        if candidate in op.opt_in:
            continue
        reason = missing(name, candidate, device)
        if reason is None:
            if is_slower:
                _log.warning(
                    "%s runs on the %s backend for %s tensors because %s (`llmcore doctor` shows all ops).",
                    name, candidate, device, "; ".join(reasons),
                )  # fmt: skip
            return candidate
        if candidate == "triton" and device == "cpu":
            continue
        reasons.append(reason)
        is_slower = is_slower or candidate in op.kernels
    raise AssertionError("unreachable: the torch backend is always available")


def _choose(name: str, device: str, forced: str | None) -> str:
    if forced is None:
        return _default(name, device)
    _check_name(forced, "LLMCORE_BACKEND")
    reason = missing(name, forced, device)
    if reason is not None:
        raise RuntimeError(
            f"{name} was asked to run on the {forced} backend, but {reason}; {alternatives(name, device)}."
        )
    return forced


# Tracing must not walk into the probes; the answer cannot change while the process lives. This attribute is what
# torch.compiler.assume_constant_result sets, at the price of importing torch._dynamo with llmcore.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def alternatives(name: str, device: str) -> str:
    able = [b for b in BACKENDS if missing(name, b, device) is None]
    return f"available for {device} tensors: {', '.join(able)}"


def resolve(name: str, tensor: torch.Tensor) -> str:
    """The backend that runs the op `name` on `tensor`: the forced one, or the first of PREFERENCE that can.

    float64 is the reference's own dtype: it runs on the torch backend unless another is forced, which is an error.
    """
    if tensor.is_meta:
        return "torch"
    forced = _forced.name or _process_backend
    if tensor.dtype == torch.float64 and forced != "torch":
        if forced is not None:
            raise TypeError(
                f"{name} on the {forced} backend takes float32, bfloat16 or float16, not float64 (torch does)."
            )
        return "torch"
    return _choose(name, tensor.device.type, forced)
