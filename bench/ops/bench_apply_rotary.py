import torch

from bench.ops import Case, name_of
from llmcore import ops


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def eager(q, k, cos, sin):
    cos, sin = cos[: q.shape[1], None], sin[: q.shape[1], None]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def doubled(cos, sin, dtype):
    """Angles as Hugging Face and Liger want them: (1, T, D), in the dtype of q."""
    return (torch.cat((table, table), -1).to(dtype)[None] for table in (cos, sin))


def transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, *doubled(cos, sin, q.dtype), unsqueeze_dim=2)


def liger():
    from liger_kernel.ops.rope import LigerRopeFunction

    def call(q, k, cos, sin):
        rotated = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *doubled(cos, sin, q.dtype))
        return tuple(x.transpose(1, 2) for x in rotated)

    return call


def flash_linear_attention():
    from fla.modules.rotary import rotary_embedding

    return lambda q, k, cos, sin: tuple(rotary_embedding(x, cos.to(x.dtype), sin.to(x.dtype)) for x in (q, k))


def flash_attn():
    from flash_attn.layers.rotary import apply_rotary_emb

    return lambda q, k, cos, sin: tuple(apply_rotary_emb(x, cos.to(x.dtype), sin.to(x.dtype)) for x in (q, k))


GPU_PEERS = {"Liger": liger, "flash-linear-attention": flash_linear_attention, "flash-attn": flash_attn}


def case(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    def inputs(device):
        angle = torch.rand(T, D // 2, device=device) * 6.28
        return {
            "q": torch.randn(B, T, H, D, device=device).to(dtype).requires_grad_(),
            "k": torch.randn(B, T, K, D, device=device).to(dtype).requires_grad_(),
            "cos": angle.cos(),
            "sin": angle.sin(),
        }

    elements = B * T * (H + K) * D
    moved = 2 * elements * dtype.itemsize
    return Case(
        f"B{B} T{T} H{H} K{K} D{D} {name_of(dtype)}", ops.apply_rotary, eager, ops.apply_rotary.reference, inputs,
        (moved, moved), (3 * elements, 3 * elements),
        peers={"transformers": transformers, **(GPU_PEERS if device == "cuda" else {})},
        facts={"dtype": name_of(dtype), "width": (H + K) * D}, device=device, short=short,
    )  # fmt: skip


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return [case(B, T, config.num_attention_heads, config.num_key_value_heads, config.head_dim, dtype, device)]


SIZES = (32, 64, 128, 256)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(1, 256, 2, 1, size, dtype, device)


CASES = [
    case(*shape, dtype, short=shape[0] == 8)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in ((8, 256, 4, 4, 32), (4, 1024, 8, 8, 64), (1, 2048, 32, 4, 64), (1, 2048, 24, 8, 128))
] + [
    case(8, 4096, 32, 8, 128, torch.bfloat16, "cuda", short=True),
    case(8, 4096, 32, 32, 128, torch.bfloat16, "cuda"),
    case(16, 4096, 32, 4, 64, torch.bfloat16, "cuda"),
]
