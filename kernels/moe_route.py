"""Routing of tokens to experts, forward and backward. The maths is in the op's module.

A program takes a few tokens with all their experts, which lie in the registers as (tokens, groups, experts of a group),
both padded to powers of two, and chooses one expert of each token at a time. The best are found in an order of
integers, in which NaN comes first, as in a sort of PyTorch's, and of equal ones the first.
"""

import torch
import triton
import triton.language as tl

from . import device
from .scan_math import sigmoid

# (scores of a program's tile, warps)
TILES = {
    "sm_90": (2048, 4),
    "sm_80": (2048, 4),
    "sm_86": (2048, 4),
    device.INTERPRETER: (16384, 4),
}
LOWEST = tl.constexpr(-(2**31))  # below every number's key
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def key_of(x):
    """Rises with x; +0 and -0 have one key."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, HIGHEST, bits ^ ((bits >> 31) & HIGHEST))


@triton.jit
def value_of(key):
    return (key ^ ((key >> 31) & HIGHEST)).to(tl.float32, bitcast=True)


@triton.jit
def scores_of(logits, inside, SIGMOID: tl.constexpr):
    """Of (tokens, experts), 0 outside."""
    if SIGMOID:
        return tl.where(inside, sigmoid(logits), 0.0)
    logits = tl.where(inside, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    powers = tl.where(inside, powers, 0.0)
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def first_of_largest(keys):
    return tl.argmax(keys, 1, tie_break_left=True)


@triton.jit
def shut_groups(keys, num_groups, top_groups, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Keys (tokens, experts), the lowest for those whose group is not among the best ones."""
    tokens: tl.constexpr = keys.shape[0]
    keys = tl.reshape(keys, (tokens * GROUPS, SIZE))
    member = tl.arange(0, SIZE)[None, :]
    best = tl.max(keys, 1)
    others = tl.where(member == first_of_largest(keys)[:, None], LOWEST, keys)
    second = tl.max(others, 1)
    merit = tl.where(second == LOWEST, value_of(best), value_of(best) + value_of(second))
    merit = tl.reshape(key_of(merit), (tokens, GROUPS))
    group = tl.arange(0, GROUPS)[None, :]
    merit = tl.where(group < num_groups, merit, LOWEST)
    is_open = merit < LOWEST  # none yet
    for _ in range(top_groups):
        chosen = group == first_of_largest(merit)[:, None]
        is_open = is_open | chosen
        merit = tl.where(chosen, LOWEST, merit)
    is_open = tl.reshape(is_open, (tokens * GROUPS,))
    return tl.reshape(tl.where(is_open[:, None], keys, LOWEST), (tokens, GROUPS * SIZE))


