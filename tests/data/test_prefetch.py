"""Batches that threads make ahead are those that would be made without them; no thread and no error is lost."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcore.data import Batches, Prefetch

CPU = torch.device("cpu")
TOKENS = np.arange(1000, dtype=np.uint16)


class Recorded(Batches):
    """Notes the steps that were made; those of `wrong` fail."""

    def __init__(self, wrong: int | None = None) -> None:
        super().__init__(TOKENS, 4, 8, seed=0)
        self.wrong, self.made = wrong, []

    def __call__(self, step: int, rank: int = 0, world_size: int = 1):
        self.made.append(step)
        if step == self.wrong:
            raise OSError("the disk is gone")
        return super().__call__(step, rank, world_size)


@given(
    steps=st.lists(st.integers(0, 200), max_size=8),
    start=st.integers(0, 200),
    ranks=st.sampled_from([(0, 1), (0, 2), (1, 2), (3, 4)]),
    workers=st.integers(0, 4),
    ahead=st.integers(0, 5),
)
def test_the_bits_are_those_of_the_direct_call(steps, start, ranks, workers, ahead):
    batches = Batches(TOKENS, 8, 16, seed=3)
    with Prefetch(batches, CPU, *ranks, workers=workers, ahead=ahead) as prefetch:
        for step in [*steps, *range(start, start + 5), start]:
            for given_, expected in zip(prefetch(step), batches(step, *ranks), strict=True):
                assert given_.dtype == expected.dtype and given_.is_contiguous() and torch.equal(given_, expected)


def test_batches_are_made_before_they_are_asked_for():
    batches = Recorded()
    prefetch = Prefetch(batches, CPU, workers=1, ahead=3)
    prefetch(10)
    prefetch.coming[13].result()
    assert batches.made == [10, 11, 12, 13]
    prefetch(11)
    prefetch.coming[14].result()
    assert batches.made == [10, 11, 12, 13, 14], "none is made twice"
    prefetch(5)
    assert set(prefetch.coming) == {6, 7, 8}, "after a jump only what comes next is kept"
    prefetch.close()


def test_without_workers_a_batch_is_made_when_it_is_asked_for():
    batches, threads = Recorded(), threading.active_count()
    with Prefetch(batches, CPU, workers=0) as prefetch:
        prefetch(3)
        assert batches.made == [3] and threading.active_count() == threads


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_at_its_step(workers: int):
    with Prefetch(Recorded(wrong=2), CPU, workers=workers) as prefetch:
        prefetch(0)
        prefetch(1)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                prefetch(2)
        prefetch(3)


def test_no_thread_is_left():
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        with Prefetch(Recorded(), CPU, workers=3) as prefetch:
            prefetch(0)
            assert set(threading.enumerate()) - before
            raise KeyboardInterrupt
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError):
        prefetch(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_a_gpu_are_pinned_and_copied_without_waiting(monkeypatch: pytest.MonkeyPatch, workers: int):
    devices, pinned, copied = set(), [], []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.add((threading.get_ident(), device)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(threading.get_ident()) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: copied.append((*where, how)) or tensor)
    gpu = torch.device("cuda", 3)
    with Prefetch(Batches(TOKENS, 4, 8, seed=0), gpu, workers=workers, ahead=0) as prefetch:
        prefetch(0)
    assert len(pinned) == 2 and copied == [(gpu, {"non_blocking": True})] * 2
    assert workers == 0 or {(thread, gpu) for thread in pinned} <= devices, "pinned in the context of its own GPU"
