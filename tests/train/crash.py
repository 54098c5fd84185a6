"""Kills a run over and over and lets it go on: `python crash.py KILLS SEED OPTION ...`, options of train_minimal.py.

The run is made by forked children of this process, each of which goes on with --resume auto and gets SIGKILL: in a
step, in a save, in a validation, or at a moment of the clock. After each kill every checkpoint that has its final name
must verify. At the end nobody is killed. Prints, as JSON, how many died where.
"""

import collections
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402

import train_minimal  # noqa: E402
from llmcore.train import checkpoint, saver  # noqa: E402
from llmcore.train.engine import Engine  # noqa: E402

PLACES = {
    "step": [(train_minimal, "forward_backward"), (Engine, "backward"), (Engine, "step"), (train_minimal, "Meter")],
    "save": [
        (checkpoint, "save_file"), (checkpoint, "_sha256"), (checkpoint, "_flush"), (checkpoint.os, "rename"),
        (saver, "tidy"), (checkpoint, "point"), (checkpoint.shutil, "rmtree"), (Engine, "snapshot"),
    ],
    "validation": [(train_minimal, "gather"), (train_minimal, "bits_per_byte")],
}  # fmt: skip


def die_at(place: str, count: int) -> None:
    """From now on the call number `count` of the functions of `place` kills this process, before or after it."""
    calls = 0

    def killing(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for owner, name in PLACES[place]:
        setattr(owner, name, killing(getattr(owner, name)))


def child(argv: list[str], place: str | None, count: int) -> int:
    """Go on with the run in a fork; the process's number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if place in PLACES:
        die_at(place, count)
    os._exit(train_minimal.main([*argv, "--resume", "auto"]))


def main() -> None:
    kills, seed, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    draw = random.Random(seed)
    run = Path(argv[argv.index("--out_dir") + 1]) / argv[argv.index("--name") + 1]
    torch.set_num_threads(1)
    died: collections.Counter[str] = collections.Counter()
    while died.total() < kills:
        place = draw.choice([*PLACES, "clock"])
        process = child(argv, place, draw.randint(1, 20))
        if place == "clock":
            time.sleep(draw.uniform(0.2, 0.9))
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if not os.WIFSIGNALED(status):
            raise SystemExit(
                f"the run ended with {os.waitstatus_to_exitcode(status)} before it was killed {kills} times"
            )
        died[place] += 1
        for path in checkpoint.checkpoints(run).values():
            if path.suffix != ".corrupt":
                checkpoint.verify(path)
    code = os.waitstatus_to_exitcode(os.waitpid(child(argv, None, 0), 0)[1])
    if code:
        raise SystemExit(code)
    print(json.dumps(died))


if __name__ == "__main__":
    main()
