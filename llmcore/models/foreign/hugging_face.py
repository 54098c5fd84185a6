"""Models as Hugging Face's `transformers` reads and writes them: config.json names the architecture by its model_type.

What such a config.json says beside the names of these tables, their model does not read either.
"""

from functools import partial
from pathlib import Path

import torch

from llmcore.models.foreign import mixtures
from llmcore.models.foreign.architecture import Architecture, Field, Values, refusal
from llmcore.models.foreign.mambas import NO_LIMIT, WITHOUT_ATTENTION, read_limit, renames

# transformers' class of each model_type, as `architectures` has it.
CLASSES = {
    "mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip

ALIASES = {"backbone.embedding.weight": "backbone.embeddings.weight"}

COMMON = (
    Field("layer_norm_epsilon", "rms_norm_eps", 1e-5),
    Field("residual_in_fp32", "residual_in_fp32", True),
    Field("initializer_range", "initializer_range", 0.1),
    Field("max_position_embeddings", "max_position_embeddings", NO_LIMIT),
    Field("bos_token_id", "bos_token_id", 0),
)
ONLY = {"hidden_act": ("silu", "swish"), "use_bias": (False,), "use_conv_bias": (True,)}
IGNORED = (
    "rescale_prenorm_residual", "time_step_floor", "time_step_max", "time_step_min", "use_cache",
)  # fmt: skip


def _written(model_type: str, values: Values, dtype: torch.dtype) -> Values:
    if values["max_position_embeddings"] == NO_LIMIT:
        del values["max_position_embeddings"]
    name = str(dtype).removeprefix("torch.")
    return {"architectures": [CLASSES[model_type]], "model_type": model_type, "dtype": name, **values}


MAMBA = Architecture(
    "mamba",
    mixer="mamba",
    fields=(
        *COMMON,
        Field("vocab_size", "vocab_size", 50280),
        Field("hidden_size", "hidden_size", 768),
        Field("num_hidden_layers", "num_hidden_layers", 32),
        Field("state_size", "mamba_state_size", 16),
        Field("expand", "mamba_expand", 2),
        Field("conv_kernel", "mamba_conv_width", 4),
        Field("time_step_rank", "mamba_dt_rank", "auto"),
        Field("tie_word_embeddings", "tie_word_embeddings", True),
        Field("eos_token_id", "eos_token_id", 0),
        Field("pad_token_id", "pad_token_id", 0),
    ),
    renames=renames("embeddings"),
    aliases=ALIASES,
    only=ONLY,
    unread=WITHOUT_ATTENTION,
    ignored=(*IGNORED, "time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan"),
    finish=partial(_written, "mamba"),
)


def _read_mamba2(values: Values, where: Path) -> Values:
    names = {"num_heads": 128, "head_dim": 64, "expand": 2, "hidden_size": 4096}
    heads, head, expand, width = given = [values.get(name, default) for name, default in names.items()]
    if all(isinstance(value, int) for value in given) and heads * head != expand * width:
        raise ValueError(
            f"load: {where}: num_heads * head_dim is {heads * head}; allowed: expand * hidden_size = {expand * width}."
        )
    for name, allowed in (("rms_norm", True), ("norm_before_gate", False)):
        if values.get(name, allowed) != allowed:
            raise refusal(where, name, values[name], allowed)
    return {**values, "time_step_limit": read_limit(values.get("time_step_limit"), where, "time_step_limit")}


def _written_mamba2(values: Values, dtype: torch.dtype) -> Values:
    heads = values["expand"] * values["hidden_size"] // values["head_dim"]
    if values["time_step_limit"] is None:
        del values["time_step_limit"]
    return {**_written("mamba2", values, dtype), "num_heads": heads}


MAMBA2 = Architecture(
    "mamba2",
    mixer="mamba2",
    fields=(
        *COMMON,
        Field("vocab_size", "vocab_size", 32768),
        Field("hidden_size", "hidden_size", 4096),
        Field("num_hidden_layers", "num_hidden_layers", 64),
        Field("state_size", "mamba2_state_size", 128),
        Field("expand", "mamba_expand", 2),
        Field("conv_kernel", "mamba_conv_width", 4),
        Field("head_dim", "mamba2_head_dim", 64),
        Field("n_groups", "mamba2_num_groups", 8),
        Field("time_step_limit", "mamba2_step_limit", None),
        Field("tie_word_embeddings", "tie_word_embeddings", False),
        Field("eos_token_id", "eos_token_id", 2),
        Field("pad_token_id", "pad_token_id", 1),
    ),
    renames=renames("embeddings"),
    aliases=ALIASES,
    only=ONLY,
    unread=WITHOUT_ATTENTION,
    ignored=(*IGNORED, "time_step_rank", "chunk_size", "num_heads"),
    prepare=_read_mamba2,
    finish=_written_mamba2,
)


MIXTRAL = Architecture(
    "mixtral",
    mixer="attention",
    feed_forwards=("experts",),
    fields=(
        *mixtures.COMMON,
        Field("vocab_size", "vocab_size", 32000),
        Field("rope_theta", "rope_theta", 1e6),
        Field("hidden_size", "hidden_size", 4096),
        Field("intermediate_size", "moe_intermediate_size", 14336),
        Field("num_hidden_layers", "num_hidden_layers", 32),
        Field("num_key_value_heads", "num_key_value_heads", 8),
        Field("max_position_embeddings", "max_position_embeddings", 131072),
        Field("rms_norm_eps", "rms_norm_eps", 1e-5),
        Field("num_local_experts", "num_experts", 8),
        Field("num_experts_per_tok", "num_experts_per_tok", 2),
        Field("router_jitter_noise", "router_jitter", 0.0),
        Field("bos_token_id", "bos_token_id", 1),
        Field("eos_token_id", "eos_token_id", 2),
    ),
    renames=mixtures.renames("block_sparse_moe"),
    only={**mixtures.ONLY, "sliding_window": (None,)},
    implied={**mixtures.IMPLIED, "qk_norm": False, "norm_topk_prob": True},
    unread={"feed_forward_pattern": ["experts"]},
    ignored=mixtures.IGNORED,
    prepare=mixtures.read_rope,
    finish=partial(mixtures.written, "mixtral", CLASSES["mixtral"]),
    split=partial(mixtures.split, "w1", "w3", "w2"),
    join=partial(mixtures.join, "w1", "w3", "w2"),
)


def _read_qwen3_moe(values: Values, where: Path) -> Values:
    """Every decoder_sparse_step-th layer has experts, but for those that mlp_only_layers names. What is published says
    num_experts, transformers 5 writes num_local_experts."""
    layers, step = values.get("num_hidden_layers", 24), values.get("decoder_sparse_step", 1)
    dense = values.get("mlp_only_layers") or []
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(f"load: {where}: decoder_sparse_step is {step!r}; allowed: whole numbers from 1.")
    if not isinstance(dense, list):
        raise ValueError(f"load: {where}: mlp_only_layers is {dense!r}; allowed: a list of layers.")
    kinds = ["experts"]
    if isinstance(layers, int) and (dense or step > 1):
        kinds = ["dense" if i in dense or (i + 1) % step else "experts" for i in range(layers)]
    experts = {"num_experts": values["num_local_experts"]} if "num_local_experts" in values else {}
    return mixtures.read_rope({**values, **experts, "mlp_only_layers": kinds}, where)


def _written_qwen3_moe(values: Values, dtype: torch.dtype) -> Values:
    kinds, layers = values["mlp_only_layers"], values["num_hidden_layers"]
    dense = [i for i in range(layers) if kinds[i % len(kinds)] == "dense"]
    values = {**values, "mlp_only_layers": dense, "decoder_sparse_step": 1}
    return mixtures.written("qwen3_moe", CLASSES["qwen3_moe"], values, dtype)


QWEN3_MOE = Architecture(
    "qwen3_moe",
    mixer="attention",
    feed_forwards=("dense", "experts"),
    fields=(
        *mixtures.COMMON,
        Field("vocab_size", "vocab_size", 151936),
        Field("rope_theta", "rope_theta", 1e4),
        Field("hidden_size", "hidden_size", 2048),
        Field("intermediate_size", "intermediate_size", 6144),
        Field("moe_intermediate_size", "moe_intermediate_size", 768),
        Field("num_hidden_layers", "num_hidden_layers", 24),
        Field("num_key_value_heads", "num_key_value_heads", 4),
        Field("max_position_embeddings", "max_position_embeddings", 32768),
        Field("rms_norm_eps", "rms_norm_eps", 1e-6),
        Field("num_experts", "num_experts", 128),
        Field("num_experts_per_tok", "num_experts_per_tok", 8),
        Field("norm_topk_prob", "norm_topk_prob", False),
        Field("mlp_only_layers", "feed_forward_pattern", ["experts"]),
        Field("bos_token_id", "bos_token_id", None),
        Field("eos_token_id", "eos_token_id", None),
    ),
    renames=mixtures.renames("mlp"),
    only={**mixtures.ONLY, "attention_bias": (False,), "use_sliding_window": (False,)},
    implied={**mixtures.IMPLIED, "qk_norm": True, "router_jitter": 0.0},
    ignored=(*mixtures.IGNORED, "decoder_sparse_step"),
    prepare=_read_qwen3_moe,
    finish=_written_qwen3_moe,
    split=partial(mixtures.split, "gate_proj", "up_proj", "down_proj"),
    join=partial(mixtures.join, "gate_proj", "up_proj", "down_proj"),
)

ARCHITECTURES = (MAMBA, MAMBA2, MIXTRAL, QWEN3_MOE)


def recognise(values: Values, where: Path) -> Architecture | None:
    """The architecture that config.json names; None when it is not Hugging Face's."""
    if "model_type" not in values:
        return None
    known = {architecture.name: architecture for architecture in ARCHITECTURES}
    name = values["model_type"]
    if not isinstance(name, str) or name not in known:
        raise refusal(where, "model_type", name, *known)
    if values.get("architectures") and CLASSES[name] not in values["architectures"]:
        raise refusal(where, "architectures", values["architectures"], [CLASSES[name]])
    if values.get("quantization_config") is not None:
        raise ValueError(f"load: {where}: quantization_config is given; allowed: weights that are not quantized.")
    return known[name]
