"""The best validation of a run so far, and when to give up hope of a better one."""

import math
from dataclasses import dataclass


@dataclass
class Best:
    """bits: per byte of held-out text, at `step`; null before the first validation. since: validations after it."""

    bits: float | None = None
    step: int = 0
    since: int = 0

    def update(self, bits: float, step: int) -> bool:
        """Take note of a validation; whether it is the best. One that is no number never is."""
        if math.isfinite(bits) and (self.bits is None or bits < self.bits):
            self.bits, self.step, self.since = bits, step, 0
            return True
        self.since += 1
        return False

    def is_lost(self, patience: int | None) -> bool:
        """Whether `patience` validations in a row brought nothing."""
        return patience is not None and self.since >= patience
