"""One case: is llmcore right, then how fast it is beside its peers, forward and forward + backward."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.ceilings import Ceilings
from bench.machine import cache_bytes
from bench.ops import Case, Inputs
from bench.peers import Function, copy_of, leaves_of, load_peers, outputs_of
from bench.timing import Call, Rotated, Timing, graphed, interleaved, peak_memory
from llmcore.testing import verify

FORWARD, TRAINING = "forward", "forward + backward"
# Inputs are rotated over twice the cache, but not over more than this: some machines share hundreds of MiB of cache.
LARGEST_ROTATION = 256 << 20
# Below this a GPU waits for Python, so that a CUDA graph shows what the kernels cost.
SMALL_SECONDS = 100e-6


def significant(x: float) -> float:
    """Rounded to four digits."""
    return float(f"{x:.4g}")


class Measured(NamedTuple):
    """A record to keep, and the timings it was made from (empty where llmcore is wrong)."""

    record: dict[str, Any]
    timings: dict[str, Timing]


def training_call(function: Function, inputs: Inputs, cotangents: list[Tensor]) -> Call:
    leaves = leaves_of(inputs)

    def call():
        return torch.autograd.grad(outputs_of(function, inputs), leaves, cotangents)

    return call


def on_copies(function: Function) -> Function:
    """The function on copies of the tensors that ask for no gradient: some ops change them."""

    def call(**inputs: Any) -> Any:
        return function(
            **{n: t.clone() if isinstance(t, Tensor) and not t.requires_grad else t for n, t in inputs.items()}
        )

    return call


def forward_call(function: Function, inputs: Inputs, cotangents: list[Tensor]) -> Call:
    def call():
        with torch.no_grad():
            return function(**inputs)

    return call


def sets_of(inputs: Inputs, cotangents: list[Tensor], device: str) -> list[tuple[Inputs, list[Tensor]]]:
    """Copies of inputs and cotangents, so many that they do not fit the cache."""
    bytes_ = sum(t.nbytes for t in [*inputs.values(), *cotangents] if isinstance(t, Tensor))
    wanted = min(2 * cache_bytes(device), LARGEST_ROTATION)
    return [(copy_of(inputs), [c.clone() for c in cotangents]) for _ in range(math.ceil(wanted / bytes_))]


def measure(case: Case, ceilings: Ceilings, device: str) -> Iterator[Measured]:
    """Yields the forward, then forward + backward where a gradient is asked for; only an error where a result or a
    gradient is wrong."""
    checked = (case.check or case.inputs)(device)
    wrong = [str(c) for c in verify(on_copies(case.ours), on_copies(case.reference), checked) if not c.ok]
    del checked
    if wrong:
        yield Measured({"case": case.name, "error": "; ".join(wrong)}, {})
        return
    torch._dynamo.reset()
    inputs = case.inputs(device)
    cotangents = [torch.randn_like(o) for o in outputs_of(case.ours, inputs)]
    peers, absent = load_peers(case, inputs, cotangents)
    sets = sets_of(inputs, cotangents, device)
    dtype = next(t.dtype for t in (*leaves_of(inputs), *cotangents))
    for name, make, moved, flops in (
        (FORWARD, forward_call, case.bytes[0], case.flops[0]),
        (TRAINING, training_call, sum(case.bytes), sum(case.flops)),
    ):
        if name == TRAINING and not leaves_of(inputs):
            return
        candidates = {"llmcore": case.ours, **peers}
        calls: dict[str, Call] = {n: Rotated([make(f, *s) for s in sets]) for n, f in candidates.items()}
        timings, ratios = interleaved(calls, device=device)
        record: dict[str, Any] = {"case": case.name, "pass": name, **case.facts}
        record["microseconds"] = {n: round(t.median * 1e6, 2) for n, t in timings.items()}
        record["spread"] = {n: round((t.high - t.low) / t.median, 3) for n, t in timings.items()}
        record["times faster than"] = {n: round(r, 3) for n, r in ratios.items() if n != "llmcore"}
        record["inputs"] = len(sets)
        record["bytes"], record["flops"] = moved, flops
        record["GB/s"] = {n: significant(moved / t.median / 1e9) for n, t in timings.items()}
        record["GFLOP/s"] = {n: significant(flops / t.median / 1e9) for n, t in timings.items()}
        in_memory, in_products = moved / ceilings.copy_bytes, flops / ceilings.product_flops[dtype]
        record["bound by"] = "memory" if in_memory > in_products else "matrix product"
        least = max(in_memory, in_products)
        record["share of the ceiling"] = {n: round(least / t.median, 3) for n, t in timings.items()}
        seconds = timings["llmcore"].median
        if device == "cuda" and seconds < SMALL_SECONDS:
            record.update(in_graphs(calls, len(sets)))
        peaks = {n: peak_memory(make(f, *sets[0]), device) for n, f in candidates.items()}
        record["peak MiB"] = {n: round(peak / 2**20, 1) for n, peak in peaks.items() if peak is not None}
        if absent:
            record["absent"] = absent
        yield Measured(record, timings)


def in_graphs(calls: dict[str, Call], sets: int) -> dict[str, Any]:
    """The same calls in CUDA graphs of one round over the sets; a peer that cannot be captured is named."""
    graphs, absent = {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = graphed(call, sets)
        except RuntimeError as error:
            absent[name] = str(error).strip().splitlines()[0]
    timings, _ = interleaved(graphs, device="cuda")
    record: dict[str, Any] = {
        "microseconds in a CUDA graph": {n: round(t.median / sets * 1e6, 2) for n, t in timings.items()}
    }
    return {**record, "absent from CUDA graphs": absent} if absent else record
