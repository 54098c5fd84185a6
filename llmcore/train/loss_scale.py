"""Loss scaling: fp16 gradients below 2^-24 would be zero, so that the loss is multiplied by a power of two before the
backward pass and the gradients are divided by it afterwards (Micikevicius et al., arXiv:1710.03740)."""

from collections.abc import Iterable

import torch
from torch import Tensor


class LossScale:
    """Halved when a gradient is not finite, doubled after 2,000 steps without one. It stays on the device: nothing
    waits for a GPU."""

    def __init__(self, device: torch.device, initial: float = 2.0**16) -> None:
        self.scale = torch.full((), initial, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients."""
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], self.scale.reciprocal())

    def update(self, bad: Tensor) -> None:
        """bad: 1.0 where the gradient was not finite, 0.0 otherwise."""
        torch._amp_update_scale_(self.scale, self.good_steps, bad, 2.0, 0.5, 2000)

    def state(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def load(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"] if "scale" in state else state["cur_scale"])
        self.good_steps.fill_(state.get("good_steps", 0))
