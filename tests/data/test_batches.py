"""The batch is a pure function of (seed, step), is shared out by slices, and an epoch reads each window once."""

import numpy as np
import torch

from llmcore.data import Batches, validation_windows

# The values are the positions, so that a batch tells where it was read; 16 bits, as there are more than 256 of them.
TOKENS = np.arange(1000, dtype=np.uint16)


def test_batch_depends_on_seed_and_step_only():
    one, other = Batches(TOKENS, 6, 16, seed=3), Batches(TOKENS, 6, 16, seed=3)
    forwards = [one(step)[0] for step in range(40)]
    backwards = [other(step)[0] for step in reversed(range(40))][::-1]
    assert torch.equal(torch.stack(forwards), torch.stack(backwards))
    assert not torch.equal(forwards[0], Batches(TOKENS, 6, 16, seed=4)(0)[0])
    assert len({batch.numpy().tobytes() for batch in forwards}) == 40


def test_ranks_take_slices_of_the_global_batch():
    batches = Batches(TOKENS, 8, 16, seed=0)
    for step in (0, 7, 100):
        inputs, targets = batches(step)
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (8, 16)
        assert torch.equal(targets, inputs + 1), "the target of a position is the token after it"
        for world_size in (1, 2, 4):
            slices = [batches(step, rank, world_size) for rank in range(world_size)]
            assert torch.equal(torch.cat([x for x, _ in slices]), inputs)
            assert torch.equal(torch.cat([y for _, y in slices]), targets)


def test_an_epoch_reads_each_window_once():
    batches = Batches(TOKENS, 7, 16, seed=1)
    samples = torch.cat([batches(step)[0] for step in range(30)])
    for epoch in range(3):
        windows = samples[epoch * batches.windows : (epoch + 1) * batches.windows]
        assert windows.unique().numel() == windows.numel() == 61 * 16
    assert not torch.equal(samples[:61], samples[61:122])


def test_shortest_text():
    batches = Batches(TOKENS[:32], 4, 16, seed=0)
    assert batches.windows == 1 and batches(5)[1].max() < 32


def test_validation_windows_are_spread_and_apart():
    windows = validation_windows(TOKENS, 16, max_tokens=160)
    assert len(windows) == 10 and windows[0] == 0 and windows[-1] == 61 * 16 and (np.diff(windows) >= 16).all()
    assert len(validation_windows(TOKENS, 16, max_tokens=10**9)) == 62
    assert list(validation_windows(TOKENS[:17], 16, max_tokens=1)) == [0]
