"""Timing several candidates in one run, in interleaved rounds: a machine that changes speed changes all of them."""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmcore.train.machine import keep_freed_memory as keep_freed_memory


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median of the rounds, and their first and third quartile."""

    median: float
    low: float
    high: float


def interleaved(
    candidates: dict[str, Callable[[], object]], *, rounds: int = 9, round_seconds: float = 0.02
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times every candidate in each round.

    Returns:
        the timings, and for each candidate the median over the rounds of its time divided by the first candidate's.
    """
    repeats = {}
    for name, call in candidates.items():
        call()
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(round_seconds / max(time.perf_counter() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    first = next(iter(candidates))
    timings, ratios = {}, {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, low, high)
        ratios[name] = statistics.median(v / f for v, f in zip(values, seconds[first], strict=True))
    return timings, ratios


def machine() -> dict[str, str | int]:
    """What a record must say of where it was taken."""
    from llmcore import _extension

    cpu = _extension.cpu()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu kernels": cpu.isa() if cpu else "absent",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        info = {name.strip(): value.strip() for name, value in fields.items()}
        return f"{info['model name']} family {info['cpu family']} model {info['model']}"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
