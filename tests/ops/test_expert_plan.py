"""The order of the pairs is that of a stable sort by expert, whoever computes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sessions import INTERPRETED

from llmcore.ops._experts import groups, plan

OP = "moe_mlp"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(indices, experts, backend):
    order, place, offsets = plan("moe_mlp", indices.to(DEVICE), experts, backend)
    flat = indices.flatten()
    expected = flat.argsort(stable=True)
    assert torch.equal(order.cpu().long(), expected)
    assert torch.equal(place.cpu().long()[expected], torch.arange(len(flat)))
    counts = torch.bincount(flat, minlength=experts)
    assert torch.equal(offsets.cpu().long(), torch.cat([torch.zeros(1).long(), counts.cumsum(0)]))
    assert {e: end - begin for e, begin, end in groups(offsets)} == {e: int(n) for e, n in enumerate(counts) if n}


@pytest.mark.parametrize(("pairs", "experts"), [(0, 3), (1, 1), (700, 1), (513, 300), (3000, 7), (1000, 64)])
def test_sizes(backend, pairs, experts):
    check(torch.randint(experts, (pairs, 1), generator=torch.Generator().manual_seed(pairs)), experts, backend)


def test_many_pairs_on_all_threads(backend):
    if INTERPRETED:
        pytest.skip("the interpreter takes minutes for as many, and has one thread")
    check(torch.randint(60, (40000, 4), generator=torch.Generator().manual_seed(0)), 60, backend)


def test_many_blocks(backend, monkeypatch):
    """More than the triton kernels add up at a time, both of pairs and of experts."""
    if backend != "triton":
        pytest.skip("the others have no blocks")
    from llmcore.kernels import device, expert_plan

    monkeypatch.setitem(expert_plan.BLOCKS, device.architecture(torch.device(DEVICE)), (16, 4, 4))
    check(torch.randint(11, (150, 2), generator=torch.Generator().manual_seed(0)), 11, backend)


@given(st.lists(st.integers(0, 9), max_size=600), st.integers(10, 20))
def test_any_indices(backend, indices, experts):
    check(torch.tensor(indices, dtype=torch.int64).view(-1, 1), experts, backend)


@pytest.mark.parametrize("wrong", [-1, 10, 2**40])
def test_an_index_that_is_no_expert_is_named(backend, wrong, monkeypatch):
    monkeypatch.setattr("llmcore.ops._experts.values_are_checked", lambda _: True)
    indices = torch.zeros(50000, 2, dtype=torch.int64)
    indices[40000, 1] = wrong
    with pytest.raises(ValueError, match=f"indices holds {wrong}; allowed: 0 to 9, the experts"):
        plan("moe_mlp", indices.to(DEVICE), 10, backend)
