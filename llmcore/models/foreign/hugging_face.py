"""Models as Hugging Face's `transformers` reads and writes them: config.json names the architecture by its model_type.

What such a config.json says beside the names of these tables, their model does not read either.
"""

from functools import partial
from pathlib import Path

import torch

from llmcore.models.foreign.architecture import Architecture, Field, Values, refusal
from llmcore.models.foreign.mambas import NO_LIMIT, WITHOUT_ATTENTION, read_limit, renames

# transformers' class of each model_type, as `architectures` has it.
CLASSES = {"mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}

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

ARCHITECTURES = (MAMBA, MAMBA2)


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
