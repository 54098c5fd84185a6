"""Every op against eager PyTorch and torch.compile: forward, and forward + backward, correctness first."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from bench.ops import Case
from bench.timing import interleaved
from llmcore import ops
from llmcore.testing import verify


def training_call(function, inputs: dict[str, Any], cotangents):
    leaves = [t for t in inputs.values() if t.requires_grad]

    def call():
        result = function(**inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        return torch.autograd.grad(outputs, leaves, cotangents)

    return call


def forward_call(function, inputs: dict[str, Any]):
    def call():
        with torch.no_grad():
            return function(**inputs)

    return call


def measure(case: Case) -> list[dict[str, Any]]:
    """One record for the forward and one for forward + backward."""
    inputs = case.inputs()
    wrong = [str(c) for c in verify(case.ours, case.reference, inputs) if not c.ok]
    if wrong:
        return [{"case": case.name, "error": "; ".join(wrong)}]
    torch._dynamo.reset()
    candidates = {"llmcore": case.ours, "eager": case.eager, "torch.compile": torch.compile(case.eager), **case.peers}
    result = case.ours(**inputs)
    cotangents = [torch.randn_like(o) for o in (result if isinstance(result, tuple) else (result,))]
    records = []
    for name, calls in (
        ("forward", {n: forward_call(f, inputs) for n, f in candidates.items()}),
        ("forward + backward", {n: training_call(f, inputs, cotangents) for n, f in candidates.items()}),
    ):
        timings, ratios = interleaved(calls)
        record: dict[str, Any] = {"case": case.name, "pass": name}
        record["microseconds"] = {n: round(t.median * 1e6, 2) for n, t in timings.items()}
        record["spread"] = {n: round((t.high - t.low) / t.median, 3) for n, t in timings.items()}
        record["times faster than"] = {n: round(r, 3) for n, r in ratios.items() if n != "llmcore"}
        if case.flops:
            flops = case.flops * (1 if name == "forward" else 3.5)
            record["GFLOP/s"] = {n: round(flops / t.median / 1e9, 1) for n, t in timings.items()}
        records.append(record)
    return records


def run(only: list[str]) -> Iterator[dict[str, Any]]:
    """Measures and prints the ops named in `only`, or all."""
    for name in only or sorted(ops.registry):
        for case in importlib.import_module(f"bench.ops.bench_{name}").CASES:
            for record in measure(case):
                print(line({"op": name, **record}), flush=True)
                yield {"op": name, **record}


def line(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{record['op']:13} {record['case']:44} WRONG: {record['error']}"
    times = "  ".join(f"{n} {t:9.1f}" for n, t in record["microseconds"].items())
    ratios = "  ".join(f"{r:5.2f}x {n}" for n, r in record["times faster than"].items())
    return f"{record['op']:13} {record['case']:44} {record['pass']:18} us: {times}   {ratios}"
