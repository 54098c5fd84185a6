import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops import Case, name_of
from llmcore import ops


def ours(q, k, v, causal):
    return ops.attention(q, k, v, causal=causal)


def reference(q, k, v, causal):
    return ops.attention.reference(q, k, v, causal=causal)


def sdpa(q, k, v, causal):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def sdpa_by(backend: SDPBackend):
    """Loads SDPA held to one of its backends."""

    def held(q, k, v, causal):
        with sdpa_kernel(backend):
            return sdpa(q, k, v, causal)

    return lambda: held


def flex():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @functools.cache
    def mask(T_q, T_k, device):
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, T_q, T_k, device=device)

    compiled = torch.compile(flex_attention)

    def call(q, k, v, causal):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        blocks = mask(q.shape[2], k.shape[2], q.device) if causal else None
        return compiled(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return call


GPU_PEERS = {
    "SDPA flash": sdpa_by(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa_by(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": flex,
}


def case(
    B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype, causal: bool = True, device: str = "cpu",
    short: bool = False,
) -> Case:  # fmt: skip
    def inputs(device, B=B, H=H, K=K):
        made = {n: torch.randn(B, T, h, D, device=device).to(dtype) for n, h in (("q", H), ("k", K), ("v", K))}
        return {**{n: t.requires_grad_() for n, t in made.items()}, "causal": causal}

    products = 4.0 * B * H * T * T * D / (2 if causal else 1)
    title = f"{'causal' if causal else 'full'} B{B} T{T} H{H} K{K} D{D} {name_of(dtype)}"
    return Case(
        title, ours, sdpa, reference, inputs, flops=(products, 2.5 * products), device=device, short=short,
        peers=GPU_PEERS if device == "cuda" else {},
        check=(lambda device: inputs(device, 1, H // K, 1)) if device == "cuda" else None,
    )  # fmt: skip


CASES = (
    [
        case(*shape, dtype, short=shape[0] == 8)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in (
            (8, 256, 4, 4, 32),
            (4, 512, 8, 8, 64),
            (2, 1024, 8, 8, 64),
            (1, 2048, 8, 1, 64),
            (1, 2048, 6, 2, 128),
        )
    ]
    + [
        # 16k tokens and a hidden size of 2048, as the published figures have it
        case(16384 // T, T, 2048 // D, 2048 // D, D, torch.bfloat16, causal, "cuda", short=T == 4096 and causal)
        for D, causal in ((64, True), (128, True), (128, False))
        for T in (1024, 4096, 8192, 16384)
    ]
    + [case(4, 4096, 32, 8, 128, torch.bfloat16, True, "cuda")]
)
