"""A model on disk: a directory with `model.safetensors` (Hugging Face's parameter names) and `config.json`."""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from llmcore.models.config import ModelConfig
from llmcore.models.decoder import Decoder, build

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(model: Decoder, path: str | os.PathLike[str]) -> None:
    """Writes the model into the directory `path`, which is made when missing.

    Raises:
        FileExistsError: the directory already holds a model; nothing is overwritten.
    """
    write(model.state_dict(), model.config, path)


def write(weights: dict[str, Tensor], config: ModelConfig, path: str | os.PathLike[str]) -> None:
    """As `save`, from the model's state dict."""
    from safetensors.torch import save_file

    folder = Path(path)
    for name in (WEIGHTS, CONFIG):
        if (folder / name).exists():
            raise FileExistsError(f"save: {folder / name} exists; choose an empty directory, nothing is overwritten.")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in weights.items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    partial = folder / f"{WEIGHTS}.partial"
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read what it writes


def load(path: str | os.PathLike[str]) -> Decoder:
    """Reads the model in the directory `path` onto the CPU.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged, or does not fit the other.
    """
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"load: {folder / name} is missing; a model directory holds {CONFIG} and {WEIGHTS}."
            )
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {folder / CONFIG} is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"load: {folder / CONFIG} must hold an object, but it holds a {type(values).__name__}.")
    with torch.device("meta"):
        model = build(ModelConfig.from_dict(values))
    state = _read(folder / WEIGHTS)
    if model.config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"load: {folder / WEIGHTS} lacks {name}, which its config.json asks for.")
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"load: {name} in {folder / WEIGHTS} has shape {tuple(state[name].shape)}; "
                f"config.json asks for {shape}."
            )
    for name in state:
        if name not in expected:
            raise ValueError(f"load: {folder / WEIGHTS} holds {name}, unknown to its config.json.")
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.reset_buffers(torch.device("cpu"))
    return model


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"load: {path} is damaged or truncated ({error}).") from error
