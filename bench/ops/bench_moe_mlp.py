"""The whole layer: router, routing, experts. eager is a loop over the experts that have a token, in plain PyTorch."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.ops import Case, name_of
from llmcore import ops


def ours(x, router, w_gate_up, w_down, top_k):
    weights, indices = ops.moe_route(F.linear(x.float(), router), top_k)
    return ops.moe_mlp(x, w_gate_up, w_down, weights, indices)


def reference(x, router, w_gate_up, w_down, top_k):
    weights, indices = ops.moe_route.reference(F.linear(x.to(router.dtype), router), top_k)
    return ops.moe_mlp.reference(x, w_gate_up, w_down, weights, indices)


def route(x, router, top_k):
    weights, indices = torch.topk(torch.softmax(F.linear(x.float(), router), -1), top_k)
    return weights / weights.sum(-1, keepdim=True), indices


def eager(x, router, w_gate_up, w_down, top_k):
    weights, indices = route(x, router, top_k)
    # not w[e], whose gradient is as large as that of all experts
    per_expert = list(zip(w_gate_up.unbind(), w_down.unbind(), strict=True))
    y = torch.zeros_like(x)
    for e in indices.unique().tolist():
        token, choice = torch.where(indices == e)
        gate_up, down = per_expert[e]
        gate, up = F.linear(x[token], gate_up).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, down) * weights[token, choice, None]
        y.index_add_(0, token, out.to(y.dtype))
    return y


def hugging_face(implementation: str, E: int, k: int, C: int, inner: int):
    """transformers' experts of Qwen3-MoE, whose Mixtral's differ in names alone, behind the eager router: their own
    rounds its logits to x's dtype, and in 16 bits then chooses others."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    settings: dict[str, Any] = dict(
        hidden_size=C, moe_intermediate_size=inner, num_experts=E, num_experts_per_tok=k,
        experts_implementation=implementation,
    )  # fmt: skip
    with torch.device("meta"):
        experts = Qwen3MoeExperts(Qwen3MoeConfig(**settings))

    def call(x, router, w_gate_up, w_down, top_k):
        weights, indices = route(x, router, top_k)
        return torch.func.functional_call(
            experts, {"gate_up_proj": w_gate_up, "down_proj": w_down}, (x, indices, weights.to(x.dtype))
        )

    return call


def case(
    T: int, C: int, inner: int, E: int, k: int, dtype: torch.dtype, device: str = "cpu", short: bool = False
) -> Case:
    def inputs(device, T=T, C=C, inner=inner):
        def randn(*shape, scale=1.0):
            return torch.randn(*shape, device=device) * scale

        tensors = {
            "x": randn(T, C).to(dtype), "router": randn(E, C, scale=C**-0.5),
            "w_gate_up": randn(E, 2 * inner, C, scale=C**-0.5).to(dtype),
            "w_down": randn(E, C, inner, scale=inner**-0.5).to(dtype),
        }  # fmt: skip
        return {**{n: t.requires_grad_() for n, t in tensors.items()}, "top_k": k}

    weights, rows = 3 * E * C * inner * dtype.itemsize, T * k * dtype.itemsize
    flops = 6 * T * k * C * inner
    # their eager backward is quadratic in the experts: half a minute a step with 128
    kinds = ("eager", "grouped_mm") if device == "cpu" and E < 128 else ("grouped_mm",)
    return Case(
        f"T{T} C{C} F{inner} E{E} top {k} {name_of(dtype)}", ours, eager, reference, inputs,
        (weights + rows * (2 * C + 6 * inner), 3 * weights + rows * (6 * C + 12 * inner)), (flops, 2 * flops),
        peers={
            f"Hugging Face {kind}": partial(hugging_face, kind, E, k, C, inner) for kind in kinds
        },
        check=lambda device: inputs(device, min(T, 256), min(C, 64), min(inner, 64)),
        facts={"dtype": name_of(dtype), "experts": E}, device=device, short=short,
    )  # fmt: skip


SIZES = (32, 128, 512)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(64, size, size, 8, 2, dtype, device)


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    if not any(map(config.has_experts, range(config.num_hidden_layers))):
        return []
    return [
        case(
            B * T, config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok,
            dtype, device,
        )
    ]  # fmt: skip


CASES = [
    case(T, C, inner, E, k, dtype, short=C == 128)
    for dtype in (torch.float32, torch.bfloat16)
    for T, C, inner, E, k in (
        (2048, 128, 192, 8, 2), (1024, 1024, 2816, 8, 2), (2048, 512, 256, 64, 6), (2048, 1024, 384, 128, 8)
    )
] + [
    case(32768, 2048, 768, 128, 8, torch.bfloat16, "cuda", short=True),
    case(32768, 1536, 256, 128, 8, torch.bfloat16, "cuda"),
    case(32768, 4096, 1024, 64, 4, torch.bfloat16, "cuda"),
]  # fmt: skip
