"""A checkpoint is a directory that is either whole or not there.

    step_100/model.safetensors, config.json   the model, as llmcore.models.save and load write and read it
    step_100/optimizer.safetensors            the optimizer's state, one tensor per parameter and moment
    step_100/ema/                             the average of the weights, a model of its own, where the run keeps one
    step_100/meta.json                        step, seconds, configuration, commit, versions, SHA-256 of text and files

The same whatever engine and however many processes trained it. It is written to step_100.tmp, flushed to the disk and
renamed; it is verified before it is read; nothing is unpickled.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmcore import models
from llmcore._version import __version__
from llmcore.models.files import CONFIG
from llmcore.train.best import Best

META, OPTIMIZER, EMA = "meta.json", "optimizer.safetensors", "ema"
BLANK = "0" * 64


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated, corrupted or of another model; the message names the file."""


class SaveError(RuntimeError):
    """Something of the run could not be written; the message names it and says why."""


@dataclass(frozen=True)
class Snapshot:
    """What training has made so far, whole, on the CPU: weights by name, moments as name.moment, the average of the
    weights by name, and the state of the loss scale."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    average: dict[str, Tensor] | None = None
    scale: dict[str, float] | None = None


def save_checkpoint(run: Path, step: int, snapshot: Snapshot, model: models.ModelConfig, facts: dict[str, Any]) -> Path:
    """Write run/step_N, or nothing: then a SaveError says why. `facts` go into meta.json as they are."""
    final, temporary = run / f"step_{step}", run / f"step_{step}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was cut off while writing
        _write(temporary, step, snapshot, model, facts)
        os.rename(temporary, final)
        _flush(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise SaveError(f"the checkpoint {final} could not be written: {reason}") from error
    return final


def _write(folder: Path, step: int, snapshot: Snapshot, model: models.ModelConfig, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    models.write(snapshot.weights, model, folder)
    save_file({name: value.contiguous() for name, value in snapshot.moments.items()}, folder / OPTIMIZER)
    shutil.copymode(folder / CONFIG, folder / OPTIMIZER)
    if snapshot.average is not None:
        models.write(snapshot.average, model, folder / EMA)
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)} for file in written
    }
    meta = {
        "step": step,
        **facts,
        "scale": snapshot.scale,
        "git_commit": git_commit(),
        "versions": {"llmcore": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "files": files,
    }
    text = json.dumps({**meta, "sha256": BLANK}, indent=1) + "\n"
    (folder / META).write_bytes(_signed(text.encode(), BLANK))
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def verify(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint all of whose files are as they were written. Raises CheckpointError otherwise."""
    if not os.path.isdir(checkpoint):
        raise CheckpointError(f"there is no checkpoint {checkpoint}; allowed is a checkpoint's or a run's directory.")
    path = checkpoint / META
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing: {checkpoint} is no checkpoint, or not a whole one.")
    try:
        return _verify(checkpoint, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{error.filename or checkpoint} cannot be read: {error.strerror}.") from error


def _verify(checkpoint: Path, content: bytes) -> dict[str, Any]:
    path = checkpoint / META
    try:
        meta = json.loads(content)
        recorded = meta.pop("sha256")
        signed = _signed(content, recorded)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is corrupted: it is not the JSON that was written.") from error
    if content != signed:
        raise CheckpointError(f"{path} is corrupted: it does not match its own SHA-256.")
    for name, facts in meta["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, but {META} lists it.")
        size = file.stat().st_size
        if size != facts["size"]:
            state = "truncated" if size < facts["size"] else "corrupted"
            raise CheckpointError(f"{file} is {state}: it has {size:,} bytes, and {META} records {facts['size']:,}.")
        if _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file} is corrupted: it does not match its SHA-256 in {META}.")
    return meta


def require_model(checkpoint: Path, config: models.ModelConfig) -> None:
    """Raise a CheckpointError unless the model of a verified checkpoint is the one that `config` describes."""
    try:
        saved = models.ModelConfig.from_dict(json.loads((checkpoint / CONFIG).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'config.json'} describes no model of this version: {error}") from error
    for name, value in saved.to_dict().items():
        asked = getattr(config, name)
        if value != asked:
            raise CheckpointError(f"{checkpoint} holds a model with {name}={value}; this run asks for {asked}.")


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The state dict of the model in a checkpoint, or in its average."""
    return models.load(folder).state_dict()


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, unverified."""
    return {int(match[1]): path for path in run.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))}


@dataclass(frozen=True)
class Newest:
    """A verified checkpoint; damage: what is wrong with the newest one, if it is not this one."""

    path: Path
    meta: dict[str, Any]
    damage: str


def newest_checkpoint(run: Path) -> Newest | None:
    """The newest checkpoint of a run that verifies; None if the run has none, an error if it has and none verifies."""
    failure: CheckpointError | None = None
    for _, path in sorted(checkpoints(run).items(), reverse=True):
        try:
            return Newest(path, verify(path), str(failure or ""))
        except CheckpointError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return None


def point(run: Path, name: str, step: int) -> None:
    """Let run/name, such as run/best, be another name of a checkpoint."""
    link = run / f"{name}.tmp"
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(f"step_{step}", target_is_directory=True)
        link.replace(run / name)
    except OSError as error:
        reason = f"{run / name} could not be made another name of step_{step}: {error.strerror}"
        raise SaveError(reason) from error


def tidy(run: Path, keep: int | None, best: Best) -> None:
    """Delete all but the newest `keep` checkpoints, the best one, which gets the name run/best, and run/final."""
    found = checkpoints(run)
    final = (run / "final").resolve().name
    for step in sorted(found)[: -keep if keep else 0]:
        if step != best.step and found[step].name != final:
            shutil.rmtree(found[step].rename(found[step].with_suffix(".tmp")))
    if best.step in found:
        point(run, "best", best.step)


def git_commit() -> str | None:
    """The commit of the source in use, or None where it is not in a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _signed(content: bytes, digest: str) -> bytes:
    """meta.json with, in place of `digest`, the SHA-256 of what it is with zeros there."""
    blank = content.replace(digest.encode(), BLANK.encode())
    return blank.replace(BLANK.encode(), hashlib.sha256(blank).hexdigest().encode())


def _flush(path: Path) -> None:
    """Onto the disk: contents of a file, names of a directory. (A directory cannot be opened on Windows.)"""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
