"""What a token costs in sequences of 1k to 64k: the same for a scan and a convolution, more and more for attention."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.timing import interleaved
from llmcore import ops

LENGTHS = tuple(2**i for i in range(10, 17))
CHANNELS, ATTENTION_LIMIT = 256, 16384
Inputs = dict[str, Any]


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _decays(*shape: int) -> Tensor:
    return (-torch.rand(shape)).requires_grad_()


def scan_inputs(length: int, D: int = CHANNELS, N: int = 16) -> Inputs:
    tensors = {"u": _randn(1, D, length), "delta": _randn(1, D, length), "A": _decays(D, N), "z": _randn(1, D, length)}
    return tensors | {"B": _randn(1, N, length), "C": _randn(1, N, length), "D": _randn(D), "delta_softplus": True}


def ssd_inputs(length: int, H: int = CHANNELS // 64, P: int = 64, N: int = 64) -> Inputs:
    tensors = {"x": _randn(1, length, H, P), "dt": _randn(1, length, H), "A": _decays(H), "z": _randn(1, length, H, P)}
    return tensors | {"B": _randn(1, length, 1, N), "C": _randn(1, length, 1, N), "D": _randn(H), "dt_softplus": True}


def convolution_inputs(length: int, D: int = CHANNELS) -> Inputs:
    return {"x": _randn(1, D, length), "weight": _randn(D, 4), "bias": _randn(D), "activation": "silu"}


def attention_inputs(length: int, H: int = CHANNELS // 64, D: int = 64) -> Inputs:
    return {**{n: _randn(1, length, H, D) for n in ("q", "k", "v")}, "causal": True}


CASES: dict[str, tuple[Callable[..., Any], Callable[[int], Inputs]]] = {
    "selective_scan": (ops.selective_scan, scan_inputs),
    "ssd": (ops.ssd, ssd_inputs),
    "causal_conv1d": (ops.causal_conv1d, convolution_inputs),
    "attention": (ops.attention, attention_inputs),
}


def calls_of(name: str, length: int) -> dict[str, Callable[[], object]]:
    function, make = CASES[name]
    inputs = make(length)
    leaves = [t for t in inputs.values() if isinstance(t, Tensor)]
    cotangent = torch.randn_like(function(**inputs))

    def forward() -> object:
        with torch.no_grad():
            return function(**inputs)

    return {
        "forward": forward,
        "forward + backward": lambda: torch.autograd.grad(function(**inputs), leaves, cotangent),
    }


def run(lengths: tuple[int, ...] = LENGTHS) -> Iterator[dict[str, Any]]:
    """Nanoseconds for each token, of float32 ops with 256 channels in one sequence."""
    for name in CASES:
        for length in lengths:
            if name == "attention" and length > ATTENTION_LIMIT:
                continue
            torch.manual_seed(length)
            timings, _ = interleaved(calls_of(name, length), rounds=5, round_seconds=0.05)
            cost = {direction: round(t.median / length * 1e9, 1) for direction, t in timings.items()}
            print(f"{name:16} {length:6} tokens: " + "  ".join(f"{d} {c} ns" for d, c in cost.items()), flush=True)
            yield {"op": name, "length": length, "nanoseconds a token": cost}
