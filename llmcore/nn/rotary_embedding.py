"""RotaryEmbedding: the tables of cosines and sines, and their application by `ops.apply_rotary`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmcore import ops


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., 2021): channel pair i turns by position * theta ** (-2 i / R).

    Args:
        head_dim: D.
        max_position_embeddings: T_max, the rows of the tables.
        theta: base of the angles.
        rotary_dim: R, how many channels are rotated; all when None.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + R/2).
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_position_embeddings: int,
        theta: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        R = head_dim if rotary_dim is None else rotary_dim
        if R % 2 or not 0 < R <= head_dim:
            raise ValueError(
                f"RotaryEmbedding: rotary_dim is {R}; allowed: an even number from 2 to head_dim = {head_dim}."
            )
        self.rotary_dim, self.theta, self.interleaved = R, theta, interleaved
        self.max_position_embeddings = max_position_embeddings
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | None = None) -> None:
        """Makes the tables, on `device`; angles are formed in float64, so that far positions stay exact."""
        frequency = self.theta ** (
            -torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=device) / self.rotary_dim
        )
        position = torch.arange(self.max_position_embeddings, dtype=torch.float64, device=device)
        angle = position[:, None] * frequency
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """The tables follow the module to another device, but stay float32 when it is cast to another dtype."""
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q: (B, T, H, D), k: (B, T, K, D), positions: (B, T) or (T,), None means 0 .. T-1 -> (q, k) rotated."""
        return ops.apply_rotary(q, k, self.cos, self.sin, positions=positions, interleaved=self.interleaved)
