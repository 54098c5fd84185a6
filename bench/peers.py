"""The peers of a case: those that load, run and agree, and for each of the others the reason."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.ops import Case, Inputs

Function = Callable[..., Any]
# A peer is only asked for the same function, not for our accuracy.
AGREEMENT = 0.02


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]


def outputs_of(function: Function, inputs: Inputs) -> list[Tensor]:
    """Those of floating-point numbers."""
    result = function(**inputs)
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t.is_floating_point()]


def copy_of(inputs: Inputs) -> Inputs:
    """The same values in memory of their own."""
    return {
        name: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for name, t in inputs.items()
    }


def loaders_of(case: Case) -> dict[str, Callable[[], Function]]:
    return {"eager": lambda: case.eager, "torch.compile": lambda: torch.compile(case.eager), **case.peers}


def results_of(function: Function, inputs: Inputs, cotangents: list[Tensor]) -> list[Tensor]:
    """The outputs and the gradients, on a copy of the inputs: there are peers that work in place."""
    inputs = copy_of(inputs)
    outputs = outputs_of(function, inputs)
    kept = [t.detach().clone() for t in outputs]
    leaves = leaves_of(inputs)
    return kept + list(torch.autograd.grad(outputs, leaves, [c.clone() for c in cotangents]) if leaves else ())


def distance(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The largest relative distance of an output or gradient; infinite where one is not a number."""
    largest = 0.0
    for a, b in zip(theirs, ours, strict=True):
        relative = ((a - b).float().norm() / b.float().norm().clamp_min(1e-30)).item()
        largest = max(largest, relative if relative == relative else float("inf"))
    return largest


def load_peers(case: Case, inputs: Inputs, cotangents: list[Tensor]) -> tuple[dict[str, Function], dict[str, str]]:
    """Returns the peers that take part, and why the others do not."""
    ours = results_of(case.ours, inputs, cotangents)
    peers, absent = {}, {}
    for name, load in loaders_of(case).items():
        try:
            peer = load()
            apart = distance(results_of(peer, inputs, cotangents), ours)
        except Exception as error:  # whatever stops a peer is named in the record, and is no reason to lose the others
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        if apart <= AGREEMENT:
            peers[name] = peer
        else:
            absent[name] = f"disagrees: relative distance {apart:.3g}"
    return peers, absent
