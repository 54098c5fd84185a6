"""Gradients that are no numbers: the step is not made, on any rank, and counted; losses that jump are found."""

import importlib.util
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import train_minimal
from llmcore.train.config import OptimizerConfig
from llmcore.train.guard import Guard, Spikes
from llmcore.train.optimizer import build_optimizer
from llmcore.train.run import read_log

Script = Callable[[list[str], list[str]], subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc_per_node", "2"]
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
# train_minimal.py with a gradient of one rank that is not a number in some steps, before DDP averages it
POISONED = """
import os, sys
sys.path.insert(0, {root!r})
import train_minimal
steps, original = 0, train_minimal.forward_backward
def forward_backward(engine, *arguments):
    global steps
    steps += 1
    hook = None
    if os.environ["RANK"] == "1" and steps in {bad!r}:
        hook = next(engine.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    loss = original(engine, *arguments)
    if hook:
        hook.remove()
    return loss
train_minimal.forward_backward = forward_backward
sys.exit(train_minimal.main(sys.argv[2:]))  # the first is the script that this one stands for
"""


def poison(monkeypatch: pytest.MonkeyPatch, bad: range, value: float = math.nan) -> None:
    steps, original = iter(range(1, 1000)), train_minimal.forward_backward

    def forward_backward(engine, *arguments):
        loss = original(engine, *arguments)
        if next(steps) in bad:
            next(engine.model.parameters()).grad.view(-1)[0] = value
        return loss

    monkeypatch.setattr(train_minimal, "forward_backward", forward_backward)


def same_files(a: Path, b: Path) -> bool:
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in ("model.safetensors", "optimizer.safetensors"))


@pytest.mark.parametrize("kind", ["adamw", "adam", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_a_finite_gradient_is_not_made(small, tmp_path: Path, monkeypatch, kind: str, value: float):
    poison(monkeypatch, range(3, 4), value)
    options = ["--name", "a", "--checkpoint_interval", "1", "--keep_checkpoints", "null", "--optimizer.kind", kind]
    assert train_minimal.main([*small, *options]) == 0
    run = tmp_path / "runs" / "a"
    assert same_files(run / "step_2", run / "step_3") and not same_files(run / "step_3", run / "step_4")
    lines = [line for line in read_log(run) if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in lines)


ENGINES = [
    "ddp",
    *(pytest.param(name, marks=NEEDS_DEEPSPEED) for name in ("zero 3 fp32", "zero 2 bf16")),
    *(
        pytest.param(name, marks=[NEEDS_DEEPSPEED, pytest.mark.slow])
        for name in ("zero 1 fp32", "zero 2 fp32", "zero 1 bf16", "zero 3 bf16", "zero 2 fp16")
    ),
]


def poisoned(engine: str, tmp_path: Path, small: list[str], bad: list[int]) -> tuple[list[str], list[str]]:
    """A script of two ranks, the second of which has a gradient that is no number in the steps `bad`, and options."""
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(root=str(ROOT), bad=bad))
    options = [*small, "--name", "a", "--checkpoint_interval", "1", "--keep_checkpoints", "null"]
    if engine != "ddp":
        _, stage, precision = engine.split()
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": int(stage)}}))
        options += ["--deepspeed", str(tmp_path / "zero.json"), "--precision", precision]
    return [*TORCHRUN, str(script)], options


@pytest.mark.parametrize("engine", ENGINES)
def test_one_ranks_gradient_stops_the_step_of_all(engine: str, small, tmp_path: Path, run_script: Script):
    result = run_script(*poisoned(engine, tmp_path, small, [3]))
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "a"
    assert same_files(run / "step_2", run / "step_3") and not same_files(run / "step_3", run / "step_4")
    assert [line["skipped"] for line in read_log(run) if "loss" in line] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero 3 bf16", marks=[NEEDS_DEEPSPEED, pytest.mark.slow])])
def test_ten_in_a_row_end_the_run_of_all_ranks(engine: str, small, tmp_path: Path, run_script: Script):
    launcher, options = poisoned(engine, tmp_path, small, list(range(4, 20)))
    options += ["--max_steps", "20", "--checkpoint_interval", "3"]
    result = run_script(launcher, options)
    assert result.returncode == 1
    run = tmp_path / "runs" / "a"
    words = f"the gradient was not finite in 10 steps in a row, the last one at step 13; lower optimizer.lr; --resume {run} goes"
    assert result.stderr.count(words) == 1
    result = run_script(TORCHRUN, ["--resume", str(run), "--max_steps", "16"])
    assert result.returncode == 0, result.stderr
    assert (run / "final").resolve().name == "step_16"


def test_many_in_a_row_end_the_run_with_a_healthy_checkpoint(small, tmp_path: Path, monkeypatch, capsys):
    poison(monkeypatch, range(4, 100))
    options = ["--name", "a", "--checkpoint_interval", "2", "--max_steps", "20", "--max_skipped", "5"]
    assert train_minimal.main([*small, *options]) == 1
    run = tmp_path / "runs" / "a"
    said = capsys.readouterr().err
    assert "the gradient was not finite in 5 steps in a row, the last one at step 8" in said and str(run) in said
    monkeypatch.undo()
    assert train_minimal.main(["--resume", str(run)]) == 0
    assert (run / "final").resolve().name == "step_20"


def test_a_skipped_step_leaves_no_trace_in_the_moments():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimizerConfig())
    guard = Guard(torch.device("cpu"))
    before = None
    for factor in (1.0, math.nan):
        (model(torch.ones(3)).sum() * factor).backward()
        optimizer.step(skip=guard.check(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.zero_grad()
        state = {n: {k: v.clone() for k, v in optimizer.state_of(p).items()} for n, p in model.named_parameters()}
        weights = [p.detach().clone() for p in model.parameters()]
        before = before or (state, weights)
    assert all(torch.equal(a, b) for a, b in zip(weights, before[1], strict=True))
    assert all(torch.equal(state[n][k], before[0][n][k]) for n in state for k in state[n])
    assert guard.read() == (1, 1)


def test_the_guard_counts_in_a_row_over_readings():
    guard = Guard(torch.device("cpu"))
    good, bad = torch.tensor(1.0), torch.tensor(math.inf)
    for norm in (bad, bad, good, bad):
        guard.check(norm)
    assert guard.read() == (3, 2)
    guard.check(bad)
    assert guard.read() == (4, 2), "the row goes on from before the reading"
    guard.check(good)
    assert guard.read() == (4, 2) and guard.read() == (4, 0)


def test_spikes_are_told_from_noise_and_from_nan():
    spikes = Spikes()
    noise = torch.Generator().manual_seed(0)
    for _ in range(40):
        assert spikes.find(2.0 + 0.02 * torch.randn((), generator=noise).item()) is None
    assert spikes.find(math.nan) is None and spikes.find(math.inf) is None
    assert spikes.find(3.0) == pytest.approx(2.0, abs=0.05)
    assert spikes.find(2.0) is None
