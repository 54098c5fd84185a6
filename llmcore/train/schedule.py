"""The learning rate: a linear rise over the first steps, times a fall over the whole run.

    lr = peak * min(1, (step + 1) / warmup_steps) * fall(progress)

With r the share of the peak that is left at the end and p the progress, from 0 to 1 by steps or by time, whichever is
further, so that the fall ends where the run ends:

    cosine      r + (1 - r) (1 + cos(pi p)) / 2        Loshchilov and Hutter, arXiv:1608.03983
    linear      r + (1 - r) (1 - p)
    polynomial  r + (1 - r) (1 - p)^power
    constant    1
    wsd         1, and over the last `decay_ratio` of the run linearly to r        Hu et al., arXiv:2404.06395
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
    if config.schedule == "constant":
        return config.lr * warmup
    return config.lr * warmup * (config.final_lr_ratio + (1 - config.final_lr_ratio) * _left(config, progress))


def _left(config: OptimizerConfig, progress: float) -> float:
    """From 1 to 0."""
    left = 1 - min(progress, 1.0)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * (1 - left))) / 2
    if config.schedule == "polynomial":
        return left**config.power
    if config.schedule == "wsd":
        return min(1.0, left / config.decay_ratio) if config.decay_ratio > 0 else 1.0
    return left
