"""Benchmarks declared as data, one module for each op: CASES holds what to run, where, and against which peers.

A module's of_model(config, B, T, dtype, device) gives the cases that a model of B sequences of T tokens calls the op
with; its SIZES and of_size(size, dtype, device) are what its errors are measured on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row. `ours` and each peer take `inputs(device)` by keyword; inputs that require a gradient get one.

    bytes: what a forward and what a backward must move between memory and processor. flops: what they must compute; a
    function such as exp counts as one. eager is also compiled, as the peer torch.compile. peers: functions that load a
    peer; what they raise is the reason why it is absent. check: the inputs to prove correctness on, where the reference
    is too large for the ones that are timed. facts: of the case, kept in its record for the plots. short: part of the
    short set.
    """

    name: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[str], Inputs]
    bytes: tuple[float, float]
    flops: tuple[float, float]
    peers: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    check: Callable[[str], Inputs] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    short: bool = False


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
