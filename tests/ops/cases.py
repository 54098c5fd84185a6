"""What the tests of all ops share."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = True, seed: int = 0
) -> Tensor:
    """Normal numbers that depend only on shape and seed, as a leaf that asks for a gradient."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(device).requires_grad_(grad)
