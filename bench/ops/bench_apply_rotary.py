import torch

from bench.ops import Case, name_of
from llmcore import ops


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def eager(q, k, cos, sin):
    cos, sin = cos[: q.shape[1], None], sin[: q.shape[1], None]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def case(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    def inputs(device):
        angle = torch.rand(T, D // 2, device=device) * 6.28
        return {
            "q": torch.randn(B, T, H, D, device=device).to(dtype).requires_grad_(),
            "k": torch.randn(B, T, K, D, device=device).to(dtype).requires_grad_(),
            "cos": angle.cos(),
            "sin": angle.sin(),
        }

    moved = 2 * B * T * (H + K) * D * dtype.itemsize
    return Case(
        f"B{B} T{T} H{H} K{K} D{D} {name_of(dtype)}", ops.apply_rotary, eager, ops.apply_rotary.reference, inputs,
        (moved, moved), device=device, short=short,
    )  # fmt: skip


CASES = [
    case(*shape, dtype, short=shape[0] == 8)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in ((8, 256, 4, 4, 32), (4, 1024, 8, 8, 64), (1, 2048, 32, 4, 64), (1, 2048, 24, 8, 128))
] + [
    case(8, 4096, 32, 8, 128, torch.bfloat16, "cuda", short=True),
    case(8, 4096, 32, 32, 128, torch.bfloat16, "cuda"),
    case(16, 4096, 32, 4, 64, torch.bfloat16, "cuda"),
]
