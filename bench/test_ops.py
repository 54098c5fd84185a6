"""`pytest bench`: the cases of bench/ops as tests. llmcore is held against the reference first; a wrong result fails.

The candidates of a case are timed together, in interleaved rounds (timing.py), and on a GPU by its own clock, which
pytest-benchmark's way of timing one function after another is not. So each test hands the rounds that were measured to
pytest-benchmark, through a clock that they move: its tables, its JSON and its comparisons show them.
"""

import functools
import itertools
from typing import Any

import pytest
import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.measure import FORWARD, TRAINING, Measured, measure
from bench.ops import Case
from bench.peers import loaders_of
from bench.run_ops import cases_of
from bench.timing import keep_freed_memory
from llmcore import ops


class RecordedClock:
    """Tells the time that measured rounds have taken."""

    __name__ = "recorded"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = RecordedClock()


@functools.lru_cache(1)
def ceilings(device: str) -> Ceilings:
    keep_freed_memory()
    torch.manual_seed(0)
    return measure_ceilings(device)


@functools.lru_cache(1)  # the tests of a case follow each other
def measured(op: str, number: int, device: str, short: bool) -> list[Measured]:
    return list(measure(cases_of(op, device, short)[number], ceilings(device), device))


def candidates_of(case: Case) -> list[str]:
    return ["llmcore", *loaders_of(case)]


def pytest_generate_tests(metafunc):
    device, short = metafunc.config.option.device, metafunc.config.option.short
    rows = [
        pytest.param(op, number, direction, candidate, id=f"{op}-{case.name}-{direction}-{candidate}".replace(" ", "_"))
        for op in sorted(ops.registry)
        for number, case in enumerate(cases_of(op, device, short))
        for direction, candidate in itertools.product((FORWARD, TRAINING), candidates_of(case))
    ]
    metafunc.parametrize(("op", "number", "direction", "candidate"), rows)


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, request: Any, op: str, number: int, direction: str, candidate: str) -> None:
    results = measured(op, number, request.config.option.device, request.config.option.short)
    if "error" in results[0].record:
        pytest.fail(f"llmcore is wrong, so nothing is timed: {results[0].record['error']}")
    (found,) = (result for result in results if result.record["pass"] == direction)
    if candidate in found.record.get("absent", {}):
        benchmark.skipped = True
        pytest.skip(f"{candidate} takes no part: {found.record['absent'][candidate]}")
    benchmark.group = f"{op} {found.record['case']} {direction}"
    benchmark.extra_info.update(
        found.record, candidate=candidate, ceilings=ceilings(request.config.option.device).as_record()
    )
    rounds = found.timings[candidate].rounds
    times = itertools.cycle(rounds)
    benchmark.pedantic(lambda: CLOCK.advance(next(times)), rounds=len(rounds))
