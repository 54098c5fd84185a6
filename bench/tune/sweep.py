"""Times the ranked candidates of an op's slots beside the incumbents, each proven first, and decides.

A candidate is held against the float64 reference (llmcore.testing.verify) on odd sizes before it is timed. It is timed
in rounds with the incumbent, and the incumbent once more: how far those two differ is the noise.
The best candidate is then timed a second time, because the best of several readings is partly luck, and that second
time alone decides: it replaces the incumbent when it is faster by MARGIN and by three times the difference between the
incumbent and itself, over all workloads together, and slower than the incumbent by more than that on none of them.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import forward_call, training_call
from bench.ops import Case, Inputs
from bench.peers import leaves_of, outputs_of
from bench.timing import interleaved
from bench.tune.candidates import Slot, Values, tupled
from bench.tune.places import injected
from bench.tune.workloads import precision, workloads
from llmcore.testing import verify

# An entry is not changed for less: the noise is a reading too and may be small by luck, and every change costs a new
# look at the compile record.
MARGIN = 0.02
NOISE_FACTOR = 3

Row = dict[str, Any]


class Broken(Exception):
    """The device no longer answers after a candidate; what comes after it would be blamed for it."""


@dataclass(frozen=True)
class Settings:
    device: str = "cuda"
    top: int = 8
    rounds: int = 9
    round_seconds: float = 0.02
    deadline: float = math.inf  # on time.monotonic's clock

    def late(self) -> bool:
        return time.monotonic() > self.deadline


def part_call(part: str, function: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    """The forward alone, both, or the backward alone, whose forward has run once."""
    if part == "forward":
        return forward_call(function, inputs, [])
    outputs = outputs_of(function, inputs)
    cotangents = [torch.randn_like(output) for output in outputs]
    if part == "both":
        return training_call(function, inputs, cotangents)
    return lambda: torch.autograd.grad(outputs, leaves_of(inputs), cotangents, retain_graph=True)


def wrong(slot: Slot, values: Values, cases: list[Case], device: str) -> str | None:
    """What a candidate gets wrong, or why it does not run."""
    for case in cases:
        torch.manual_seed(0)
        inputs = (case.check or case.inputs)(device)
        try:
            with injected(slot.places, values):
                found = verify(case.ours, case.reference, inputs, backward=slot.part != "forward")
        except Exception as error:  # whatever a candidate raises is its result
            return f"{case.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        mistakes = [str(comparison) for comparison in found if not comparison.ok]
        if mistakes:
            return f"{case.name}: {'; '.join(mistakes)}"
    return None


def timed(slot: Slot, values: Values, incumbent: Values, cases: list[Case], settings: Settings) -> list[Row]:
    """A row for each workload. ratio: the candidate's time over the incumbent's; noise: the incumbent's own."""
    rows = []
    for case in cases:
        torch.manual_seed(0)
        inputs = case.inputs(settings.device)
        call = part_call(slot.part, case.ours, inputs)

        def under(chosen: Values, call: Callable[[], Any] = call) -> Callable[[], Any]:
            def run():
                with injected(slot.places, chosen):
                    return call()

            return run

        calls = {"incumbent": under(incumbent), "candidate": under(values), "again": under(incumbent)}
        timings, ratios = interleaved(
            calls, device=settings.device, rounds=settings.rounds, round_seconds=settings.round_seconds
        )
        rows.append(
            {
                "case": case.name,
                "microseconds": {n: round(timings[n].median * 1e6, 2) for n in ("incumbent", "candidate")},
                "ratio": round(ratios["candidate"], 4),
                "noise": round(abs(ratios["again"] - 1), 4),
            }
        )
    return rows


def score(rows: list[Row]) -> float:
    """The candidate's time over the incumbent's, the geometric mean over the workloads."""
    return math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))


def margin(rows: list[Row]) -> float:
    return max(MARGIN, NOISE_FACTOR * max(row["noise"] for row in rows))


def faster(rows: list[Row]) -> bool:
    return score(rows) < 1 - margin(rows) and all(row["ratio"] <= 1 + margin(rows) for row in rows)


def measure(slot: Slot, values: Values, incumbent: Values, cases: list[Case], settings: Settings, what: str) -> Row:
    row: Row = {"slot": slot.name, "what": what, "values": values, "incumbent": incumbent}
    error = wrong(slot, values, cases, settings.device)
    if error is None:
        try:
            return {**row, "timed": timed(slot, values, incumbent, cases, settings)}
        except Exception as failure:  # as above: a candidate may fit the odd sizes and not these
            error = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:300]}"
    return {**row, "error": error}


def _answers(device: str) -> bool:
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def sweep_slot(slot: Slot, ranked: list[Values], done: list[Row], settings: Settings) -> Iterator[Row]:
    """Rows as they come, those in `done` left out: each candidate's, the best one's second timing, the decision.

    Raises Broken after the row of a candidate that leaves the device unusable.
    """
    incumbent = slot.incumbent()
    own = [row for row in done if row["slot"] == slot.name]
    if any(row["what"] == "decision" and tupled(row["values"]) == incumbent and row["replaces"] for row in own):
        return  # the winner of an earlier run stands in the table
    own = [row for row in own if tupled(row["incumbent"]) == incumbent]
    torch.set_float32_matmul_precision(precision(slot))
    cases = workloads(slot, settings.device)

    def rows_of(what: str, values: Values) -> Iterator[Row]:
        known = next((row for row in own if row["what"] == what and tupled(row["values"]) == values), None)
        if known is not None or settings.late():
            return
        row = measure(slot, values, incumbent, cases, settings, what)
        own.append(row)
        yield row
        if "error" in row and not _answers(settings.device):
            raise Broken(f"{slot.name} {values}: {row['error']}")

    candidates = [values for values in ranked if values != incumbent][: settings.top]
    tried = {tupled(row["values"]) for row in own}
    if not tried.issuperset(candidates):
        error = wrong(slot, incumbent, cases, settings.device)
        if error is not None:  # nothing can be learnt beside a wrong incumbent
            yield {"slot": slot.name, "what": "incumbent", "values": incumbent, "incumbent": incumbent, "error": error}
            return
    for values in candidates:
        yield from rows_of("candidate", values)
    if settings.late():
        return
    ahead = [row for row in own if row["what"] == "candidate" and "timed" in row and faster(row["timed"])]
    best = min(ahead, key=lambda row: score(row["timed"]), default=None)
    replaces = False
    if best is not None:
        yield from rows_of("second timing", tupled(best["values"]))
        chosen = tupled(best["values"])
        second = [row for row in own if row["what"] == "second timing" and tupled(row["values"]) == chosen]
        if not second:
            return
        replaces = "timed" in second[0] and faster(second[0]["timed"])
    winner = tupled(best["values"]) if best and replaces else incumbent
    yield {"slot": slot.name, "what": "decision", "values": winner, "incumbent": incumbent, "replaces": replaces}
