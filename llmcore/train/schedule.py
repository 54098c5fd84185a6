"""The learning rate: a linear rise over the first steps, times half a cosine over the whole run.

    lr = peak * min(1, (step + 1) / warmup_steps) * (r + (1 - r) * (1 + cos(pi * progress)) / 2)

Cosine annealing: Loshchilov and Hutter, arXiv:1608.03983. `progress` goes from 0 to 1 by steps or by time, whichever is
further, so that the cosine ends where the run ends. `r` is the share of the peak that is left at the end.
"""

import math

from llmcore.train.config import OptimizerConfig


def progress(step: int, seconds: float, max_steps: int | None, max_seconds: float | None) -> float:
    """Share of the run that is done: 1 or more when it is over."""
    by_steps = step / max_steps if max_steps is not None else 0.0
    by_time = seconds / max_seconds if max_seconds is not None else 0.0
    return max(by_steps, by_time)


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """The rate of step `step` (from 0), `progress` of the run being over."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.lr * warmup * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)
