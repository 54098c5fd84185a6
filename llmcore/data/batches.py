"""The batch of a step as a pure function of (seed, step): nothing to save, nothing to restore on resume.

Epoch e cuts the text into windows of T tokens, from an offset drawn for (seed, e), and shuffles them. Sample
i = step * B + b is window i mod W of epoch i div W, so that each token is read once per epoch. Rank r takes slice r of
the batch: N ranks together see what one rank alone would see.

B: sequences in the global batch, T: tokens in a sequence, W: windows in an epoch.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Batches:
    """The batches of `tokens`, of which there must be at least 2 * seq_len."""

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, seed: int) -> None:
        self.tokens, self.batch_size, self.seq_len, self.seed = tokens, batch_size, seq_len, seed
        self.windows = tokens.size // seq_len - 1
        self._starts = lru_cache(maxsize=2)(self._draw_starts)

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank's slice, int64 of shape (B / world_size, T); targets are shifted by one."""
        slice_size = self.batch_size // world_size
        sample = step * self.batch_size + rank * slice_size + np.arange(slice_size)
        starts = np.array([self._starts(int(i // self.windows))[i % self.windows] for i in sample])
        return gather(self.tokens, starts, self.seq_len)

    def _draw_starts(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        return random.integers(self.seq_len) + self.seq_len * random.permutation(self.windows)


def validation_windows(tokens: np.ndarray, seq_len: int, max_tokens: int) -> np.ndarray:
    """Starts of windows spread evenly over `tokens` (more than seq_len of them), always the same ones, without overlap:
    of `max_tokens` tokens together, or of as many as there are."""
    available = (tokens.size - 1) // seq_len
    count = min(max(max_tokens // seq_len, 1), available)
    return np.linspace(0, available - 1, count).astype(np.int64) * seq_len


def gather(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (len(starts), T) of the windows at `starts`."""
    rows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    # copied by numpy: PyTorch would start a team of threads for each thread of Prefetch
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
