"""What may happen to a run: it is killed, the disk is full, files are torn or flipped, another process writes there."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import train_minimal
from llmcore.train import checkpoint
from llmcore.train.checkpoint import CheckpointError, checkpoints, verify
from llmcore.train.config import ConfigError, TrainConfig
from llmcore.train.run import find_start, open_run, read_log
from llmcore.train.saver import Saver

ROOT = Path(__file__).parents[2]
FILES = ("model.safetensors", "optimizer.safetensors", "ema/model.safetensors")


def same_bits(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES if (a / name).exists())


def test_fifty_kills_change_no_bit(small: list[str], tmp_path: Path):
    argv = [*small, "--max_steps", "400", "--checkpoint_interval", "2", "--eval_interval", "6", "--ema_decay", "0.9",
            "--sample.tokens", "0"]  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "train" / "crash.py"), "50", "1", *argv, "--name", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    died = json.loads(result.stdout)
    assert sum(died.values()) == 50 and all(died[place] >= 5 for place in ("step", "save", "validation", "clock"))
    assert train_minimal.main([*argv, "--name", "straight"]) == 0
    killed, straight = tmp_path / "runs" / "killed", tmp_path / "runs" / "straight"
    assert (killed / "final").resolve().name == (straight / "final").resolve().name == "step_400"
    assert same_bits(straight / "step_400", killed / "step_400")
    assert not list(killed.glob("*.tmp")) and not list(killed.glob("*.corrupt"))
    assert {line["step"]: line["loss"] for line in read_log(killed) if "loss" in line} == {
        line["step"]: line["loss"] for line in read_log(straight) if "loss" in line
    }


@pytest.fixture
def trained(small: list[str], tmp_path: Path) -> Path:
    """A checkpoint with every kind of file."""
    assert train_minimal.main([*small, "--name", "a", "--ema_decay", "0.9", "--max_steps", "2"]) == 0
    return tmp_path / "runs" / "a" / "step_2"


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One bit flipped, or the end torn off, or replaced by zeros as a file system may after a power cut."""
    kind, at = draw.choice(["flip", "flip", "flip", "tear", "zeros"]), draw.randrange(len(content))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    lost = content[:at]
    if kind == "zeros" and any(content[at:]):
        lost += bytes(len(content) - at)
    return lost


def test_every_torn_or_flipped_file_is_found(trained: Path):
    draw = random.Random(0)
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        content = file.read_bytes()
        for _ in range(200):
            file.write_bytes(damaged(content, draw))
            with pytest.raises(CheckpointError):
                verify(trained)
        file.write_bytes(content)
        file.chmod(0o600)
        verify(trained)


