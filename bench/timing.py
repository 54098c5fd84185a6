"""Timing several candidates in one run, in interleaved rounds: a machine that changes speed changes all of them."""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llmcore.train.machine import keep_freed_memory as keep_freed_memory

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: of each round, their median, and their first and third quartile."""

    rounds: tuple[float, ...]
    median: float
    low: float
    high: float


def interleaved(
    candidates: dict[str, Call], *, device: str = "cpu", rounds: int = 9, round_seconds: float = 0.02
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
        timings[name] = Timing(tuple(values), median, low, high)
        ratios[name] = statistics.median(v / f for v, f in zip(values, seconds[first], strict=True))
    return timings, ratios


def _repeated_on_cpu(call: Call, times: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _repeated_on_gpu(call: Call, times: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def graphed(call: Call, calls: int = 1) -> Call:
    """A CUDA graph of `calls` calls one after the other: what they cost a GPU that never waits for Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


class Rotated:
    """Calls one after the other, each on inputs of its own: together they do not fit the cache."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls, self.next = calls, 0

    def __call__(self) -> object:
        self.next = (self.next + 1) % len(self.calls)
        return self.calls[self.next]()


def peak_memory(call: Call, device: str) -> int | None:
    """Bytes that a call needs beyond what is there before it; None where this cannot be measured.

    On a GPU what PyTorch's allocator hands out, on the CPU the pages that the process touches (Linux with glibc).
    """
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    try:
        if trim is None:
            return None
        trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the highest VmRSS, back
        call()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    """Bytes that /proc/self/status gives for a field."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block PyTorch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
