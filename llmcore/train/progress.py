"""What one sees of a run: a live line on a terminal, plain lines elsewhere; and how fast it is."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llmcore.train.distributed import World
from llmcore.train.run import append_log

SECONDS_BETWEEN_LINES = 5  # where each of them stays


@dataclass(frozen=True)
class Reading:
    """Mean loss (nats per token) over steps and ranks, the last gradient's norm before it was clipped, and the speed of
    all ranks together. Steps whose loss is not finite do not count, unless all are."""

    loss: float
    grad_norm: float
    tokens_per_second: float
    tflops: float

    def __str__(self) -> str:
        return f"{self.tokens_per_second:,.0f} tokens/s  {self.tflops:.3f} TFLOP/s"


class Meter:
    """Mean loss and speed of the steps since the last reading. What runs inside `paused` does not count."""

    def __init__(self, tokens_per_step: int, flops_per_token: float) -> None:
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.loss = self.norm = torch.zeros(())
        self.finite = torch.zeros(())
        self.steps = 0
        self.began = time.perf_counter()
        self.seconds_paused = 0.0  # in all

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """One step's loss on this rank, and the norm of its gradient."""
        finite = loss.detach().isfinite()
        self.loss = self.loss + torch.where(finite, loss.detach(), 0.0)
        self.finite = self.finite + finite
        self.norm = norm
        self.steps += 1

    def read(self, world: World) -> Reading:
        """All ranks must call it."""
        total, counted = world.sum(torch.stack([self.loss, self.finite])).tolist()  # waits for the device: honest time
        speed = self.steps * self.tokens_per_step / (time.perf_counter() - self.began)
        reading = Reading(
            total / counted if counted else math.nan, self.norm.item(), speed, speed * self.flops_per_token / 1e12
        )
        self.loss, self.finite = torch.zeros(()), torch.zeros(())
        self.steps, self.began = 0, time.perf_counter()
        return reading

    @contextmanager
    def paused(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        seconds = time.perf_counter() - since
        self.began += seconds
        self.seconds_paused += seconds


class Report:
    """What the first process tells: on standard output, and in the run's log.jsonl. The other processes are silent."""

    def __init__(self, run: Path, first: bool) -> None:
        self.run, self.first = run, first
        self.last_line = -math.inf
        self.held_back: str | None = None
        self.anchor: tuple[float, float] | None = None  # (time, done) of the first state shown
        live = first and sys.stdout.isatty()
        self.bar = tqdm(total=100, bar_format="{desc} |{bar:20}|", file=sys.stdout) if live else None

    def log(self, **values: Any) -> None:
        """A line of log.jsonl."""
        if self.first:
            append_log(self.run, **values)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        elif self.first:
            print(text, flush=True)

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


def clock(seconds: float) -> str:
    """Such as 4:05 or 1:00:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
