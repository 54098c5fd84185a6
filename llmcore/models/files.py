"""The files of a model's directory: config.json, and weights in one file or in several that an index names."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS, BINARY = "config.json", "model.safetensors", "pytorch_model.bin"
# The first that is there is read: safetensors before a pickle, one file before several.
SOURCES = (WEIGHTS, f"{WEIGHTS}.index.json", BINARY, f"{BINARY}.index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds. Raises FileNotFoundError, also when there are no weights; ValueError: not an object."""
    if not (folder / CONFIG).is_file():
        raise _missing(folder / CONFIG)
    if _source(folder) is None:
        raise _missing(folder / WEIGHTS)
    return _read_object(folder / CONFIG)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors by name, and the file that holds them or says which files do.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged, or is not what its index says.
    """
    path = _source(folder)
    if path is None:
        raise _missing(folder / WEIGHTS)
    return (_read_shards(path) if path.suffix == ".json" else _read_tensors(path)), path


def require_free(folder: Path) -> None:
    """Raises FileExistsError when `folder` holds a model, in whatever layout."""
    for name in (*SOURCES, CONFIG):
        if (folder / name).exists():
            raise FileExistsError(f"save: {folder / name} exists; choose an empty directory, nothing is overwritten.")


def write_model(folder: Path, state: dict[str, Tensor], config: dict[str, Any], weights: str = WEIGHTS) -> None:
    """Writes weights and config.json. Each gets its name when it is whole, config.json last: without it there is no
    model to read."""
    folder.mkdir(parents=True, exist_ok=True)
    partial, partial_config = folder / f"{weights}.partial", folder / f"{CONFIG}.partial"
    partial_config.write_text(json.dumps(config, indent=2) + "\n")
    if weights == WEIGHTS:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, metadata={"format": "pt"})
    else:
        torch.save(_alone(state), partial)
    shutil.copymode(partial_config, partial)  # safetensors lets nobody else read what it writes
    os.replace(partial, folder / weights)
    os.replace(partial_config, folder / CONFIG)


def _alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, and without what else lies in a tensor's memory, which torch.save would write too. A tensor that
    stands under two names stays one."""
    alone: dict[int, Tensor] = {}
    for tensor in state.values():
        own = tensor.detach().to("cpu").contiguous()
        if own.untyped_storage().nbytes() != own.numel() * own.element_size():
            own = own.clone()
        alone.setdefault(id(tensor), own)
    return {name: alone[id(tensor)] for name, tensor in state.items()}


def _source(folder: Path) -> Path | None:
    return next((folder / name for name in SOURCES if (folder / name).is_file()), None)


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"load: {path} is missing; a model directory holds {CONFIG} and {WEIGHTS}, or {BINARY}, or an index of several."
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {path} is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"load: {path} must hold an object, but it holds a {type(values).__name__}.")
    return values


def _read_shards(index: Path) -> dict[str, Tensor]:
    where = _read_object(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"load: {index} must hold a weight_map, from parameter names to the names of files.")
    state: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise ValueError(f"load: {index} names the file {name!r}; allowed: files of its own directory.")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"load: {index.parent / name} is missing; {index.name} names it.")
        for parameter, tensor in _read_tensors(index.parent / name).items():
            if parameter in state:
                raise ValueError(f"load: {index.parent / name} holds {parameter}, and so does another file.")
            state[parameter] = tensor
    for parameter, name in where.items():
        if parameter not in state:
            raise ValueError(f"load: {index.parent / name} lacks {parameter}, which {index.name} says it holds.")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"load: {path} is damaged or truncated ({error}).") from error
    try:
        # What torch.save wrote before 1.6 is no zip file and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"load: {path} is damaged, or holds more than tensors; what would run code of its own is not read."
        ) from error
    except Exception as error:  # whatever a flipped bit makes the unpickler stumble over
        reason = (str(error) or "it is empty").splitlines()[0]
        raise ValueError(f"load: {path} is damaged or truncated ({reason}).") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"load: {path} must hold a dict of tensors by their parameters' names, and nothing else.")
    return state
