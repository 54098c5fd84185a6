"""An exponential moving average of the weights, often better than the last ones (Polyak and Juditsky, 1992).

a <- d a + (1 - d) w        after every step; d = min(decay, (1 + step) / (10 + step)), so that the start is forgotten
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """weights: the average by parameter name, fp32, on the parameters' device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After step `step` (from 0)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), [p.float() for p in model.parameters()], 1 - keep)

    def load(self, weights: dict[str, Tensor]) -> None:
        for name, mine in self.weights.items():
            mine.copy_(weights[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model computes with the average."""
        parameters = dict(model.named_parameters())
        own = {name: p.data for name, p in parameters.items()}
        for name, p in parameters.items():
            p.data = self.weights[name].to(p.dtype)
        try:
            yield
        finally:
            for name, p in parameters.items():
                p.data = own[name]
