"""Timing several candidates in one run, in interleaved rounds: a machine that changes speed changes all of them."""

import platform
import re
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
    candidates: dict[str, Callable[[], object]], *, device: str = "cpu", rounds: int = 9, round_seconds: float = 0.02
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times every candidate in each round; on a GPU by its own clock, from the first call's start to the last's end.

    Returns:
        the timings, and for each candidate the median over the rounds of its time divided by the first candidate's.
    """
    repeated = _repeated_on_gpu if device == "cuda" else _repeated_on_cpu
    repeats = {}
    for name, call in candidates.items():
        repeated(call, 2)
        repeats[name] = max(1, int(round_seconds / max(repeated(call, 1), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            seconds[name].append(repeated(call, repeats[name]))
    first = next(iter(candidates))
    timings, ratios = {}, {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, low, high)
        ratios[name] = statistics.median(v / f for v, f in zip(values, seconds[first], strict=True))
    return timings, ratios


def _repeated_on_cpu(call: Callable[[], object], times: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _repeated_on_gpu(call: Callable[[], object], times: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes of GPU memory that a call needs beyond what is there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What a record must say of where it was taken."""
    from llmcore import _extension

    cpu = _extension.cpu()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    gpu = _gpu() if device == "cuda" else {}
    return {
        **gpu,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu kernels": cpu.isa() if cpu else "absent",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def folder_name(where: dict[str, str | int]) -> str:
    """Of the records of a machine, as machine() describes it."""
    name = str(where["gpu"]) if "gpu" in where else f"{where['processor']} {where['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _gpu() -> dict[str, str | int]:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True).stdout.split(",")
    except OSError:
        said = []
    names = ("driver", "SM clock", "memory clock")
    facts = {name: value.strip() for name, value in zip(names, said, strict=False)}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = "absent"
    return {"gpu": torch.cuda.get_device_name(), **facts}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        info = {name.strip(): value.strip() for name, value in fields.items()}
        return f"{info['model name']} family {info['cpu family']} model {info['model']}"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