@triton.jit(do_not_specialize=["tokens", "top_k", "scale"])
def moe_route_fwd_kernel(
    logits_ptr, bias_ptr, weights_ptr, indices_ptr, scores_ptr, tokens, experts, top_k, row_stride, num_groups,
    top_groups, scale,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    place = tl.arange(0, GROUPS * SIZE)[None, :]
    size = experts // num_groups
    expert = place // SIZE * size + place % SIZE
    exists = (place % SIZE < size) & (expert < experts)
    mask = (token < tokens) & exists
    logits = tl.load(logits_ptr + token * row_stride + expert, mask=mask, other=0.0).to(tl.float32)
    scores = scores_of(logits, exists, SIGMOID)
    if scores_ptr is not None:
        tl.store(scores_ptr + token * experts + expert, scores, mask=mask)
    ranked = scores
    if bias_ptr is not None:
        ranked += tl.load(bias_ptr + expert, mask=exists, other=0.0)
    keys = tl.where(exists, key_of(ranked), LOWEST)
    if GROUPS > 1:
        keys = shut_groups(keys, num_groups, top_groups, GROUPS, SIZE)

    choice = tl.arange(0, BLOCK_K)[None, :]
    weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    indices = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for j in range(top_k):
        best = first_of_largest(keys)[:, None]
        score = tl.sum(tl.where(place == best, scores, 0.0), 1)
        total += score
        weights = tl.where(choice == j, score[:, None], weights)
        indices = tl.where(choice == j, best // SIZE * size + best % SIZE, indices)
        keys = tl.where(place == best, LOWEST, keys)
    if NORMALIZE:
        weights = tl.div_rn(weights, tl.broadcast_to((total + 1e-20)[:, None], weights.shape))
    mask = (token < tokens) & (choice < top_k)
    tl.store(weights_ptr + token * top_k + choice, weights * scale, mask=mask)
    tl.store(indices_ptr + token * top_k + choice, indices.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["tokens", "top_k", "scale"])
def moe_route_bwd_kernel(
    dweights_ptr, dscores_ptr, logits_ptr, indices_ptr, dlogits_ptr, tokens, experts, top_k, row_stride, scale,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = row[:, None]
    expert = tl.arange(0, BLOCK_E)[None, :]
    mask = (token < tokens) & (expert < experts)
    logits = tl.load(logits_ptr + token * row_stride + expert, mask=mask, other=0.0).to(tl.float32)
    scores = scores_of(logits, expert < experts, SIGMOID)
    dscores = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if dscores_ptr is not None:
        dscores = tl.load(dscores_ptr + token * experts + expert, mask=mask, other=0.0)
    if dweights_ptr is not None:
        first = row * top_k
        total = tl.full((BLOCK_T,), 1.0, tl.float32)
        mean = tl.zeros((BLOCK_T,), tl.float32)
        if NORMALIZE:
            total = tl.full((BLOCK_T,), 1e-20, tl.float32)
            for j in range(top_k):
                chosen = tl.load(indices_ptr + first + j, mask=row < tokens, other=0)
                total += tl.sum(tl.where(expert == chosen[:, None], scores, 0.0), 1)
            for j in range(top_k):
                chosen = tl.load(indices_ptr + first + j, mask=row < tokens, other=0)
                dweight = tl.load(dweights_ptr + first + j, mask=row < tokens, other=0.0)
                mean += dweight * tl.div_rn(tl.sum(tl.where(expert == chosen[:, None], scores, 0.0), 1), total)
        for j in range(top_k):
            chosen = tl.load(indices_ptr + first + j, mask=row < tokens, other=0)
            dweight = tl.load(dweights_ptr + first + j, mask=row < tokens, other=0.0)
            slope = scale * tl.div_rn(dweight - mean, total)
            dscores = tl.where(expert == chosen[:, None], dscores + slope[:, None], dscores)
    if SIGMOID:
        dlogits = dscores * scores * sigmoid(-logits)
    else:
        dlogits = scores * (dscores - tl.sum(dscores * scores, 1)[:, None])
    tl.store(dlogits_ptr + token * experts + expert, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def _tokens_of_a_program(logits: torch.Tensor, scores_of_a_token: int) -> tuple[int, int]:
    elements, warps = TILES[device.architecture(logits.device)]
    return max(elements // scores_of_a_token, 1), warps


def moe_route_fwd(
    logits: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor, indices: torch.Tensor,
    scores: torch.Tensor | None, sigmoid: bool, normalize: bool, num_groups: int, top_groups: int, scale: float,
) -> None:  # fmt: skip
    """Fills weights (T, k) and scores (T, E), float32, and indices (T, k), int64, all contiguous; the last stride of
    logits (T, E) is 1, bias (E,) is float32."""
    tokens, experts = logits.shape
    groups, size = (triton.next_power_of_2(n) for n in (num_groups, experts // num_groups))
    block, warps = _tokens_of_a_program(logits, groups * size)
    top_k = indices.shape[1]
    with device.current(logits.device):
        moe_route_fwd_kernel[(triton.cdiv(tokens, block),)](
            logits, bias, weights, indices, scores, tokens, experts, top_k, logits.stride(0), num_groups, top_groups,
            scale, SIGMOID=sigmoid, NORMALIZE=normalize, BLOCK_T=block, GROUPS=groups, SIZE=size,
            BLOCK_K=triton.next_power_of_2(top_k), num_warps=warps,
        )  # fmt: skip


def moe_route_bwd(
    dweights: torch.Tensor | None, dscores: torch.Tensor | None, logits: torch.Tensor, indices: torch.Tensor,
    dlogits: torch.Tensor, sigmoid: bool, normalize: bool, scale: float,
) -> None:  # fmt: skip
    """Fills dlogits (T, E); what comes in is contiguous, but for the rows of logits."""
    tokens, experts = logits.shape
    padded = triton.next_power_of_2(experts)
    block, warps = _tokens_of_a_program(logits, padded)
    with device.current(logits.device):
        moe_route_bwd_kernel[(triton.cdiv(tokens, block),)](
            dweights, dscores, logits, indices, dlogits, tokens, experts, indices.shape[1], logits.stride(0), scale,
            SIGMOID=sigmoid, NORMALIZE=normalize, BLOCK_T=block, BLOCK_E=padded, num_warps=warps,
        )  # fmt: skip
