"""The shapes of someone's own model: a preset, a training configuration of llmcore, or a Hugging Face config.json."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import torch

from bench.ops import Case
from llmcore.models import ModelConfig
from llmcore.models.presets import PRESETS
from llmcore.ops import registry

NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads")


def read_shapes(source: str) -> ModelConfig:
    """Raises ValueError with one sentence where `source` names no model."""
    if source in PRESETS:
        return ModelConfig.from_preset(source)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(
            f"{source} is neither a preset ({', '.join(PRESETS)}) nor a file that can be read: {error.strerror}."
        ) from None
    values = _parse(path, text)
    if "preset" in values:
        return ModelConfig.from_preset(values["preset"], **(values.get("model") or {}))
    values = values.get("text_config") or values
    missing = [name for name in NEEDED if name not in values]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}; needed are a preset, or {', '.join(NEEDED)} as Hugging Face's.")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in values.items() if name in known})


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except Exception as error:  # the libraries' errors for malformed text have no common class
        raise ValueError(f"{path} cannot be parsed: {str(error).splitlines()[0]}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no names and values, but {type(values).__name__}.")
    return values


def cases_of_model(
    config: ModelConfig, batch_size: int, seq_len: int, dtype: torch.dtype, device: str
) -> dict[str, list[Case]]:
    """By op, what a forward and backward of the model calls it with."""
    return {
        name: importlib.import_module(f"bench.ops.bench_{name}").of_model(config, batch_size, seq_len, dtype, device)
        for name in sorted(registry)
    }
