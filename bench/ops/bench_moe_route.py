import torch

from bench.ops import Case, name_of
from llmcore import ops


def eager(logits, top_k):
    weights, indices = torch.topk(torch.softmax(logits.float(), -1), top_k)
    return weights / weights.sum(-1, keepdim=True), indices


def case(T: int, E: int, k: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    def inputs(device):
        return {"logits": torch.randn(T, E, device=device).to(dtype).requires_grad_(), "top_k": k}

    def distinct(device):
        """Numbers that are equal in every dtype or far apart, so that all choose the same experts."""
        logits = (torch.randn(min(T, 512), E, device=device) * 16).round() / 16
        return {"logits": logits.to(dtype).requires_grad_(), "top_k": k}

    tensor = T * E * dtype.itemsize
    return Case(
        f"{T}x{E} top {k} {name_of(dtype)}", ops.moe_route, eager, ops.moe_route.reference, inputs,
        (tensor + 12 * T * k, 2 * tensor + 12 * T * k), (T * E * (4 + k), T * E * 6),
        check=distinct, facts={"dtype": name_of(dtype), "experts": E}, device=device, short=short,
    )  # fmt: skip


SIZES = (8, 64, 256)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(64, size, min(size, 8), dtype, device)


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    if not any(map(config.has_experts, range(config.num_hidden_layers))):
        return []
    return [case(B * T, config.num_experts, config.num_experts_per_tok, torch.float32, device)]


CASES = [
    case(T, E, k, torch.float32, short=E == 8)
    for T, E, k in ((2048, 8, 2), (4096, 64, 6), (4096, 128, 8), (2048, 256, 8))
] + [
    case(32768, 128, 8, torch.float32, "cuda", short=True),
    case(32768, 256, 8, torch.float32, "cuda"),
]
