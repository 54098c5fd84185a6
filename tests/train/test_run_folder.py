"""The folder of a run: which one is meant, what may be there already, and who may read and write it."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml

import train_minimal
from llmcore.train.checkpoint import SaveError, point
from llmcore.train.config import ConfigError, TrainConfig
from llmcore.train.machine import out_of_memory
from llmcore.train.run import Start, open_run, read_log

NOBODY = 65534


def refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert train_minimal.main(argv) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and words in output.err and output.out == "", output.err


def test_auto_takes_no_folder_that_is_no_run(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = tmp_path / "runs"
    (runs / "notes" / "step_3.tmp").mkdir(parents=True)
    (runs / "link").symlink_to("nowhere")
    (runs / "file").write_text("kept")
    for name in ("notes", "link", "file"):
        refused([*small, "--resume", "auto", "--name", name], f"{runs / name} is no run, as it holds no", capsys)
        refused([*small, "--name", name], f"the run {runs / name} exists already", capsys)
    assert sorted(path.name for path in runs.rglob("*")) == ["file", "link", "notes", "step_3.tmp"]


@pytest.mark.parametrize("written", [None, "", "seed: 7\n"])
def test_a_run_that_was_killed_while_it_was_made(written: str | None, small: list[str], tmp_path: Path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    if written is not None:
        (run / "config.yaml").write_text(written)
    assert train_minimal.main([*small, "--resume", "auto", "--name", "a"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 6 and (run / "step_6").is_dir()


def test_a_run_that_cannot_begin_leaves_nothing(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = tmp_path / "runs"
    assert train_minimal.main([*small, "--name", "a", "--max_steps", "2"]) == 0
    capsys.readouterr()
    argv = ["--resume", str(runs / "a" / "step_2"), "--out_dir", str(runs), "--name", "b", "--optimizer.kind", "muon"]
    assert train_minimal.main(argv) == 2
    assert "holds the state of another optimizer" in capsys.readouterr().err
    assert [path.name for path in runs.iterdir()] == ["a"]


def test_of_two_processes_at_once_one_makes_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, run = TrainConfig(out_dir=str(tmp_path), name="a"), tmp_path / "a"
    with ExitStack() as first:
        assert open_run(config, Start(), first) == run
        for exists in (True, False):  # as the second has seen it, an empty folder or none
            with monkeypatch.context() as late, ExitStack() as second:
                late.setattr("llmcore.train.run._is_taken", lambda _: False)
                late.setattr("llmcore.train.run.os.path.isdir", lambda _, exists=exists: exists)
                with pytest.raises(ConfigError, match="a cannot be made: File exists"):
                    open_run(config, Start(), second)
            assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert not run.exists()


def test_a_damaged_newest_checkpoint_is_told_of(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "runs" / "a"
    assert train_minimal.main([*small, "--name", "a", "--checkpoint_interval", "3"]) == 0
    (run / "step_6" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert train_minimal.main(["--resume", str(run)]) == 0
    words = f"from {run / 'step_3'}, as {run / 'step_6' / 'model.safetensors'} is truncated: "
    assert words in capsys.readouterr().out


def test_left_overs_of_any_kind(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "runs" / "a"
    assert train_minimal.main([*small, "--name", "a", "--max_steps", "2"]) == 0
    (run / "step_3.tmp").write_text("no folder")
    assert train_minimal.main(["--resume", str(run), "--max_steps", "4"]) == 0
    (run / "final").unlink()
    (run / "final" / "mine").mkdir(parents=True)
    with pytest.raises(SaveError, match=r"final could not be made another name of step_4: "):
        point(run, "final", 4)


@pytest.fixture
def unprivileged() -> Iterator[Callable[..., int]]:
    """train_minimal.main as a user who owns nothing, in a folder where all may write."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can become another user")
    before, public = os.getcwd(), tempfile.mkdtemp()
    os.chmod(public, 0o777)

    def main(*argv: str) -> int:
        os.setresuid(NOBODY, NOBODY, 0)
        try:
            return train_minimal.main(list(argv))
        finally:
            os.setresuid(0, 0, 0)

    os.chdir(public)
    yield main
    os.chdir(before)
    shutil.rmtree(public)


