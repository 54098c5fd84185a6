"""A run's directory, out_dir/name: config.yaml, log.jsonl (a line per event) and the checkpoints. It is never
written over: a run starts afresh, goes on in its own directory, or goes on from one checkpoint in a new directory.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from llmcore.data import Corpus
from llmcore.train.best import Best
from llmcore.train.checkpoint import CheckpointError, SaveError, checkpoints, newest_checkpoint, verify
from llmcore.train.config import ConfigError, TrainConfig
from llmcore.train.distributed import digest

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Start:
    """Where a run begins: in the directory `run`, or in a new one (None); from `checkpoint`, or from step 0 (None).
    damage: what is wrong with a newer checkpoint, if that is why it is not this one."""

    run: Path | None = None
    checkpoint: Path | None = None
    step: int = 0
    seconds: float = 0.0
    config: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    best: Best = field(default_factory=Best)
    global_batch: int | None = None
    skipped: int = 0
    scale: dict[str, float] | None = None
    digest: str = ""
    damage: str = ""

    def __str__(self) -> str:
        place = str(self.checkpoint or "step 0")
        return f"{place}, as {self.damage}" if self.damage else place

    def require_text(self, corpus: Corpus) -> None:
        """Raise a ConfigError if `corpus` is not the text that the checkpoint was trained on."""
        for part, before in (self.text or {}).items():
            now = corpus.fingerprint[part]
            if now != before:
                raise ConfigError(
                    f"{corpus.source} has another {part} part than it had for {self.checkpoint}: {_text(now)}, and it "
                    f"was {_text(before)}; restore it, or give --data.train to go on with this text."
                )

    def on_text(self, corpus: Corpus) -> "Start":
        """The same start; on another text no validation of before counts."""
        return self if self.text in (None, corpus.fingerprint) else replace(self, best=Best())


def find_start(config: TrainConfig) -> Start:
    """What `config.resume` and `config.name` mean. Only reads. Raises CheckpointError or ConfigError."""
    named = None
    if config.name is not None:
        _check_name(config.name)
        named = Path(config.out_dir) / config.name
    if config.resume == "auto":
        run = named if named is not None else _newest_run(Path(config.out_dir))
        if run is None or not _is_taken(run):
            return _in_new_run(config, Start())
        if not _is_run(run):
            raise ConfigError(f"{run} is no run, as it holds no config.yaml; choose another --name.")
        return _in_run(run) or Start(run)
    if config.resume is not None and _is_run(Path(config.resume)):
        run = Path(config.resume)
        if config.name is not None:
            raise ConfigError(
                f"name is {config.name!r}, but --resume {run} goes on in that run's own folder; "
                "leave --name out, or resume from one of its checkpoints."
            )
        start = _in_run(run)
        if start is None:
            raise CheckpointError(f"the run {run} holds no checkpoint to resume from.")
        return start
    if named is not None and _is_taken(named):
        raise ConfigError(f"the run {named} exists already; choose another --name, or go on with --resume {named}.")
    if config.resume is None:
        return _in_new_run(config, Start())
    path = Path(config.resume)
    path = path.resolve() if os.path.islink(path) else path  # run/best may soon be another one
    return _in_new_run(config, _from(path, verify(path)))


def _in_new_run(config: TrainConfig, start: Start) -> Start:
    _require_writable(Path(config.out_dir), "out_dir")
    return start


def _in_run(run: Path) -> Start | None:
    """The newest checkpoint of `run` that verifies; None if there is no checkpoint."""
    _require_writable(run, "the run")
    with _hold(run, shared=True):
        pass  # no other process trains there
    newest = newest_checkpoint(run)
    return None if newest is None else replace(_from(newest.path, newest.meta), run=run, damage=newest.damage)


def open_run(config: TrainConfig, start: Start, held: ExitStack) -> Path:
    """The directory that `start` means. A new one is made; in one that is gone on with, what a crash left is cleared:
    half-written checkpoints and a half-written line of the log; and checkpoints newer than start's, which do not
    verify, are renamed out of the way. The run is locked until `held` closes, and removed then if nothing was written
    to it. One process only calls this."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
    if start.run is not None:
        held.enter_context(_hold(start.run))
        newer = [path for step, path in checkpoints(start.run).items() if step > start.step]
        if whole := [path.name for path in newer if _is_whole(path)]:  # of a process that ended just now
            raise ConfigError(f"the run {start.run} has gone on to {whole[0]} meanwhile; start this one again.")
        for path in newer:
            path.rename(_unused(path.with_name(path.name + ".corrupt")))
        for path in start.run.glob("step_*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        _mend_log(start.run / "log.jsonl")
        if start.checkpoint is None:
            (start.run / "config.yaml").write_text(text, encoding="utf-8")
        return start.run
    if config.name is not None:
        run = Path(config.out_dir) / config.name
    else:
        run = _unused(Path(config.out_dir) / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        run.mkdir(parents=True, exist_ok=os.path.isdir(run) and not _is_taken(run))
        with (run / "config.yaml").open("x", encoding="utf-8") as file:  # of two processes at once one makes the run
            file.write(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the run {run} cannot be made: {reason}; choose another --out_dir.") from error
    held.enter_context(_hold(run))
    held.callback(_forget, run)
    return run


def _forget(run: Path) -> None:
    """Remove a run that ended before it wrote anything."""
    if [path.name for path in run.iterdir()] == ["config.yaml"]:
        shutil.rmtree(run)


@contextmanager
def _hold(run: Path, shared: bool = False) -> Iterator[None]:
    """Lock the run's config.yaml as long as the block lasts; the system frees it even if the process is killed. Raises
    ConfigError if another process trains there. `shared` only asks."""
    path = run / "config.yaml"
    if fcntl is None:  # Windows
        yield
        return
    try:
        file = path.open("rb" if shared else "r+b")
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"the run {run} is being written by another process; wait for its end, or resume from one of its "
                "checkpoints, which makes a run of its own."
            ) from error
        except OSError as error:  # some network file systems
            print(f"train_minimal.py: {path} cannot be locked: {error.strerror}; let no other process train there.")
        yield


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True


def how_to_go_on(run: Path | None) -> str:
    """What the user of a run that was interrupted can do."""
    if run is None or not (found := checkpoints(run)):
        return "there is no checkpoint to go on from"
    return f"--resume {run} goes on from its last checkpoint, {found[max(found)].name}"


def append_log(run: Path, **values: Any) -> None:
    """A line of log.jsonl; a number that is not finite, which JSON has no word for, becomes null."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = None
    try:
        with (run / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise SaveError(f"{run / 'log.jsonl'} could not be written: {error.strerror}") from error


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _from(checkpoint: Path, meta: dict[str, Any]) -> Start:
    return Start(
        None, checkpoint, meta["step"], meta["seconds"], meta["config"], meta.get("text"), Best(**meta.get("best", {})),
        meta.get("global_batch"), meta.get("skipped", 0), meta.get("scale"), digest(meta),
    )  # fmt: skip


def _mend_log(path: Path) -> None:
    """Cut off a last line that a crash left unfinished."""
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _text(facts: dict[str, Any]) -> str:
    return f"{facts['bytes']:,} bytes of SHA-256 {facts['sha256'][:12]}"


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or {"/", "\0", os.sep} & set(name) or len(os.fsencode(name)) > 255:
        raise ConfigError(
            f"name is {ascii(name)}; allowed is the name of a folder: up to 255 bytes, with no '/' or NUL."
        )


def _require_writable(path: Path, what: str) -> None:
    place = next((place for place in (path, *path.parents) if os.path.exists(place)), path)
    if not os.path.isdir(place):
        raise ConfigError(f"{what} is {path}, but {place} is no folder; allowed is a folder, or one that can be made.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{what} is {path}, but {place} cannot be written to; allowed is a folder that can be.")


def _is_taken(path: Path) -> bool:
    """Whether something is there that is not an empty folder, as a process leaves that is killed at its very start."""
    return os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path))


def _is_run(path: Path) -> bool:
    return os.path.isfile(path / "config.yaml")


def _newest_run(out_dir: Path) -> Path | None:
    runs = [path for path in out_dir.iterdir() if _is_run(path) and checkpoints(path)] if out_dir.is_dir() else []
    return max(runs, key=lambda run: (run.stat().st_mtime, run.name), default=None)


def _unused(path: Path) -> Path:
    """`path`, or with -2, -3, ... after it, such that nothing is there yet."""
    count, candidate = 1, path
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate
