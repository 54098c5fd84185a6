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


def flash_attn():
    from flash_attn import flash_attn_func

    return lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)


def flash_attn_3():
    from flash_attn_interface import flash_attn_func

    def call(q, k, v, causal):
        result = flash_attn_func(q, k, v, causal=causal)
        return result[0] if isinstance(result, tuple) else result

    return call


def xformers():
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    def call(q, k, v, causal):
        mask, (H, K) = (LowerTriangularMask() if causal else None), (q.shape[2], k.shape[2])
        if H == K:
            return memory_efficient_attention(q, k, v, mask)
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, H // K, -1) for x in (k, v))
        return memory_efficient_attention(q.unflatten(2, (K, H // K)), k, v, mask).flatten(2, 3)

    return call


GPU_PEERS = {
    "SDPA flash": sdpa_by(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa_by(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": flex,
    "flash-attn": flash_attn,
    "flash-attn 3": flash_attn_3,
    "xformers": xformers,
}


def case(
    B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype, causal: bool = True, device: str = "cpu",
    short: bool = False,
) -> Case:  # fmt: skip
    def inputs(device, B=B, H=H, K=K):
        made = {n: torch.randn(B, T, h, D, device=device).to(dtype) for n, h in (("q", H), ("k", K), ("v", K))}
        return {**{n: t.requires_grad_() for n, t in made.items()}, "causal": causal}

    rows, keys = B * T * H * D * dtype.itemsize, B * T * K * D * dtype.itemsize
    # q, k, v, out; then q, k, v, out, dout, dq, dk, dv
    moved = (2 * rows + 2 * keys, 4 * rows + 4 * keys)
    products = 4.0 * B * H * T * T * D / (2 if causal else 1)
    title = f"{'causal' if causal else 'full'} B{B} T{T} H{H} K{K} D{D} {name_of(dtype)}"
    return Case(
        title, ours, sdpa, reference, inputs, moved, (products, 2.5 * products), device=device, short=short,
        facts={"dtype": name_of(dtype), "length": T, "head_dim": D, "causal": causal},
        peers=GPU_PEERS if device == "cuda" else {},
        check=(lambda device: inputs(device, 1, H // K, 1)) if device == "cuda" or T > 2048 else None,
    )  # fmt: skip


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return [case(B, T, config.num_attention_heads, config.num_key_value_heads, config.head_dim, dtype, True, device)]


SIZES = (64, 256, 1024, 2048)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(1, size, 2, 1, 64, dtype, True, device)


CASES = (
    [
        case(*shape, dtype, short=shape[0] == 8)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in (
            (8, 256, 4, 4, 32),
            (4, 512, 8, 8, 64),
            (2, 1024, 8, 8, 64),
            (1, 2048, 8, 8, 64),
            (1, 2048, 8, 1, 64),
            (1, 4096, 8, 8, 64),
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
