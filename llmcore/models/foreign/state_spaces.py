"""Models as the mamba_ssm package of state-spaces reads and writes them: config.json has a d_model and no model_type.

What the mixer is told stands in an object inside, ssm_cfg, which also names the kind of mixer; the tables have its
names as ssm_cfg.d_state and so on. A name that their configuration does not have is an error there, and here.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmcore.models.files import BINARY
from llmcore.models.foreign.architecture import Architecture, Field, Values, refusal
from llmcore.models.foreign.mambas import NO_LIMIT, WITHOUT_ATTENTION, read_limit, renames

COMMON = (
    Field("d_model", "hidden_size", 2560),
    Field("n_layer", "num_hidden_layers", 64),
    Field("vocab_size", "vocab_size", 50277),
    Field("residual_in_fp32", "residual_in_fp32", True),
    Field("tie_embeddings", "tie_word_embeddings", True),
)
ONLY: dict[str, tuple[Any, ...]] = {
    "rms_norm": (True,),
    "d_intermediate": (0,),
    "attn_layer_idx": ([], None),
    "ssm_cfg.bias": (False,),
    "ssm_cfg.conv_bias": (True,),
}
IGNORED = (
    "attn_cfg", "fused_add_norm", "pad_vocab_size_multiple", "ssm_cfg.layer", "ssm_cfg.dt_min", "ssm_cfg.dt_max",
    "ssm_cfg.dt_init_floor", "ssm_cfg.device", "ssm_cfg.dtype", "ssm_cfg.layer_idx",
)  # fmt: skip
# What every published model says. The rest is written only where it is not what silence means: versions of the package
# that are older than a name refuse it.
ALWAYS = ("d_model", "n_layer", "vocab_size", "rms_norm", "residual_in_fp32")


def _flat(values: Values, where: Path) -> Values:
    """The names of ssm_cfg beside the others, and the vocabulary as large as the embedding: padded to a multiple."""
    flat = {name: value for name, value in values.items() if name != "ssm_cfg"}
    flat |= {f"ssm_cfg.{name}": value for name, value in _mixer(values, where).items()}
    multiple, vocabulary = flat.get("pad_vocab_size_multiple", 8), flat.get("vocab_size", 50277)
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"load: {where}: pad_vocab_size_multiple is {multiple!r}; allowed: whole numbers from 1.")
    if isinstance(vocabulary, int) and not isinstance(vocabulary, bool):
        flat["vocab_size"] = -(-vocabulary // multiple) * multiple
    if "ssm_cfg.dt_limit" in flat:
        flat["ssm_cfg.dt_limit"] = read_limit(flat["ssm_cfg.dt_limit"], where, "ssm_cfg.dt_limit")
    return flat


def _nested(mixer: Values, values: Values, dtype: torch.dtype) -> Values:
    """`mixer`: what ssm_cfg holds in any case. The padding is part of the vocabulary by now."""
    told = {name: value for name, value in values.items() if not name.startswith("ssm_cfg.")}
    mixer = mixer | {name.removeprefix("ssm_cfg."): value for name, value in values.items() if name not in told}
    return {**told, "ssm_cfg": mixer, "fused_add_norm": True, "pad_vocab_size_multiple": 1}


def _mixer(values: Values, where: Path) -> Values:
    mixer = values.get("ssm_cfg") or {}
    if not isinstance(mixer, dict):
        raise ValueError(f"load: {where}: ssm_cfg must be an object, but it is a {type(mixer).__name__}.")
    return mixer


def _architecture(
    layer: str,
    mixer: str,
    fields: tuple[Field, ...],
    only: Values,
    ignored: tuple[str, ...],
    told: Values,
) -> Architecture:
    return Architecture(
        layer,
        mixer=mixer,
        fields=(*COMMON, *fields),
        renames=renames("embedding"),
        only={**ONLY, **only},
        implied={"rms_norm_eps": 1e-5},
        unread={**WITHOUT_ATTENTION, "max_position_embeddings": NO_LIMIT},
        ignored=(*IGNORED, *ignored),
        always=ALWAYS,
        closed=True,
        weights=BINARY,
        writes_tied_head=True,
        prepare=_flat,
        finish=partial(_nested, told),
    )


MAMBA1 = _architecture(
    "Mamba1",
    "mamba",
    fields=(
        Field("ssm_cfg.d_state", "mamba_state_size", 16),
        Field("ssm_cfg.d_conv", "mamba_conv_width", 4),
        Field("ssm_cfg.expand", "mamba_expand", 2),
        Field("ssm_cfg.dt_rank", "mamba_dt_rank", "auto"),
    ),
    only={},
    ignored=("ssm_cfg.dt_init", "ssm_cfg.dt_scale", "ssm_cfg.use_fast_path"),
    told={},
)
MAMBA2 = _architecture(
    "Mamba2",
    "mamba2",
    fields=(
        Field("ssm_cfg.d_state", "mamba2_state_size", 128),
        Field("ssm_cfg.d_conv", "mamba_conv_width", 4),
        Field("ssm_cfg.expand", "mamba_expand", 2),
        Field("ssm_cfg.headdim", "mamba2_head_dim", 64),
        Field("ssm_cfg.ngroups", "mamba2_num_groups", 1),
        Field("ssm_cfg.dt_limit", "mamba2_step_limit", None),
    ),
    only={
        "ssm_cfg.d_ssm": (None,),
        "ssm_cfg.D_has_hdim": (False,),
        "ssm_cfg.rmsnorm": (True,),
        "ssm_cfg.norm_before_gate": (False,),
    },
    ignored=(
        "ssm_cfg.conv_init",
        "ssm_cfg.A_init_range",
        "ssm_cfg.chunk_size",
        "ssm_cfg.use_mem_eff_path",
        "ssm_cfg.process_group",
        "ssm_cfg.sequence_parallel",
    ),  # fmt: skip
    told={"layer": "Mamba2"},
)

ARCHITECTURES = (MAMBA1, MAMBA2)


def recognise(values: Values, where: Path) -> Architecture | None:
    """The architecture whose mixer ssm_cfg names, Mamba1 by default; None when config.json is not state-spaces'."""
    if "d_model" not in values or "model_type" in values:
        return None
    known = {architecture.name: architecture for architecture in ARCHITECTURES}
    layer = _mixer(values, where).get("layer", "Mamba1")
    if not isinstance(layer, str) or layer not in known:
        raise refusal(where, "ssm_cfg.layer", layer, *known)
    return known[layer]
