import torch

from bench.ops import Case
from llmcore import ops


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def eager(q, k, cos, sin):
    cos, sin = cos[: q.shape[1], None], sin[: q.shape[1], None]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def case(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype) -> Case:
    def inputs():
        angle = torch.rand(T, D // 2) * 6.28
        return {
            "q": torch.randn(B, T, H, D).to(dtype).requires_grad_(),
            "k": torch.randn(B, T, K, D).to(dtype).requires_grad_(),
            "cos": angle.cos(),
            "sin": angle.sin(),
        }

    title = f"B{B} T{T} H{H} K{K} D{D} {str(dtype).removeprefix('torch.')}"
    return Case(title, ops.apply_rotary, eager, ops.apply_rotary.reference, inputs)


CASES = [
    case(*shape, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in ((8, 256, 4, 4, 32), (4, 1024, 8, 8, 64), (1, 2048, 32, 4, 64), (1, 2048, 24, 8, 128))
]
