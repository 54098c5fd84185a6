"""Every op against its peers: forward, and forward + backward, correctness first."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.ceilings import Ceilings, measure_ceilings
from bench.ops import Case, Inputs
from bench.timing import interleaved, peak_memory
from llmcore import ops
from llmcore.testing import verify

Function = Callable[..., Any]


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]


def training_call(function: Function, inputs: Inputs, cotangents: list[Tensor]) -> Callable[[], Any]:
    leaves = leaves_of(inputs)

    def call():
        result = function(**inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        return torch.autograd.grad(outputs, leaves, cotangents)

    return call


def forward_call(function: Function, inputs: Inputs) -> Callable[[], Any]:
    def call():
        with torch.no_grad():
            return function(**inputs)

    return call


def outputs_of(function: Function, inputs: Inputs) -> list[Tensor]:
    result = function(**inputs)
    return list(result) if isinstance(result, tuple) else [result]


def load_peers(case: Case, inputs: Inputs, ours: list[Tensor]) -> tuple[dict[str, Function], dict[str, str]]:
    """The peers that load, run and agree, and why the others do not take part."""
    loaders = {"eager": lambda: case.eager, "torch.compile": lambda: torch.compile(case.eager), **case.peers}
    peers, absent = {}, {}
    for name, load in loaders.items():
        try:
            peer = load()
            theirs = outputs_of(peer, inputs)
            torch.autograd.grad(
                [t for t in theirs if t.requires_grad], leaves_of(inputs), [torch.ones_like(t) for t in theirs]
            )
        except Exception as error:  # whatever stops a peer is named in the record, and is no reason to lose the others
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        # A peer is only asked for the same function, not for our accuracy.
        distance = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(theirs, ours, strict=True))
        if distance <= 0.02:
            peers[name] = peer
        else:
            absent[name] = f"disagrees: relative distance {distance:.3g}"
    return peers, absent


def measure(case: Case, ceilings: Ceilings, device: str) -> Iterator[dict[str, Any]]:
    """One record for the forward and one for forward + backward."""
    checked = (case.check or case.inputs)(device)
    wrong = [str(c) for c in verify(case.ours, case.reference, checked) if not c.ok]
    del checked
    if wrong:
        yield {"case": case.name, "error": "; ".join(wrong)}
        return
    torch._dynamo.reset()
    inputs = case.inputs(device)
    ours = outputs_of(case.ours, inputs)
    peers, absent = load_peers(case, inputs, ours)
    cotangents = [torch.randn_like(o) for o in ours]
    candidates = {"llmcore": case.ours, **peers}
    for name, calls, moved, flops in (
        ("forward", {n: forward_call(f, inputs) for n, f in candidates.items()}, case.bytes[0], case.flops[0]),
        (
            "forward + backward", {n: training_call(f, inputs, cotangents) for n, f in candidates.items()},
            sum(case.bytes), sum(case.flops),
        ),
    ):  # fmt: skip
        timings, ratios = interleaved(calls, device=device)
        record: dict[str, Any] = {"case": case.name, "pass": name}
        record["microseconds"] = {n: round(t.median * 1e6, 2) for n, t in timings.items()}
        record["spread"] = {n: round((t.high - t.low) / t.median, 3) for n, t in timings.items()}
        record["times faster than"] = {n: round(r, 3) for n, r in ratios.items() if n != "llmcore"}
        seconds = timings["llmcore"].median
        if moved:
            record["GB/s"] = {n: round(moved / t.median / 1e9, 1) for n, t in timings.items()}
            record["share of copy bandwidth"] = round(moved / seconds / ceilings.copy_bytes, 3)
        if flops:
            record["GFLOP/s"] = {n: round(flops / t.median / 1e9, 1) for n, t in timings.items()}
            product = ceilings.product_flops[inputs["q"].dtype]
            record["share of matrix product"] = round(flops / seconds / product, 3)
        if device == "cuda":
            record["peak MiB"] = {n: round(peak_memory(call) / 2**20, 1) for n, call in calls.items()}
        if absent:
            record["absent"] = absent
        yield record


def run(only: list[str], device: str, short: bool, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Measures and prints the ops named in `only`, or all; not the (op, case) pairs that are done."""
    ceilings = measure_ceilings(device)
    yield {"ceilings": ceilings.as_record()}
    for name in only or sorted(ops.registry):
        for case in importlib.import_module(f"bench.ops.bench_{name}").CASES:
            if case.device != device or (short and not case.short) or (name, case.name) in done:
                continue
            for record in measure(case, ceilings, device):
                print(line({"op": name, **record}), flush=True)
                yield {"op": name, **record}


def line(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{record['op']:13} {record['case']:44} WRONG: {record['error']}"
    times = "  ".join(f"{n} {t:9.1f}" for n, t in record["microseconds"].items())
    ratios = "  ".join(f"{r:5.2f}x {n}" for n, r in record["times faster than"].items())
    absent = "".join(f"  ({n}: {why})" for n, why in record.get("absent", {}).items())
    return f"{record['op']:13} {record['case']:44} {record['pass']:18} us: {times}   {ratios}{absent}"
