"""What one sees of a run: a live line on a terminal, plain lines elsewhere; and how fast it is."""

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llmcore.train.distributed import World
from llmcore.train.peak import peak_tflops
from llmcore.train.run import append_log
from llmcore.train.sinks import Sink

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

SECONDS_BETWEEN_LINES = 5  # where each of them stays


@dataclass(frozen=True)
class Reading:
    """Mean loss (nats per token) over steps and ranks, the last gradient's norm before it was clipped, and the speed of
    all ranks together. Steps whose loss is not finite do not count, unless all are.

    mfu: the model's FLOPs (Chowdhery et al., arXiv:2204.02311, appendix B) as a share of the peak of all GPUs together;
    None where the peak is not known. memory_gb: the largest memory of this process so far; None where it is not known.
    """

    loss: float
    grad_norm: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    memory_gb: float | None

    def __str__(self) -> str:
        parts = [f"{self.tokens_per_second:,.0f} tokens/s", f"{self.tflops:.3f} TFLOP/s"]
        if self.mfu is not None:
            parts.append(f"MFU {100 * self.mfu:.1f} %")
        if self.memory_gb is not None:
            parts.append(f"{self.memory_gb:.1f} GB")
        return "  ".join(parts)


class Meter:
    """Mean loss and speed of the steps since the last reading. What runs inside `paused` does not count."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, device: torch.device, world_size: int) -> None:
        self.tokens_per_step, self.flops_per_token, self.device = tokens_per_step, flops_per_token, device
        self.peak: float | None = None  # TFLOP/s of all devices
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            peak = peak_tflops(torch.cuda.get_device_name(device))
            self.peak = None if peak is None else peak * world_size
        self.zero = torch.zeros((), device=device)
        self.loss = self.finite = self.norm = self.zero
        self.steps = 0
        self.began = time.perf_counter()
        self.seconds_paused = 0.0  # in all

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """One step's loss on this rank, and the norm of its gradient, which is the same on all ranks."""
        finite = loss.detach().isfinite()
        self.loss = self.loss + torch.where(finite, loss.detach(), 0.0)
        self.finite = self.finite + finite
        self.norm = norm.detach()
        self.steps += 1

    def read(self, world: World) -> Reading:
        """All ranks must call it."""
        sums = world.sum(torch.stack([self.loss, self.finite]))
        # the one wait for the device, after which the time is honest
        total, counted, norm = torch.cat([sums, self.norm.reshape(1)]).tolist()
        speed = self.steps * self.tokens_per_step / (time.perf_counter() - self.began)
        tflops = speed * self.flops_per_token / 1e12
        reading = Reading(
            loss=total / counted if counted else math.nan,
            grad_norm=norm,
            tokens_per_second=speed,
            tflops=tflops,
            mfu=None if self.peak is None else tflops / self.peak,
            memory_gb=peak_memory_gb(self.device),
        )
        self.loss = self.finite = self.zero
        self.steps, self.began = 0, time.perf_counter()
        return reading

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the steps that are still to be computed count
        since = time.perf_counter()
        yield
        seconds = time.perf_counter() - since
        self.began += seconds
        self.seconds_paused += seconds


def peak_memory_gb(device: torch.device) -> float | None:
    """In 1e9 bytes: of a GPU, the most that PyTorch has held of it; on a CPU, the most that this process has held
    since it was started, or None where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Report:
    """What the first process tells: on standard output, and in the run's log.jsonl. The other processes are silent."""

    def __init__(self, run: Path, first: bool, sinks: Sequence[Sink] = ()) -> None:
        self.run, self.first, self.sinks = run, first, sinks
        self.last_line = -math.inf
        self.held_back: str | None = None
        self.anchor: tuple[float, float] | None = None  # (time, done) of the first state shown
        live = first and sys.stdout.isatty()
        self.bar = tqdm(total=100, bar_format="{desc} |{bar:20}|", file=sys.stdout) if live else None

    def log(self, **values: Any) -> None:
        """A line of log.jsonl."""
        if self.first:
            append_log(self.run, **values)
        figures = {name: value for name, value in values.items() if isinstance(value, float) and name != "seconds"}
        for sink in self.sinks if figures else ():
            sink.write(values["step"], figures)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        elif self.first:
            try:
                print(text, flush=True)
            except BrokenPipeError:  # nobody reads any more, as after `| head`: the run goes on
                sys.stdout = open(os.devnull, "w")

    def show(self, text: str, done: float) -> None:
        """The state of the run, in place of the one before on a terminal; `done` is the share that is over."""
        now = time.perf_counter()
        began, done_then = self.anchor = self.anchor or (now, done)
        if done > done_then:
            text += f"  {clock((now - began) * (1 - done) / (done - done_then))} left"
        if self.bar is not None:
            self.bar.n = 100 * done
            self.bar.set_description_str(text)
        elif now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line, self.held_back = now, None
            self.say(text)
        else:
            self.held_back = text

    def close(self) -> None:
        """End the live line, with the last state in it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        elif self.held_back is not None:
            self.say(self.held_back)
            self.held_back = None

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for sink in self.sinks:
            sink.close()


def clock(seconds: float) -> str:
    """Such as 4:05 or 1:00:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
