"""An exponential moving average of the weights, often better than the last ones (Polyak and Juditsky, 1992).

a <- d a + (1 - d) w        after every step; d = min(decay, (1 + step) / (10 + step)), so that the start is forgotten
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """Of fp32 tensors: the weights, or a rank's shards of them."""

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.weights, self.decay = [w.detach() for w in weights], decay
        self.averages = [w.clone() for w in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step `step` (from 0)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """The weights become the average and the average the weights; the second call undoes the first."""
        for weight, average in zip(self.weights, self.averages, strict=True):
            own = weight.clone()
            weight.copy_(average)
            average.copy_(own)
