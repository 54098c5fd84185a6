"""RMSNorm, the module over `ops.rms_norm`."""

import torch
from torch import Tensor, nn

from llmcore import ops


class RMSNorm(nn.Module):
    """y = s / sqrt(mean(s^2) + eps) * (weight + weight_offset), s = x + residual; see `ops.rms_norm`.

    Args:
        hidden_size: C, the size of the last dimension.
        eps: added to the mean of squares.
        weight_offset: 1.0 is Gemma's convention; the weight then starts at zero.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.weight_offset = eps, weight_offset
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - weight_offset))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x: (..., C) -> y; with a residual of x's shape -> (y, x + residual)."""
        return ops.rms_norm(x, self.weight, self.eps, residual=residual, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
