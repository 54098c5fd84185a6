"""The order of the pairs of a token and one of its experts: a stable counting sort by expert, on the device.

Blocks of pairs are counted by expert, the counts added up over the blocks before and the experts before, and each pair
then stands after those of its expert in earlier blocks and those before it in its own. Nothing depends on the order in
which programs run, and no size on what the pairs hold. A pair of no expert has no place: -1.
"""

import torch
import triton
import triton.language as tl

from . import device

# Pairs of a block, counted by so many experts at a time; blocks that are added up at a time.
BLOCKS = {
    "sm_90": (128, 64, 64),
    "sm_80": (128, 64, 64),
    "sm_86": (128, 64, 64),
    device.INTERPRETER: (256, 256, 256),
}


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    indices_ptr, counts_ptr, pairs, experts, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """counts[block, expert]"""
    block = tl.program_id(0).to(tl.int64)
    pair = block * BLOCK_P + tl.arange(0, BLOCK_P)
    index = tl.load(indices_ptr + pair, mask=pair < pairs, other=-1)
    for first in range(0, experts, BLOCK_E):
        expert = first + tl.arange(0, BLOCK_E)
        count = tl.sum((index[:, None] == expert[None, :]).to(tl.int32), 0)
        tl.store(counts_ptr + block * experts + expert, count, mask=expert < experts)


@triton.jit(do_not_specialize=["blocks"])
def add_blocks_kernel(counts_ptr, totals_ptr, blocks, experts, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts[block, expert] becomes the count of the blocks before; totals[expert]"""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, blocks, BLOCK_B):
        block = (first + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
        at = counts_ptr + block * experts + expert[None, :]
        mask = (block < blocks) & (expert < experts)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + expert, total, mask=expert < experts)


@triton.jit
def add_experts_kernel(totals_ptr, offsets_ptr, experts, BLOCK_E: tl.constexpr):
    """offsets[expert] = the totals before; offsets[experts] = all"""
    expert = tl.arange(0, BLOCK_E)
    total = tl.load(totals_ptr + expert, mask=expert < experts, other=0)
    tl.store(offsets_ptr + expert + 1, tl.cumsum(total, 0), mask=expert < experts)
    tl.store(offsets_ptr, 0)


@triton.jit(do_not_specialize=["pairs"])
def place_kernel(
    indices_ptr, counts_ptr, offsets_ptr, order_ptr, place_ptr, pairs, experts, BLOCK_P: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, BLOCK_P)
    pair = block * BLOCK_P + here
    index = tl.load(indices_ptr + pair, mask=pair < pairs, other=-1)
    earlier = (index[None, :] == index[:, None]) & (here[None, :] < here[:, None])
    exists = (index >= 0) & (index < experts)
    place = tl.load(offsets_ptr + index, mask=exists, other=0)
    place += tl.load(counts_ptr + block * experts + index, mask=exists, other=0)
    place += tl.sum(earlier.to(tl.int32), 1)
    tl.store(place_ptr + pair, tl.where(exists, place, -1), mask=pair < pairs)
    tl.store(order_ptr + place, pair.to(tl.int32), mask=exists)


def expert_plan(indices: torch.Tensor, order: torch.Tensor, place: torch.Tensor, offsets: torch.Tensor) -> None:
    """Fills order (P,), place (P,) and offsets (E + 1,), int32, from indices (P,), int64; all contiguous."""
    pairs, experts = indices.shape[0], offsets.shape[0] - 1
    block_p, block_b, block_e = BLOCKS[device.architecture(indices.device)]
    block_e = min(block_e, triton.next_power_of_2(experts))
    blocks = triton.cdiv(pairs, block_p)
    counts = torch.empty((blocks + 1, experts), dtype=torch.int32, device=indices.device)
    totals = counts[blocks]
    with device.current(indices.device):
        if blocks:
            count_kernel[(blocks,)](indices, counts, pairs, experts, BLOCK_P=block_p, BLOCK_E=block_e)
        add_blocks_kernel[(triton.cdiv(experts, block_e),)](
            counts, totals, blocks, experts, BLOCK_B=block_b, BLOCK_E=block_e
        )
        add_experts_kernel[(1,)](totals, offsets, experts, BLOCK_E=triton.next_power_of_2(experts))
        if blocks:
            place_kernel[(blocks,)](indices, counts, offsets, order, place, pairs, experts, BLOCK_P=block_p)
