"""Benchmarks declared as data, one module for each op: CASES holds what to run, against which peers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One row: `ours` and each peer take `inputs()` by keyword; inputs that require a gradient are differentiated.

    flops: of a forward, 0 when the op is bound by memory. eager is also compiled, as the peer torch.compile.
    """

    name: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[], dict[str, Any]]
    flops: float = 0.0
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)


def moved_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
