"""The processes of a run as one world: collectives (NCCL on GPUs, gloo on CPUs), and what all of them must agree on."""

import contextlib
import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llmcore.train.config import ConfigError
from llmcore.train.launch import is_first, launched, threads_per_process

T = TypeVar("T")
# Whoever lets go of a process group last waits for gloo's threads to end, which may wait for the interpreter. Python
# unlocks it meanwhile; DDP, which a traceback keeps for longer than the group, does not, and hangs. So it is kept here.
_last_group: list[Any] = []


class Lost(RuntimeError):
    """Another process of the run is gone."""


class Unreachable(RuntimeError):
    """The processes of the run do not find each other; the message says what to do."""


@dataclass(frozen=True)
class World:
    """This process, `rank` of `size`, computing on `device`; `store` is the one where all of them met."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None

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
        box = torch.tensor(int(value))  # of one type on all ranks: the bytes of others hang or kill gloo
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

    def is_first_to_say(self, message: str) -> bool:
        """Whether no other process of this machine has said it. Needs none of the other ranks, which may be gone."""
        if self.store is None:
            return True
        machine = os.environ.get("GROUP_RANK", socket.gethostname())
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            _require_listening(address)  # a store that is gone is complained of in C++
            return self.store.add(digest("said", machine, message), 1) == 1
        except (OSError, RuntimeError):  # it was rank 0's, for whom the next one speaks, or another machine's
            return is_first() or self.rank == 1

    def agree(self, facts: dict[str, str]) -> None:
        """Raise a ConfigError, on all ranks, unless all ranks bring the same facts: values or digests, by name."""
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
                        f"({given[name] or 'none'}, not {value or 'none'}); all ranks must have the same."
                    )


@contextlib.contextmanager
def join(device: torch.device, alone: bool = True) -> Iterator[World]:
    """Join the processes that the launcher started. A process without a launcher is a world of one, with a process
    group of one if it must not be `alone`."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not launched() and alone:
        yield World(0, 1, device)
        return
    if launched() and device.type == "cpu":
        torch.set_num_threads(threads_per_process(int(os.environ["LOCAL_WORLD_SIZE"])))
    if launched():
        _require_address(os.environ["MASTER_ADDR"])
    try:
        store = _connect("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except RuntimeError as error:
        me = f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"
        raise Unreachable(
            f"{me} could not connect to the other ranks; if they run, let GLOO_SOCKET_IFNAME (on GPUs also "
            "NCCL_SOCKET_IFNAME) name the network interface that leads to them"
        ) from error
    mine = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads them without a launcher, too
    try:
        with patch.dict(os.environ, {} if launched() else mine):
            yield World(dist.get_rank(), dist.get_world_size(), device, store)
    except RuntimeError as error:
        if _is_lost(error):
            raise Lost from error
        raise
    finally:
        _last_group[:] = [dist.group.WORLD]
        dist.destroy_process_group()


def _require_address(name: str) -> None:
    """Raise Unreachable unless this machine finds the address of `name`: PyTorch would ask for minutes."""
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        raise Unreachable(
            f"the environment's MASTER_ADDR is {name!r}, of which this machine finds no address"
        ) from error


def _connect(backend: str) -> dist.Store | None:
    """Make the process group; its store, or None where this process is alone."""
    if not launched():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return None
    store, rank, size = next(dist.rendezvous("env://"))
    store = _unused(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return store


def _unused(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of the store to which only these processes write. torchrun keeps its store when it starts the ranks again,
    and with it the addresses of those that are dead, to which gloo would try to connect."""
    mine = uuid.uuid4().hex
    store.set(f"start/{rank}", mine)
    while True:
        if rank == 0:
            store.set("starts", b" ".join(store.multi_get([f"start/{r}" for r in range(size)])).decode())
        starts = store.get("starts").decode()
        if mine in starts:  # and if every rank says so of its own, then none of them is of an earlier time
            part = dist.PrefixStore(digest(starts), store)
            part.set(str(rank), "")
            if part.check([str(r) for r in range(size)]):
                return part
        time.sleep(0.02)


def _require_listening(address: tuple[str, int]) -> None:
    """Raise an OSError unless the store is there. One that dies with rank 0 still lets one connect, but not wait;
    torchrun's outlives the ranks."""
    with socket.create_connection(address, timeout=5) as connection:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            connection.recv(1)
            raise ConnectionError("it does not wait")


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    gloo = type(error) is RuntimeError and re.search(r"gloo.*(closed|reset|[Bb]roken|[Tt]imed? ?out)", str(error), re.S)
    return isinstance(error, dist.DistError) or bool(gloo)


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
