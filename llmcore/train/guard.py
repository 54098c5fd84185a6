"""What keeps a bad step from spoiling a run: gradients that are no numbers, and losses that jump."""

import math
import statistics
from collections import deque

import torch
from torch import Tensor


class Guard:
    """Counts the steps whose gradient is not finite, on the gradient's device: nothing here waits for a GPU.

    Under DDP all ranks hold the same averaged gradient, so that they come to the same verdict.
    """

    def __init__(self, device: torch.device, skipped: int = 0) -> None:
        self.skipped = torch.tensor(float(skipped), device=device)
        self.in_a_row = self.longest = torch.zeros((), device=device)

    def check(self, norm: Tensor) -> Tensor:
        """1.0 where the norm of a step's gradient is not finite, so that the step must not be made; 0.0 otherwise."""
        bad = (~norm.isfinite()).float()
        self.skipped = self.skipped + bad
        self.in_a_row = (self.in_a_row + 1) * bad
        self.longest = torch.maximum(self.longest, self.in_a_row)
        return bad

    def read(self) -> tuple[int, int]:
        """Steps skipped in all, and the most in a row since the last reading."""
        skipped, longest = (int(count) for count in torch.stack([self.skipped, self.longest]).tolist())
        self.longest = self.in_a_row
        return skipped, longest


class Spikes:
    """Finds losses far above those before them. What is not finite neither is a spike nor counts as before."""

    def __init__(self, memory: int = 50, width: float = 8.0) -> None:
        self.width = width
        self.before: deque[float] = deque(maxlen=memory)

    def find(self, loss: float) -> float | None:
        """The usual loss, if this one is a spike: above the median of those before by `width` median deviations."""
        if not math.isfinite(loss):
            return None
        usual = None
        if len(self.before) >= 10:
            median = statistics.median(self.before)
            deviation = statistics.median(abs(x - median) for x in self.before)
            if loss > median + max(self.width * deviation, 0.05 * abs(median)):
                usual = median
        self.before.append(loss)
        return usual
