"""What may happen to a run: it is killed, the disk is full, files are torn or flipped, another process writes there."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train_minimal
from llmcore.train import run as runs
from llmcore.train.config import ConfigError
from llmcore.train.run import read_log

ROOT = Path(__file__).parents[2]
FILES = ("model.safetensors", "optimizer.safetensors", "ema/model.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES if (a / name).exists())


def test_fifty_kills_change_no_bit(small: list[str], tmp_path: Path):
    argv = [*small, "--max_steps", "600", "--checkpoint_interval", "2", "--eval_interval", "6", "--ema_decay", "0.9",
            "--sample.tokens", "0"]  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "train" / "crash.py"), "50", "1", *argv, "--name", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    died = json.loads(result.stdout)
    assert sum(died.values()) == 50 and all(died[place] >= 5 for place in ("step", "save", "validation", "clock"))
    assert train_minimal.main([*argv, "--name", "straight"]) == 0
    killed, straight = tmp_path / "runs" / "killed", tmp_path / "runs" / "straight"
    assert (killed / "final").resolve().name == (straight / "final").resolve().name == "step_600"
    assert same_bits(straight / "step_600", killed / "step_600")
    assert not list(killed.glob("*.tmp")) and not list(killed.glob("*.corrupt"))
    assert {line["step"]: line["loss"] for line in read_log(killed) if "loss" in line} == {
        line["step"]: line["loss"] for line in read_log(straight) if "loss" in line
    }


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_is_locked_while_it_is_written(small: list[str], tmp_path: Path, monkeypatch, capsys, resumed: bool):
    fcntl = pytest.importorskip("fcntl")
    run, argv = tmp_path / "runs" / "a", [*small, "--name", "a"]
    if resumed:
        assert train_minimal.main(argv) == 0
        argv = ["--resume", str(run), "--max_steps", "8"]
    lock, train, modes = fcntl.flock, train_minimal.train, []

    def flock(file, operation):
        if operation & fcntl.LOCK_EX:
            modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
        lock(file, operation)

    def train_while_another_tries(*arguments):
        assert train_minimal.main(["--resume", "auto", *small, "--name", "a"]) == 2
        with contextlib.ExitStack() as held, pytest.raises(ConfigError, match="is being written by another process"):
            runs.open_run(arguments[0], runs.Start(run), held)
        train(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(train_minimal, "train", train_while_another_tries)
    assert train_minimal.main(argv) == 0
    assert f"the run {run} is being written by another process" in capsys.readouterr().err
    assert set(modes) == {os.O_RDWR}, "NFS locks only what may be written to"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_that_knows_no_locks(small: list[str], tmp_path: Path, monkeypatch, number: int):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    assert train_minimal.main([*small, "--name", "a"]) == 0
    assert train_minimal.main(["--resume", str(tmp_path / "runs" / "a"), "--max_steps", "8"]) == 0