def test_every_bit_of_meta_counts(trained: Path):
    file = trained / "meta.json"
    content = file.read_bytes()
    for at in range(0, len(content) * 8, 3):
        file.write_bytes(content[: at // 8] + bytes([content[at // 8] ^ 1 << at % 8]) + content[at // 8 + 1 :])
        with pytest.raises(CheckpointError):
            verify(trained)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """tmpfs(kilobytes): a file system in memory of this size; called again, the same one with another size."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mounted = False

    def mount(kilobytes: int) -> Path:
        nonlocal mounted
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {result.stderr.strip()}")
        mounted = True
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no command mount")
    yield mount
    if mounted:
        subprocess.run(
            ["umount", "--lazy", folder], check=True
        )  # a mapped file may still wait for the garbage collector


def test_a_full_disk_loses_nothing(
    small: list[str], tmp_path: Path, tmpfs: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
):
    options = ["--max_steps", "12", "--checkpoint_interval", "2", "--keep_checkpoints", "null"]
    assert train_minimal.main([*small, *options, "--name", "straight"]) == 0
    straight = tmp_path / "runs" / "straight"
    one = sum(path.stat().st_size for path in (straight / "step_2").iterdir()) // 1024
    full = tmpfs(one * 7 // 2)  # three checkpoints and a half
    argv = [*small, *options, "--name", "a", "--out_dir", str(full)]
    capsys.readouterr()
    assert train_minimal.main(argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step_8 could not be written: " in error and "No space left on device" in error
    assert f"--resume {full / 'a'} goes on from its last checkpoint, step_6" in error
    assert set(checkpoints(full / "a")) == {2, 4, 6} and not list((full / "a").glob("*.tmp"))
    for path in checkpoints(full / "a").values():
        verify(path)
    assert train_minimal.main(["--resume", str(full / "a")]) == 1, "it is still full"
    assert set(checkpoints(full / "a")) == {2, 4, 6}
    tmpfs(one * 10)
    assert train_minimal.main(["--resume", str(full / "a")]) == 0
    assert same_bits(straight / "step_12", full / "a" / "step_12")
    assert all(math.isfinite(line["loss"]) for line in read_log(full / "a") if "loss" in line), "no torn line"


def test_a_log_that_cannot_be_written_ends_the_run(
    small: list[str], tmp_path: Path, tmpfs: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
):
    full = tmpfs(16)
    options = ["--name", "a", "--out_dir", str(full), "--max_steps", "400", "--eval_interval", "0"]
    assert train_minimal.main([*small, *options, "--checkpoint_interval", "0"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "log.jsonl could not be written: No space left on device" in error
    assert "there is no checkpoint to go on from" in error


@pytest.mark.parametrize("name", ["_flush", "save_file", "_sha256"])
def test_a_save_that_fails_ends_the_run_at_the_next_step(
    name: str, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    poll = Saver.poll

    def wait_and_poll(saver: Saver) -> bool:
        if saver.pending is not None:
            saver.pending.exception()
            monkeypatch.setattr(checkpoint, name, failing)  # from the second on
        return poll(saver)

    monkeypatch.setattr(Saver, "poll", wait_and_poll)
    argv = [*small, "--name", "a", "--checkpoint_interval", "2", "--max_steps", "100", "--keep_checkpoints", "1"]
    assert train_minimal.main(argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step_4 could not be written: Input/output error" in error
    assert read_log(tmp_path / "runs" / "a")[-1]["step"] == 4, "no step is trained after it"
    assert set(checkpoints(tmp_path / "runs" / "a")) == {2}, "the last good one is kept"


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_a_run_that_is_being_written_is_left_alone(
    resumed: bool, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run, results = tmp_path / "runs" / "a", []
    if resumed:
        assert train_minimal.main([*small, "--name", "a", "--max_steps", "2"]) == 0
    gather = train_minimal.gather

    def resumes_in_the_middle(*arguments):
        if not results:
            monkeypatch.setattr(train_minimal, "gather", gather)
            for words in (["--resume", str(run)], ["--resume", "auto", "--name", "a", "--out_dir", str(run.parent)]):
                results.append(train_minimal.main(words))
        return gather(*arguments)

    monkeypatch.setattr(train_minimal, "gather", resumes_in_the_middle)
    options = ["--checkpoint_interval", "2", "--eval_interval", "4"]
    argv = ["--resume", str(run), "--max_steps", "6"] if resumed else [*small, "--name", "a"]
    assert train_minimal.main([*argv, *options]) == 0
    assert results == [2, 2]
    error = capsys.readouterr().err
    assert error.count(f"the run {run} is being written by another process") == 2 and error.count("\n") == 2
    assert train_minimal.main(["--resume", str(run), "--max_steps", "8"]) == 0, "afterwards it is free"


def test_checkpoints_that_came_meanwhile_are_kept(small: list[str], tmp_path: Path):
    run = tmp_path / "runs" / "a"
    assert train_minimal.main([*small, "--name", "a", "--checkpoint_interval", "2"]) == 0
    (run / "step_6").rename(tmp_path / "step_6")
    start = find_start(TrainConfig(resume=str(run)))
    (tmp_path / "step_6").rename(run / "step_6")
    with ExitStack() as held, pytest.raises(ConfigError, match="has gone on to step_6 meanwhile"):
        open_run(TrainConfig(resume=str(run)), start, held)
    assert set(checkpoints(run)) == {2, 4, 6}


def test_what_a_crash_left_is_cleared(small: list[str], tmp_path: Path):
    run = tmp_path / "runs" / "a"
    assert train_minimal.main([*small, "--name", "a"]) == 0
    (run / "step_8.tmp").mkdir()
    (run / "step_8.tmp" / "model.safetensors").write_text("half")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "los')
    assert train_minimal.main(["--resume", str(run), "--max_steps", "9"]) == 0
    assert not list(run.glob("*.tmp"))
    assert [line["step"] for line in read_log(run) if "loss" in line] == list(range(1, 10))


def test_a_directory_that_becomes_read_only(small: list[str], tmp_path: Path, monkeypatch, capsys):
    real = Path.mkdir

    def mkdir(path: Path, *arguments, **options):
        if path.name == "step_4.tmp":
            raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)  # root may write anywhere, so that no mode stops it
    assert train_minimal.main([*small, "--name", "a", "--checkpoint_interval", "2"]) == 1
    error = capsys.readouterr().err
    assert "step_4 could not be written: Read-only file system" in error and "last checkpoint, step_2" in error
