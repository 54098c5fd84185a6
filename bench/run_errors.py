"""How far each op is from float64, by dtype and size, beside its peers: outputs and gradients."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from bench.ops import name_of
from bench.peers import copy_of, load_peers, outputs_of
from llmcore import ops
from llmcore.testing import evaluate, widen

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relative_errors(actual: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Root mean square and worst element, each relative to the root mean square of the exact values."""
    error, scale = (actual.double() - exact).abs(), exact.square().mean().sqrt()
    return (error.square().mean().sqrt() / scale).item(), (error.max() / scale).item()


def run(only: list[str], device: str) -> Iterator[dict[str, Any]]:
    for name in only or sorted(ops.registry):
        module = importlib.import_module(f"bench.ops.bench_{name}")
        for dtype in DTYPES:
            for size in module.SIZES:
                case = module.of_size(size, dtype, device)
                torch._dynamo.reset()
                inputs = case.inputs(device)
                cotangents = [torch.randn_like(o) for o in outputs_of(case.ours, inputs)]
                wide = {key: widen(value) for key, value in inputs.items()}
                exact = evaluate(case.reference, wide, [c.double() for c in cotangents])
                peers, absent = load_peers(case, inputs, cotangents)
                errors: dict[str, Any] = {}
                for candidate, function in {"llmcore": case.ours, **peers}.items():
                    values = evaluate(function, copy_of(inputs), cotangents)
                    for key in exact:
                        errors.setdefault(key, {})[candidate] = relative_errors(values[key], exact[key])
                for key, found in errors.items():
                    record = {"op": name, "case": case.name, "dtype": name_of(dtype), "size": size, "value": key}
                    record["rms"] = {n: float(f"{e[0]:.3g}") for n, e in found.items()}
                    record["worst"] = {n: float(f"{e[1]:.3g}") for n, e in found.items()}
                    if absent:
                        record["absent"] = absent
                    shown = "  ".join(f"{n} {e:.2e}" for n, e in record["rms"].items())
                    print(f"{name:13} {case.name:40} {key:22} rms: {shown}", flush=True)
                    yield record
