import torch
import torch.nn.functional as F

from bench.ops import Case
from llmcore import ops


def ours(q, k, v):
    return ops.attention(q, k, v, causal=True)


def reference(q, k, v):
    return ops.attention.reference(q, k, v, causal=True)


def sdpa(q, k, v):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def case(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype) -> Case:
    def inputs():
        return {
            "q": torch.randn(B, T, H, D).to(dtype).requires_grad_(),
            "k": torch.randn(B, T, K, D).to(dtype).requires_grad_(),
            "v": torch.randn(B, T, K, D).to(dtype).requires_grad_(),
        }

    title = f"causal B{B} T{T} H{H} K{K} D{D} {str(dtype).removeprefix('torch.')}"
    return Case(title, ours, sdpa, reference, inputs, flops=2.0 * B * H * T * T * D)


CASES = [
    case(*shape, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in (
        (8, 256, 4, 4, 32),
        (4, 512, 8, 8, 64),
        (2, 1024, 8, 8, 64),
        (1, 2048, 8, 1, 64),
        (1, 2048, 6, 2, 128),
    )
]
