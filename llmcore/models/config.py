"""ModelConfig: everything that defines a model, under Hugging Face's names."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from llmcore.models.presets import PRESETS


def _suggest(given: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(given, allowed, 1)
    return f"did you mean {close[0]!r}? " if close else ""


@dataclass
class ModelConfig:
    """A decoder-only transformer in Llama's form.

    vocab_size: number of tokens. hidden_size: width C. intermediate_size: feed-forward width F.
    num_hidden_layers: blocks. num_attention_heads: H. num_key_value_heads: K, divides H; H when None.
    head_dim: D, hidden_size // H when None; 16 to 256 in steps of 8.
    max_position_embeddings: longest sequence, in tokens. rope_theta: base of the rotary angles.
    rms_norm_eps: added to the mean of squares. tie_word_embeddings: the output layer is the embedding's weight.
    initializer_range: standard deviation of the initial weights.
    dropout: probability with which training zeroes an element of the embedding's, an attention's or an MLP's output.
    """

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, int | None) and value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"ModelConfig: {field.name} is {value!r}; allowed: whole numbers from 1.")
            elif field.name == "dropout":
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                    raise ValueError(f"ModelConfig: dropout is {value!r}; allowed: numbers from 0 to below 1.")
            elif field.type is float:
                if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                    raise ValueError(f"ModelConfig: {field.name} is {value!r}; allowed: numbers above 0.")
            elif field.type is bool and not isinstance(value, bool):
                raise ValueError(f"ModelConfig: {field.name} is {value!r}; allowed: true, false.")
        H = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = H
        if H % self.num_key_value_heads:
            raise ValueError(
                f"ModelConfig: num_key_value_heads is {self.num_key_value_heads}, "
                f"which does not divide num_attention_heads = {H}."
            )
        if self.head_dim is None:
            if self.hidden_size % H:
                raise ValueError(
                    f"ModelConfig: hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = {H}; "
                    "change one of them or give head_dim."
                )
            self.head_dim = self.hidden_size // H
        if self.head_dim % 8 or not 16 <= self.head_dim <= 256:
            raise ValueError(f"ModelConfig: head_dim is {self.head_dim}; allowed: 16 to 256 in steps of 8.")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """The preset `name` with `changes` applied to its fields."""
        if name not in PRESETS:
            hint = _suggest(str(name), list(PRESETS))
            raise ValueError(f"unknown preset {name!r}; {hint}allowed: {', '.join(PRESETS)}.")
        return cls.from_dict({**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """From field names and values; an unknown name raises ValueError with the nearest known one."""
        allowed = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in allowed:
                hint = _suggest(str(key), allowed)
                raise ValueError(f"ModelConfig has no field {key!r}; {hint}allowed: {', '.join(allowed)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def num_parameters(self) -> int:
        """Parameters of the model, a tied output layer counted once."""
        C, F, D = self.hidden_size, self.intermediate_size, self.head_dim or 0
        H, K = self.num_attention_heads, self.num_key_value_heads or 0
        block = C * D * (2 * H + 2 * K) + 3 * C * F + 2 * C
        embeddings = self.vocab_size * C * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * block + C + embeddings

    def flops_per_token(self, sequence_length: int, training: bool = True) -> float:
        """Model FLOPs per token: 2 per weight of a matrix product, plus causal attention's two products with
        (sequence_length + 1) / 2 keys on average; three times that with the backward (recomputation not counted)."""
        C, D = self.hidden_size, self.head_dim or 0
        weights = self.num_parameters() - (2 * self.num_hidden_layers + 1) * C
        if not self.tie_word_embeddings:
            weights -= self.vocab_size * C
        attention = 4 * self.num_hidden_layers * self.num_attention_heads * D * (sequence_length + 1) / 2
        return (3 if training else 1) * (2 * weights + attention)
