"""A checkpoint is a directory that is either whole or not there.

    step_100/model.safetensors, config.json   the model, as llmcore.models.save and load write and read it
    step_100/optimizer.safetensors            the optimizer's state, one tensor per parameter and moment
    step_100/ema/                             the average of the weights, a model of its own, where the run keeps one
    step_100/meta.json                        step, seconds, configuration, commit, versions, SHA-256 of text and files

It is written to step_100.tmp, flushed to the disk and renamed; it is verified before it is read; nothing is unpickled.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from llmcore import models
from llmcore._version import __version__
from llmcore.train.average import Average
from llmcore.train.best import Best
from llmcore.train.optimizer import Optimizers

META, OPTIMIZER, EMA = "meta.json", "optimizer.safetensors", "ema"


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated, corrupted or of another model; the message names the file."""


def save_checkpoint(
    run: Path,
    step: int,
    seconds: float,
    model: models.Decoder,
    optimizer: Optimizers,
    config: dict[str, Any],
    text: dict[str, Any],
    average: Average | None = None,
    best: Best | None = None,
) -> Path:
    """Write run/step_N. One process only calls this; the others wait."""
    final, temporary = run / f"step_{step}", run / f"step_{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was cut off while writing
    temporary.mkdir(parents=True)
    models.save(model, temporary)
    save_file(_optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
    if average is not None:
        with average.applied(model):
            models.save(model, temporary / EMA)
    written = sorted(path for path in temporary.rglob("*") if path.is_file())
    files = {
        file.relative_to(temporary).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in written
    }
    meta = {
        "step": step,
        "seconds": seconds,
        "config": config,
        "text": text,
        "best": asdict(best or Best()),
        "git_commit": git_commit(),
        "versions": {"llmcore": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "files": files,
    }
    (temporary / META).write_text(json.dumps({**meta, "sha256": _sha256_of(meta)}, indent=1) + "\n")
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    os.rename(temporary, final)
    _flush(run)
    return final


def verify(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint all of whose files are as they were written. Raises CheckpointError otherwise."""
    if not os.path.isdir(checkpoint):
        raise CheckpointError(f"there is no checkpoint {checkpoint}; allowed is a checkpoint's or a run's directory.")
    path = checkpoint / META
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {checkpoint} is no checkpoint, or not a whole one.")
    try:
        meta = json.loads(path.read_bytes())
        recorded = meta.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is corrupted: it is not the JSON that was written.") from error
    if recorded != _sha256_of(meta):
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
        saved = models.ModelConfig.from_dict(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'config.json'} describes no model of this version: {error}") from error
    for name, value in saved.to_dict().items():
        asked = getattr(config, name)
        if value != asked:
            raise CheckpointError(f"{checkpoint} holds a model with {name}={value}; this run asks for {asked}.")


def load_checkpoint(
    checkpoint: Path, model: models.Decoder, optimizer: Optimizers, average: Average | None = None
) -> None:
    """Put a verified checkpoint of the same model into `model`, `optimizer` and `average`, which where the checkpoint
    has none starts from the weights."""
    model.load_state_dict(models.load(checkpoint).state_dict())
    if average is not None:
        average.load(models.load(checkpoint / EMA if (checkpoint / EMA).is_dir() else checkpoint).state_dict())
    parameters = dict(model.named_parameters())
    with safe_open(checkpoint / OPTIMIZER, framework="pt") as file:
        names = list(file.keys())
        if {name.rpartition(".")[0] for name in names} != set(parameters):
            raise CheckpointError(f"{checkpoint / OPTIMIZER} does not hold the state of this model's parameters.")
        for name in names:
            parameter, _, moment = name.rpartition(".")
            owner = parameters[parameter]
            if moment not in optimizer.moments_of(owner):
                raise CheckpointError(
                    f"{checkpoint / OPTIMIZER} holds the state of another optimizer: {moment} of {parameter}; "
                    "resume with the optimizer.kind it was trained with."
                )
            optimizer.state_of(owner)[moment] = file.get_tensor(name).to(owner.device)


def checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, unverified."""
    return {int(match[1]): path for path in run.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))}


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run that verifies; None if the run has none, an error if it has and none verifies."""
    failure: CheckpointError | None = None
    for _, path in sorted(checkpoints(run).items(), reverse=True):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return None


def point(run: Path, name: str, step: int) -> None:
    """Let run/name, such as run/best, be another name of a checkpoint."""
    link = run / f"{name}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(f"step_{step}", target_is_directory=True)
    link.replace(run / name)


def tidy(run: Path, keep: int | None, best: Best) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, which gets the name run/best."""
    found = checkpoints(run)
    for step in sorted(found)[: -keep if keep else 0]:
        if step != best.step:
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


def _optimizer_tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{moment}": value.contiguous()
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state_of(parameter).items()
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sha256_of(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Onto the disk: contents of a file, names of a directory. (A directory cannot be opened on Windows.)"""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
