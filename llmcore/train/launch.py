"""How the processes of a run are started: by torchrun, by the `deepspeed` launcher, or by `launch`."""

import logging
import os
import signal
import sys
import uuid
from typing import NoReturn

import torch

from llmcore.train.config import ConfigError

SET_BY_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = "torchrun --nproc_per_node=N train_minimal.py"


def adopt_launcher(argv: list[str]) -> list[str]:
    """`argv` without what the `deepspeed` launcher adds to it; its name for the processes of a machine becomes
    torchrun's."""
    if "LOCAL_SIZE" in os.environ and "RANK" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
        return [argument for argument in argv if not argument.startswith("--local_rank=")]
    return argv


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return all(name in os.environ for name in SET_BY_LAUNCHERS)


def is_first() -> bool:
    """Whether this process speaks for its machine."""
    return not launched() or os.environ["LOCAL_RANK"] == "0" or not os.environ["LOCAL_RANK"].isdecimal()


def world_size(num_gpus: int | None, engine: str = "auto") -> int:
    """The number of processes: the launcher's, or what was asked for. Raises ConfigError."""
    if not launched():
        _require_no_half_launcher()
        if engine == "ddp" and num_gpus is None:
            raise ConfigError(
                f"engine is ddp, but this process was started alone; start it by {TORCHRUN}, or give --num_gpus N."
            )
        return num_gpus or 1
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        value, lowest = os.environ[name], int(name.endswith("WORLD_SIZE"))
        if not value.isdecimal() or int(value) < lowest:
            raise ConfigError(f"the environment's {name} is {value!r}; allowed is a whole number of at least {lowest}.")
    for name, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if int(os.environ[name]) >= int(os.environ[of]):
            raise ConfigError(
                f"the environment's {name} is {os.environ[name]}; allowed is less than {of}, {os.environ[of]}."
            )
    port = os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"the environment's MASTER_PORT is {port!r}; allowed is a port from 1 to 65535.")
    size = int(os.environ["WORLD_SIZE"])
    if num_gpus not in (None, size):
        raise ConfigError(
            f"num_gpus is {num_gpus}, but the launcher has started {size} processes; allowed is {size} or null."
        )
    return size


def _require_no_half_launcher() -> None:
    """Raise a ConfigError if this process is one of several that know nothing of each other."""
    if "RANK" in os.environ:
        missing = [name for name in SET_BY_LAUNCHERS if name not in os.environ]
        raise ConfigError(
            f"the environment says RANK={os.environ['RANK']} but lacks {', '.join(missing)}; "
            f"start it by {TORCHRUN}, or unset RANK to train in one process."
        )
    for launcher, name in (("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE")):
        count = os.environ.get(name, "1")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{launcher} has started {count} processes ({name}={count}) that do not know of each other; "
                f"let it start one {TORCHRUN} on each machine."
            )


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
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched() else 0)


def leave(code: int) -> NoReturn:
    """End this process. One of several leaves without Python's own farewell, in which gloo's threads may abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if launched():
        os._exit(code)
    sys.exit(code)


def threads_per_process(local_size: int) -> int:
    """This machine's processors, shared fairly. OMP_NUM_THREADS rules where it is not the 1 that torchrun sets."""
    asked = os.environ.get("OMP_NUM_THREADS", "1")
    if asked.isdecimal() and int(asked) > 1:
        return int(asked)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // local_size)


def launch(count: int, command: list[str]) -> int:
    """Run `command` in `count` processes of this machine; the exit code of the first that fails, or 0. A process that
    is killed takes the others with it, and is told of."""
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
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds in which a rank may save what it has
    logging.disable(logging.ERROR)  # the launcher's own: the processes say why they stop
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # the launcher's own way to end the others
                name = signal.Signals(-failure.exitcode).name
                print(f"train_minimal.py: rank {rank} of {count} was killed by {name}.", file=sys.stderr)
                return 128 - failure.exitcode
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