def test_what_another_user_may_not(small: list[str], unprivileged: Callable[..., int], capsys: pytest.CaptureFixture):
    Path("text.txt").write_text("a line of text\n" * 2000)
    base = [*small, "--data.train", "text.txt", "--out_dir", "runs"]
    assert train_minimal.main([*base, "--name", "a", "--max_steps", "2"]) == 0
    meta, config = Path("runs/a/step_2/meta.json"), Path("runs/a/config.yaml")
    for argv, words in (
        (
            ["--resume", "runs/a"],
            "the run is runs/a, but runs/a cannot be written to; allowed is a folder that can be.",
        ),
        ([*base, "--resume", "auto"], "the run is runs/a, but runs/a cannot be written to"),
        ([*base, "--name", "b"], "out_dir is runs, but runs cannot be written to"),
    ):
        capsys.readouterr()
        assert unprivileged(*argv) == 2
        assert words in (error := capsys.readouterr().err) and error.count("\n") == 1
    Path("runs/a").chmod(0o777)
    config.chmod(0)
    assert unprivileged("--resume", "runs/a") == 2
    assert "runs/a/config.yaml cannot be opened: Permission denied." in capsys.readouterr().err
    config.chmod(0o666)
    for file in (meta, meta.with_name("optimizer.safetensors"), meta.with_name("config.json")):
        file.chmod(0)
        assert unprivileged("--resume", "runs/a/step_2", "--out_dir", "mine") == 2
        assert f"{file} cannot be read: Permission denied." in capsys.readouterr().err
        file.chmod(0o644)
    assert unprivileged("--resume", "runs/a/step_2", "--out_dir", "mine", "--max_steps", "3") == 0


def test_memory_that_is_full(small: list[str], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    options = [*small, "--name", "a", "--checkpoint_interval", "2"]
    real, steps = train_minimal.forward_backward, iter(range(100))

    def full(*arguments):
        if next(steps) == 3:
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(*arguments)

    monkeypatch.setattr(train_minimal, "forward_backward", full)
    assert train_minimal.main(options) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the memory is full: " in error and "lower --batch_size" in error
    assert "1152921504606846976 bytes" in error and "last checkpoint, step_2" in error


def test_what_is_a_full_memory():
    assert out_of_memory(MemoryError()) == "of Python"
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried.\nmore")) == "CUDA out of memory. Tried"
    assert out_of_memory(RuntimeError("another")) is None and out_of_memory(ValueError("DefaultCPUAllocator")) is None


def test_the_log_is_json_and_skipped_steps_stay_counted(small: list[str], tmp_path: Path, monkeypatch):
    real, steps = train_minimal.forward_backward, iter(range(100))

    def poisoned(engine, *arguments):
        loss = real(engine, *arguments)
        if next(steps) in (1, 2):
            next(engine.model.parameters()).grad.view(-1)[0] = torch.nan
            loss = loss * torch.nan
        return loss

    monkeypatch.setattr(train_minimal, "forward_backward", poisoned)
    assert train_minimal.main([*small, "--name", "a", "--max_steps", "4"]) == 0
    run = tmp_path / "runs" / "a"
    assert train_minimal.main(["--resume", str(run), "--max_steps", "6"]) == 0
    for line in (run / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    readings = {line["step"]: line for line in read_log(run) if "skipped" in line}
    assert [readings[step]["skipped"] for step in range(1, 7)] == [0, 1, 2, 2, 2, 2]
    assert readings[2]["loss"] is None and readings[3]["grad_norm"] is None and readings[4]["loss"] > 0
