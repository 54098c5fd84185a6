"""The share of a training step that the default run spends outside its model, optimizer and data: reading the clock,
seeds, the schedule, guards, the log. Validations and checkpoints are no part of a step.

train_minimal.main runs as it is, with timers around the functions that do the work.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch

import train_minimal
from llmcore.data import Prefetch
from llmcore.train import distributed, engine
from llmcore.train.optimizer import Optimizers
from llmcore.train.progress import Meter

RUNS, STEPS = 5, 300
FIRST = 20  # steps that do not count: the allocator and the caches are cold
# What a step is made of; time in one that another calls is its own alone. The first begins the step, and what is named
# outside is the loop's though another may call it.
PARTS = (
    ("batch", Prefetch, "__call__"),
    ("forward and backward", train_minimal, "forward_backward"),
    ("clip", engine, "gradient_norm"),
    ("clip", torch.nn.utils, "clip_grads_with_norm_"),
    ("optimizer", Optimizers, "step"),
    ("optimizer", Optimizers, "zero_grad"),
    ("outside", distributed, "seed_step"),
)


@contextlib.contextmanager
def timers() -> Iterator[list[dict[str, float]]]:
    """Inside the block every step adds, as it begins, the seconds until then: in all ("step"), in each part and
    in pauses of the meter."""
    seconds: dict[str, float] = defaultdict(float)
    begun: list[dict[str, float]] = []
    inner = [0.0]  # seconds in the parts that each part under way has called
    paused = Meter.paused

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            since = time.perf_counter()
            if part == PARTS[0][0]:
                begun.append({**seconds, "step": since})
            inner.append(0.0)
            result = function(*arguments, **options)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # or the part's work would be waited for elsewhere
            took = time.perf_counter() - since
            seconds[part] += took - inner.pop()
            inner[-1] += took
            return result

        return call

    @contextlib.contextmanager
    def timed_pause(meter: Meter) -> Iterator[None]:
        since = time.perf_counter()
        with paused(meter):
            yield
        seconds["paused"] += time.perf_counter() - since

    with contextlib.ExitStack() as patches:
        for part, owner, name in PARTS:
            patches.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        patches.enter_context(patch.object(Meter, "paused", timed_pause))
        yield begun


def measure(steps: int = STEPS, first: int = FIRST, options: Sequence[str] = ()) -> dict[str, Any]:
    """Milliseconds of the mean step of one run, and the share of it that is outside all parts."""
    with tempfile.TemporaryDirectory() as folder, timers() as begun, contextlib.redirect_stdout(io.StringIO()):
        few = ["--sample.tokens", "0", "--final_eval_tokens", "2048"]
        code = train_minimal.main(["--out_dir", folder, "--max_steps", str(steps), *few, *options])
    if code:
        raise RuntimeError(f"train_minimal.py ended with exit code {code}")
    last, start = begun[-1], begun[first]
    spent = {name: 1e3 * (value - start.get(name, 0.0)) / (len(begun) - 1 - first) for name, value in last.items()}
    step = spent.pop("step") - spent.pop("paused", 0.0)
    outside = step - sum(value for name, value in spent.items() if name != "outside")
    parts = {name: round(value, 4) for name, value in {"step": step, **spent, "outside": outside}.items()}
    return {"milliseconds": parts, "share outside": round(outside / step, 5)}


def run() -> Iterator[dict[str, Any]]:
    shares = []
    for _ in range(RUNS):
        record = measure()
        shares.append(record["share outside"])
        shown = "  ".join(f"{name} {value:.3f}" for name, value in record["milliseconds"].items())
        print(f"milliseconds: {shown}  share outside {record['share outside']:.2%}", flush=True)
        yield record
    print(f"median of the shares: {statistics.median(shares):.2%}")
    yield {"median of the shares": statistics.median(shares)}
