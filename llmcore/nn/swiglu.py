"""SwiGLU, the gated feed-forward layer."""

from torch import Tensor, nn

from llmcore import ops


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)) (Shazeer, 2020), without biases.

    Args:
        hidden_size: C. intermediate_size: F.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., C)."""
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
