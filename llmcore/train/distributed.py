"""The processes of a run as one world: collectives (NCCL on GPUs, gloo on CPUs), and what all of them must agree on."""

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llmcore.train.config import ConfigError
from llmcore.train.launch import launched, threads_per_process

T = TypeVar("T")
_ended: list[Any] = []  # process groups, see join


@dataclass(frozen=True)
class World:
    """This process, `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: torch.device

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all ranks' values, on all ranks; each of them must call it."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value

    def most(self, value: int) -> int:
        """The largest of all ranks' values, on all ranks; each of them must call it. No GPU takes part."""
        if self.size == 1:
            return value
        box = torch.tensor(int(value))  # a bool would be of another type, and size, than the other ranks' numbers
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on all ranks; each of them must call it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def on_first(self, function: Callable[[], T]) -> T:
        """Rank 0 calls `function`; what it returns, all ranks return, and what it raises, all ranks raise."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = function()
            except Exception as error:
                outcome = error
        outcome = self.from_first(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def agree(self, facts: dict[str, str]) -> None:
        """Raise a ConfigError, on all ranks, unless all ranks bring the same facts: digests by what they are of."""
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (socket.gethostname(), facts))
        first_host, first = everyone[0]
        for rank, (host, given) in enumerate(everyone):
            for name, value in first.items():
                if given[name] != value:
                    raise ConfigError(
                        f"rank {rank} on {host} has another {name} than rank 0 on {first_host} "
                        f"({given[name][:12]}, not {value[:12]}); all ranks must have the same."
                    )


@contextmanager
def join(device: torch.device, alone: bool = True) -> Iterator[World]:
    """Join the processes that the launcher started. A process without a launcher is a world of one, with a process
    group of one if it must not be `alone`."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not launched() and alone:
        yield World(0, 1, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launched():
        if device.type == "cpu":
            torch.set_num_threads(threads_per_process(int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        # DDP, which an exception's traceback keeps alive, must not be the last to let go of the group: it would hold
        # Python's lock while it waits for gloo's threads, which may need the lock to end
        _ended.append(dist.group.WORLD)
        dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def seed_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Random numbers of a forward pass depend on nothing but these: there is no generator state to save."""
    value = int(np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(value)  # torch.manual_seed formats a stack trace where no GPU is in use
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


def digest(*parts: object) -> str:
    """SHA-256 of some values' text."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def code_digest(script: Path) -> str:
    """SHA-256 of the training script and of this package's Python source."""
    package = Path(__file__).parents[1]
    files = [script, *sorted(package.rglob("*.py"))]
    return digest(*(file.read_text(encoding="utf-8") for file in files))
