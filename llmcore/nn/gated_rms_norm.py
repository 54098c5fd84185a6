"""GatedRMSNorm: RMSNorm of what a gate lets through, in groups, over `ops.rms_norm` and `ops.swiglu`."""

import torch
from torch import Tensor, nn

from llmcore import ops


class GatedRMSNorm(nn.Module):
    """y = rms_norm(x * silu(z)) * weight, or with norm_before_gate y = rms_norm(x) * weight * silu(z).

    Dao and Gu, "Transformers are SSMs", 2024 (arXiv:2405.21060), section 7. The mean of squares is each group's own.

    Args:
        hidden_size: C, a multiple of groups. eps: added to the mean of squares.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, groups: int = 1, norm_before_gate: bool = False) -> None:
        super().__init__()
        if groups < 1 or hidden_size % groups:
            raise ValueError(f"GatedRMSNorm: groups is {groups}; allowed: a divisor of hidden_size = {hidden_size}.")
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x: (..., C), z: the gate, of x's shape, or None where x went through it already -> y of x's shape."""
        if z is not None and not self.norm_before_gate:
            x = ops.swiglu(z, x)
        groups, weight = (x, self.weight) if self.groups == 1 else (x.unflatten(-1, (self.groups, -1)), None)
        y = ops.rms_norm(groups, weight, self.eps)
        assert isinstance(y, Tensor)
        y = y if weight is not None else y.flatten(-2) * self.weight.to(y.dtype)
        return ops.swiglu(z, y) if z is not None and self.norm_before_gate else y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, groups={self.groups}"
