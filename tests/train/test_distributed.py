"""Two processes over gloo train as one does at the same global batch, however they are started."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_minimal
from llmcore import models
from llmcore.train import distributed
from llmcore.train.checkpoint import checkpoints, newest_checkpoint
from llmcore.train.run import read_log

Script = Callable[[list[str], list[str]], subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc_per_node", "2"]

SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_minimal
original = train_minimal.forward_backward
def forward_backward(engine, inputs, targets, step):
    if step == 3 and engine.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(engine, inputs, targets, step)
train_minimal.forward_backward = forward_backward
sys.exit(train_minimal.main(sys.argv[2:]))  # the first is the script that this one stands for
"""


def curve(run: Path) -> list[float]:
    """The losses and the validations."""
    return [line[key] for line in read_log(run) for key in ("loss", "val_bpb") if key in line]


@pytest.mark.parametrize("start", ["torchrun", "num_gpus"])
def test_two_ranks_equal_one(start: str, small: list[str], tmp_path: Path, run_script: Script):
    small += ["--max_steps", "10", "--eval_interval", "5"]
    if start == "torchrun":
        argv = [*small, "--batch_size", "1", "--gradient_accumulation", "2"]  # ranks meet once a step
        result = run_script(TORCHRUN, [*argv, "--name", "two"])
    else:
        result = run_script([], [*small, "--batch_size", "2", "--name", "two", "--num_gpus", "2"])
    assert result.returncode == 0, result.stderr
    if not torch.cuda.is_available():
        assert result.stdout.count("the CPU (no GPU was found) with 2 processes, DDP over gloo") == 1
    assert train_minimal.main([*small, "--name", "one"]) == 0

    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    assert curve(two) == pytest.approx(curve(one), rel=1e-5)
    expected = models.load(one / "step_10").state_dict()
    for name, given in models.load(two / "step_10").state_dict().items():
        # Adam divides by the gradient's size: where a gradient is nothing but rounding, so is its step of up to lr.
        difference = (given - expected[name]).abs()
        assert difference.mean() < 1e-6 and difference.max() < 1e-3, name


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_many_ranks_resume_to_the_same_bits(ranks: int, small: list[str], tmp_path: Path, run_script: Script):
    launcher = [*TORCHRUN[:-1], str(ranks)]
    argv = [*small, "--checkpoint_interval", "3"]
    result = run_script(launcher, [*argv, "--name", "straight"])
    assert result.returncode == 0, result.stderr
    straight, resumed = tmp_path / "runs" / "straight", tmp_path / "runs" / "resumed"
    resumed.mkdir()
    shutil.copy(straight / "config.yaml", resumed)
    shutil.copytree(straight / "step_3", resumed / "step_3")
    result = run_script(launcher, ["--resume", str(resumed)])
    assert result.returncode == 0, result.stderr
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (resumed / "step_6" / name).read_bytes() == (straight / "step_6" / name).read_bytes()


def test_wrong_input_is_told_once(small: list[str], run_script: Script):
    result = run_script([], [*small, "--num_gpus", "2", "--engine", "single"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "engine is single, but there are 2 processes" in result.stderr


def test_seeds_differ_by_seed_step_micro_step_and_rank():
    draws = set()
    for place in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)):
        distributed.seed_step(*place)
        draws.add(torch.rand(1).item())
    assert len(draws) == 5


def test_folder_that_only_the_first_finds_unusable(small: list[str], tmp_path: Path, run_script: Script):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tmp_path / "nowhere" / "deep")  # `exists` says no, mkdir says yes
    result = run_script([], [*small, "--num_gpus", "2", "--out_dir", str(tmp_path / "runs" / "tiny" / "x")])
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("cannot be made") == 1


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_is_one_sentence(small: list[str], tmp_path: Path, processes: str, number: int):
    argv = [*small, "--num_gpus", processes, "--max_steps", "1000000", "--eval_interval", "0", "--name", "a"]
    command = [sys.executable, str(ROOT / "train_minimal.py"), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs" / "a" / "log.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # what the terminal does
    else:
        process.send_signal(number)  # what a cluster does
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, error
    lines = [line for line in error.splitlines() if line.strip()]
    name = signal.Signals(number).name
    assert len(lines) == 1 and f"train_minimal.py: interrupted by {name}; --resume " in lines[0]
    last = read_log(tmp_path / "runs" / "a")[-1]["step"]
    newest = newest_checkpoint(tmp_path / "runs" / "a")
    assert newest is not None and newest.path.name == f"step_{last}", "the step that was being made is saved"
    assert train_minimal.main(["--resume", str(tmp_path / "runs" / "a"), "--max_steps", str(last + 3)]) == 0


def test_a_signal_to_one_rank_stops_and_saves_all(small: list[str], tmp_path: Path, run_script: Script):
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(root=str(ROOT)))
    result = run_script([*TORCHRUN, str(script)], [*small, "--name", "a"])
    assert result.stderr.count("interrupted by SIGTERM; --resume") == 1, result.stderr
    assert set(checkpoints(tmp_path / "runs" / "a")) == {4}
