"""The processes of a run: started by torchrun or by `launch`, joined by collectives (NCCL on GPUs, gloo on CPUs).

Each rank holds a copy of the model and works on one slice of the batch; DDP averages the gradients.
"""

import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmcore.train.config import ConfigError

T = TypeVar("T")


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
        box = torch.tensor(value)
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


def launched() -> bool:
    """Whether torchrun, or `launch`, started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))


def is_first() -> bool:
    """Whether this process speaks for its machine."""
    return not launched() or os.environ.get("LOCAL_RANK", "0") == "0"


def world_size(num_gpus: int | None) -> int:
    """The number of processes: the launcher's, or what was asked for."""
    if not launched():
        return num_gpus or 1
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        value, lowest = os.environ.get(name, "0"), int(name.endswith("WORLD_SIZE"))
        if not value.isdecimal() or int(value) < lowest:
            raise ConfigError(f"the environment's {name} is {value!r}; allowed is a whole number of at least {lowest}.")
    size = int(os.environ["WORLD_SIZE"])
    if num_gpus not in (None, size):
        raise ConfigError(
            f"num_gpus is {num_gpus}, but the launcher has started {size} processes; allowed is {size} or null."
        )
    return size


def device(world_size: int) -> torch.device:
    """Where this process computes: its own GPU, or the CPU on a machine without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else world_size
    available = torch.cuda.device_count()
    if here > available:
        raise ConfigError(
            f"{here} processes need {here} GPUs; this machine has {available}, so allowed is up to {available}."
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0)


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Join the processes that the launcher started; alone, this is a world of one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not launched():
        yield World(0, 1, device)
        return
    if device.type == "cpu":
        torch.set_num_threads(threads_per_process(int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def replicate(model: nn.Module, seq_len: int) -> DistributedDataParallel:
    """The model under DDP, whose gradient buckets are already those of the whole run.

    DDP groups the gradients anew after its first backward, in the order in which they came. Sums of three ranks and
    more round differently in other groups, so that a run which was resumed would part from one that was not. Two
    backward passes of a zero loss bring this before the first step.
    """
    parallel = DistributedDataParallel(model)
    tokens = torch.zeros(1, seq_len, dtype=torch.int64, device=next(model.parameters()).device)
    for _ in range(2):
        (parallel(tokens, tokens).loss * 0).backward()
        model.zero_grad()
    return parallel


def threads_per_process(local_size: int) -> int:
    """This machine's processors, shared fairly. OMP_NUM_THREADS rules where it is not the 1 that torchrun sets."""
    asked = os.environ.get("OMP_NUM_THREADS", "1")
    if asked.isdecimal() and int(asked) > 1:
        return int(asked)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // local_size)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step depend on nothing but (seed, step, rank): there is no generator state to save."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def launch(count: int, command: list[str]) -> int:
    """Run `command` in `count` processes of this machine; the exit code of the first that fails, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    logging.disable(logging.WARNING)  # the launcher's own: the processes say why they stop
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
