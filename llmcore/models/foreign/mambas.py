"""What both packages' Mambas have in common: parameter names, no positions, and Mamba-2's limits of its steps."""

from math import inf
from pathlib import Path
from typing import Any

from llmcore.models.foreign.architecture import refusal

# A state of one size and nothing kept per position: a model without attention has no longest sequence. ModelConfig
# wants a number all the same, and Decoder refuses what is longer; Mamba's paper goes to about this many tokens.
NO_LIMIT = 2**20
# Fields that such a model does not read, with a value that ModelConfig takes at every hidden_size.
WITHOUT_ATTENTION = {"num_attention_heads": 1, "head_dim": 64}


def renames(embedding: str) -> tuple[tuple[str, str], ...]:
    """A mixer's parameters have the same names everywhere; the embedding's is all that the packages differ in."""
    return (
        ("model.embed_tokens.", f"backbone.{embedding}."),
        ("model.layers.{}.input_layernorm.", "backbone.layers.{}.norm."),
        ("model.layers.{}.mixer.", "backbone.layers.{}.mixer."),
        ("model.norm.", "backbone.norm_f."),
        ("lm_head.", "lm_head."),
    )


def read_limit(given: Any, where: Path, name: str) -> list[Any] | None:
    """As ModelConfig has it. JSON knows no infinity: Python writes it as a bare word, newer versions of transformers as
    an object."""
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2:
        raise refusal(where, name, given, [0.0, inf])
    low, high = (inf if end == {"__float__": "Infinity"} else end for end in given)
    return None if (low, high) == (0, inf) else [low, high]
