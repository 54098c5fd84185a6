"""ModelConfig: everything that defines a model, under Hugging Face's names."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from llmcore.models.presets import PRESETS


def suggest(given: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(given, allowed, 1)
    return f"did you mean {close[0]!r}? " if close else ""


MIXERS = ("attention", "mamba", "mamba2")
FEED_FORWARDS = ("dense", "experts")
OF_EXPERTS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "scoring_func",
    "norm_topk_prob", "routed_scaling_factor", "num_expert_groups", "num_groups_per_tok", "router_balance_loss",
    "router_z_loss", "router_jitter", "router_bias_rate",
)  # fmt: skip
FROM_ZERO = (
    "dropout",
    "router_jitter",
    "router_balance_loss",
    "router_z_loss",
    "router_bias_rate",
    "num_shared_experts",
)


@dataclass
class ModelConfig:
    """A decoder-only language model: Llama's form, Mamba's, or layers of both by a pattern, with dense feed-forwards,
    experts, or both by another.

    vocab_size: number of tokens. hidden_size: width C. intermediate_size: feed-forward width F.
    num_hidden_layers: blocks. num_attention_heads: H. num_key_value_heads: K, divides H; H when None.
    head_dim: D, hidden_size // H when None; 16 to 256 in steps of 8.
    max_position_embeddings: longest sequence, in tokens. rope_theta: base of the rotary angles.
    qk_norm: whether each head's query and key are normalised, as Qwen3's are.
    rms_norm_eps: added to the mean of squares. tie_word_embeddings: the output layer is the embedding's weight.
    initializer_range: standard deviation of the initial weights.
    dropout: probability with which training zeroes an element of the embedding's, an attention's or an MLP's output.
    layer_pattern: what the layers mix time with, "attention", "mamba" or "mamba2", repeated over the layers.
    mamba_expand: channels inside, as a multiple of the width. mamba_conv_width: W, 2 to 4.
    mamba_feed_forward: whether Mamba layers have the feed-forward too, as Jamba's do; Mamba's own have none.
    mamba_state_size: N of Mamba. mamba_dt_rank: width of its steps' projection; ceil(hidden_size / 16) when None.
    mamba2_state_size: N of Mamba-2. mamba2_head_dim: P, divides the channels inside. mamba2_num_groups: G of heads that
    share B and C, divides the heads.
    mamba2_step_limit: least and greatest step; none when None.
    feed_forward_pattern: "dense" or "experts", repeated over the layers, for those that have a feed-forward.
    num_experts: E. num_experts_per_tok: k, 1 to E. moe_intermediate_size: width of an expert; intermediate_size when
    None. num_shared_experts: experts that every token uses besides.
    scoring_func: "softmax" over the experts or "sigmoid" of each. norm_topk_prob: whether the chosen scores are divided
    by their sum. routed_scaling_factor: of the routed experts' sum. num_expert_groups, num_groups_per_tok: experts are
    chosen among those of the best groups.
    router_balance_loss, router_z_loss, router_jitter, router_bias_rate: see nn.MoE; in training only.
    residual_in_fp32: whether the stream between the layers is float32 where weights are of 16 bits; else it is theirs.
    bos_token_id, eos_token_id, pad_token_id: the tokenizer's, as Hugging Face's config.json has them; not read here.
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
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dropout: float = 0.0
    layer_pattern: list[str] = field(default_factory=lambda: ["attention"])
    mamba_expand: int = 2
    mamba_conv_width: int = 4
    mamba_feed_forward: bool = False
    mamba_state_size: int = 16
    mamba_dt_rank: int | None = None
    mamba2_state_size: int = 128
    mamba2_head_dim: int = 64
    mamba2_num_groups: int = 1
    mamba2_step_limit: list[float] | None = None
    feed_forward_pattern: list[str] = field(default_factory=lambda: ["dense"])
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    num_shared_experts: int = 0
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_expert_groups: int = 1
    num_groups_per_tok: int = 1
    router_balance_loss: float = 0.01
    router_z_loss: float = 0.001
    router_jitter: float = 0.0
    router_bias_rate: float = 0.0
    residual_in_fp32: bool = False
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.type is int or (item.type == (int | None) and value is not None):
                least = 0 if item.name in FROM_ZERO else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ValueError(f"ModelConfig: {item.name} is {value!r}; allowed: whole numbers from {least}.")
            elif item.name in FROM_ZERO:
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                    raise ValueError(f"ModelConfig: {item.name} is {value!r}; allowed: numbers from 0 to below 1.")
            elif item.name.endswith("_token_id"):
                ids = value if isinstance(value, list) else [] if value is None else [value]
                if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
                    raise ValueError(
                        f"ModelConfig: {item.name} is {value!r}; allowed: a whole number, a list of them, or none."
                    )
            elif item.type is float:
                if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                    raise ValueError(f"ModelConfig: {item.name} is {value!r}; allowed: numbers above 0.")
            elif item.type is bool and not isinstance(value, bool):
                raise ValueError(f"ModelConfig: {item.name} is {value!r}; allowed: true, false.")
        self._check_layers()
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

    def _check_layers(self) -> None:
        pattern = self.layer_pattern
        if not isinstance(pattern, list | tuple) or not pattern or not set(pattern) <= set(MIXERS):
            raise ValueError(f"ModelConfig: layer_pattern is {pattern!r}; allowed: a list of {', '.join(MIXERS)}.")
        self.layer_pattern = list(pattern)
        for name, value, low, high in (
            ("mamba_conv_width", self.mamba_conv_width, 2, 4),
            ("mamba_state_size", self.mamba_state_size, 1, 256),
            ("mamba2_state_size", self.mamba2_state_size, 1, 256),
            ("mamba2_head_dim", self.mamba2_head_dim, 1, 256),
        ):
            if not low <= value <= high:
                raise ValueError(f"ModelConfig: {name} is {value}; allowed: {low} to {high}.")
        if self.mamba_dt_rank is None:
            self.mamba_dt_rank = -(-self.hidden_size // 16)
        if "mamba2" in pattern:
            self._check_mamba2()
        kinds = self.feed_forward_pattern
        if not isinstance(kinds, list | tuple) or not kinds or not set(kinds) <= set(FEED_FORWARDS):
            raise ValueError(
                f"ModelConfig: feed_forward_pattern is {kinds!r}; allowed: a list of {', '.join(FEED_FORWARDS)}."
            )
        self.feed_forward_pattern = list(kinds)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"ModelConfig: scoring_func is {self.scoring_func!r}; allowed: softmax, sigmoid.")
        if "experts" in kinds:
            self._check_experts()

    def _check_experts(self) -> None:
        experts, groups = self.num_experts, self.num_expert_groups
        if experts % groups:
            raise ValueError(
                f"ModelConfig: num_expert_groups is {groups}; allowed: a divisor of num_experts = {experts}."
            )
        if self.num_groups_per_tok > groups:
            raise ValueError(
                f"ModelConfig: num_groups_per_tok is {self.num_groups_per_tok}; allowed: 1 to num_expert_groups = "
                f"{groups}."
            )
        choice = experts // groups * self.num_groups_per_tok
        if self.num_experts_per_tok > choice:
            raise ValueError(
                f"ModelConfig: num_experts_per_tok is {self.num_experts_per_tok}; allowed: 1 to the {choice} experts "
                "to choose from."
            )

    def _check_mamba2(self) -> None:
        inner, limit = self.mamba_expand * self.hidden_size, self.mamba2_step_limit
        if inner % self.mamba2_head_dim:
            raise ValueError(
                f"ModelConfig: mamba2_head_dim is {self.mamba2_head_dim}; allowed: a divisor of mamba_expand * "
                f"hidden_size = {inner}."
            )
        heads = inner // self.mamba2_head_dim
        if heads % self.mamba2_num_groups:
            raise ValueError(
                f"ModelConfig: mamba2_num_groups is {self.mamba2_num_groups}; allowed: a divisor of the {heads} heads."
            )
        if limit is not None:
            numbers = isinstance(limit, list | tuple) and all(isinstance(x, int | float) for x in limit)
            if not numbers or len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
                raise ValueError(
                    f"ModelConfig: mamba2_step_limit is {limit!r}; allowed: none, or two numbers that rise from at "
                    "least 0."
                )
            self.mamba2_step_limit = [float(x) for x in limit]

    def mixer(self, layer: int) -> str:
        """What layer number `layer` mixes time with: attention, mamba or mamba2."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def has_feed_forward(self, layer: int) -> bool:
        return self.mixer(layer) == "attention" or self.mamba_feed_forward

    def feed_forward(self, layer: int) -> str:
        """What layer number `layer` has after its mixer: dense, experts or none."""
        kinds = self.feed_forward_pattern
        return kinds[layer % len(kinds)] if self.has_feed_forward(layer) else "none"

    def has_experts(self, layer: int) -> bool:
        return self.feed_forward(layer) == "experts"

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """The preset `name` with `changes` applied to its fields."""
        if name not in PRESETS:
            hint = suggest(str(name), list(PRESETS))
            raise ValueError(f"unknown preset {name!r}; {hint}allowed: {', '.join(PRESETS)}.")
        return cls.from_dict({**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """From field names and values; an unknown name raises ValueError with the nearest known one."""
        allowed = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in allowed:
                hint = suggest(str(key), allowed)
                raise ValueError(f"ModelConfig has no field {key!r}; {hint}allowed: {', '.join(allowed)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def num_parameters(self, active: bool = False) -> int:
        """Parameters of the model, a tied output layer counted once; `active`: those that one token uses."""
        layers = sum(self._matrices(i, active) + self._vectors(i) for i in range(self.num_hidden_layers))
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layers + self.hidden_size + embeddings

    def flops_per_token(self, sequence_length: int, training: bool = True) -> float:
        """Model FLOPs per token: 2 per weight of a matrix product and of a convolution; causal attention's two products
        with (sequence_length + 1) / 2 keys on average; of a scan 7 per state, as its recurrence has them. Three times
        that with the backward (recomputation not counted)."""
        total = 2.0 * self.vocab_size * self.hidden_size
        for i in range(self.num_hidden_layers):
            total += 2 * self._matrices(i, active=True)
            if self.mixer(i) == "attention":
                total += 2 * self.num_attention_heads * (self.head_dim or 0) * (sequence_length + 1)
                continue
            inner, filtered, states = self._mamba_widths(i)
            total += 2 * self.mamba_conv_width * filtered + 7 * inner * states
        return (3 if training else 1) * total

    def _mamba_widths(self, layer: int) -> tuple[int, int, int]:
        """Of a layer of Mamba: channels inside, channels that the convolution filters, states of each."""
        inner = self.mamba_expand * self.hidden_size
        if self.mixer(layer) == "mamba":
            return inner, inner, self.mamba_state_size
        return inner, inner + 2 * self.mamba2_num_groups * self.mamba2_state_size, self.mamba2_state_size

    def _feed_forward(self, layer: int, active: bool) -> int:
        if not self.has_experts(layer):
            return 3 * self.hidden_size * self.intermediate_size if self.has_feed_forward(layer) else 0
        experts = (self.num_experts_per_tok if active else self.num_experts) + self.num_shared_experts
        return self.hidden_size * (3 * (self.moe_intermediate_size or 0) * experts + self.num_experts)

    def _matrices(self, layer: int, active: bool) -> int:
        """Weights of a layer's matrix products; `active`: those that one token meets."""
        C, D = self.hidden_size, self.head_dim or 0
        H, K = self.num_attention_heads, self.num_key_value_heads or 0
        feed_forward = self._feed_forward(layer, active)
        if self.mixer(layer) == "attention":
            return C * D * (2 * H + 2 * K) + feed_forward
        inner, filtered, states = self._mamba_widths(layer)
        if self.mixer(layer) == "mamba":
            return inner * (3 * C + 2 * (self.mamba_dt_rank or 0) + 2 * states) + feed_forward
        return C * (2 * inner + filtered + inner // self.mamba2_head_dim) + feed_forward

    def _vectors(self, layer: int) -> int:
        """A layer's other parameters: norms, and Mamba's filters, biases, A and D."""
        norms = self.hidden_size * (2 if self.has_feed_forward(layer) else 1)
        if self.mixer(layer) == "attention":
            return norms + (2 * (self.head_dim or 0) if self.qk_norm else 0)
        inner, filtered, states = self._mamba_widths(layer)
        filters = filtered * (self.mamba_conv_width + 1)
        if self.mixer(layer) == "mamba":
            return norms + filters + inner * (states + 2)
        return norms + filters + inner + 3 * (inner // self.mamba2_head_dim)
