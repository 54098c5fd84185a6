"""Every op against its peers: forward, and forward + backward, correctness first."""

import importlib
from collections.abc import Iterator
from typing import Any

from bench.ceilings import measure_ceilings
from bench.measure import measure
from bench.ops import Case
from llmcore import ops


def cases_of(name: str, device: str, short: bool) -> list[Case]:
    """The cases of an op on a device: the short set, or all."""
    cases = importlib.import_module(f"bench.ops.bench_{name}").CASES
    return [case for case in cases if case.device == device and (case.short or not short)]


def run(only: list[str], device: str, short: bool, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Measures and prints the ops named in `only`, or all; not the (op, case) pairs that are done."""
    chosen = {name: cases_of(name, device, short) for name in only or sorted(ops.registry)}
    yield from run_cases(chosen, device, done)


def run_cases(chosen: dict[str, list[Case]], device: str, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    ceilings = measure_ceilings(device)
    yield {"ceilings": ceilings.as_record()}
    for name, cases in chosen.items():
        for case in cases:
            if (name, case.name) not in done:
                for record, _ in measure(case, ceilings, device):
                    print(line({"op": name, **record}), flush=True)
                    yield {"op": name, **record}


def line(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{record['op']:13} {record['case']:44} WRONG: {record['error']}"
    times = "  ".join(f"{n} {t:9.1f}" for n, t in record["microseconds"].items())
    ratios = "  ".join(f"{r:5.2f}x {n}" for n, r in record["times faster than"].items())
    absent = "".join(f"  ({n}: {why})" for n, why in record.get("absent", {}).items())
    return f"{record['op']:13} {record['case']:44} {record['pass']:18} us: {times}   {ratios}{absent}"
