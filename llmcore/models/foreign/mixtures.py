"""What Hugging Face's mixtures of experts have in common: each expert's matrices are tensors of their own in the files,
and the rotary embedding is told in two ways.

Of theirs, router_aux_loss_coef weighs the mean over all layers of a loss that grows with num_experts_per_tok, and only
where output_router_logits is true: it is not read, as nothing is that matters in training alone.
"""

import re
from collections import defaultdict
from pathlib import Path

import torch

from llmcore.models.foreign.architecture import Field, Tensors, Values, refusal

COMMON = (
    Field("num_attention_heads", "num_attention_heads", 32),
    Field("head_dim", "head_dim", None),
    Field("initializer_range", "initializer_range", 0.02),
    Field("tie_word_embeddings", "tie_word_embeddings", False),
    Field("pad_token_id", "pad_token_id", None),
)
ONLY = {"hidden_act": ("silu", "swish"), "attention_dropout": (0.0,)}
IGNORED = ("output_router_logits", "router_aux_loss_coef", "use_cache", "sliding_window", "max_window_layers")
# Fields that such a model has no name for, and what they must be.
IMPLIED = {
    "scoring_func": "softmax", "num_shared_experts": 0, "routed_scaling_factor": 1.0, "num_expert_groups": 1,
    "num_groups_per_tok": 1, "router_bias_rate": 0.0, "residual_in_fp32": False,
}  # fmt: skip


def read_rope(values: Values, where: Path) -> Values:
    """rope_theta beside the other names, wherever it stood. Raises ValueError for positions that are scaled."""
    told = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(told, dict):
        raise ValueError(f"load: {where}: rope_parameters must be an object, but it is a {type(told).__name__}.")
    kind = told.get("rope_type", told.get("type", "default"))
    if kind != "default":
        raise refusal(where, "rope_type", kind, "default")
    theta = told.get("rope_theta", values.get("rope_theta"))
    return values if theta is None else {**values, "rope_theta": theta}


def written(model_type: str, name: str, values: Values, dtype: torch.dtype) -> Values:
    theta = values["rope_theta"]
    head = {"architectures": [name], "model_type": model_type, "dtype": str(dtype).removeprefix("torch.")}
    return {**head, **values, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}


def renames(block: str) -> tuple[tuple[str, str], ...]:
    """`block`: what they call the experts' layer."""
    return (
        ("model.layers.{}.mlp.", f"model.layers.{{}}.{block}."),
        ("model.", "model."),
        ("lm_head.", "lm_head."),
    )


def split(gate: str, up: str, down: str, tensors: Tensors) -> Tensors:
    """Each expert's three matrices, under their names, in the place of those of all."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        layer, found, kind = name.partition(".experts.")
        if not found:
            result[name] = tensor
            continue
        for e, weight in enumerate(tensor.unbind(0)):
            if kind == "gate_up_proj":
                result[f"{layer}.experts.{e}.{gate}.weight"], result[f"{layer}.experts.{e}.{up}.weight"] = (
                    half.contiguous() for half in weight.chunk(2, 0)
                )
            else:
                result[f"{layer}.experts.{e}.{down}.weight"] = weight.contiguous()
    return result


def join(gate: str, up: str, down: str, tensors: Tensors, source: Path) -> Tensors:
    """The other way; a file that already holds all experts' matrices in one tensor stays as it is."""
    result: Tensors = {}
    found: dict[str, dict[int, dict[str, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        parts = re.fullmatch(rf"(.*\.experts)\.(\d+)\.({gate}|{up}|{down})\.weight", name)
        if parts is None:
            result[name] = tensor
        else:
            found[parts[1]][int(parts[2])][parts[3]] = tensor
    for layer, experts in found.items():
        stacks: dict[str, list[torch.Tensor]] = {gate: [], up: [], down: []}
        for e in range(max(experts) + 1):
            for kind, stack in stacks.items():
                name = f"{layer}.{e}.{kind}.weight"
                if kind not in experts[e]:
                    raise ValueError(f"load: {source} lacks {name}, though it holds other experts of {layer}.")
                stack.append(experts[e][kind])
                if stack[-1].shape != stack[0].shape or stack[-1].dtype != stack[0].dtype:
                    raise ValueError(
                        f"load: {name} in {source} is {tuple(stack[-1].shape)} of {stack[-1].dtype}; allowed: "
                        f"{tuple(stack[0].shape)} of {stack[0].dtype}, as the first expert's."
                    )
        if stacks[gate][0].shape != stacks[up][0].shape:
            raise ValueError(
                f"load: {layer}.0.{up}.weight in {source} has shape {tuple(stacks[up][0].shape)}; allowed: that of "
                f"{gate}, {tuple(stacks[gate][0].shape)}."
            )
        halves = torch.stack(stacks[gate]), torch.stack(stacks[up])
        result[f"{layer}.gate_up_proj"], result[f"{layer}.down_proj"] = torch.cat(halves, 1), torch.stack(stacks[down])
    return result
