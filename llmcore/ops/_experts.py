"""Groups of rows, one for each expert: how (token, expert) pairs come into them, and the products of each group.

Pair t * k + j is token t's j-th choice. The pairs are sorted by expert, those of one expert in the order of the tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmcore.ops import _native
from llmcore.ops._documents import values_are_checked


class Plan(NamedTuple):
    """order (P,): the pair at each place. place (P,): the place of each pair. offsets (E + 1,): where each expert's
    places begin, and their end. All int32. A pair of no expert, where nobody looked, has the place -1, and the end of
    order then means nothing."""

    order: Tensor
    place: Tensor
    offsets: Tensor


def empty_plan(indices: Tensor, experts: int) -> Plan:
    pairs = indices.numel()
    return Plan(*(indices.new_empty(n, dtype=torch.int32) for n in (pairs, pairs, experts + 1)))


def _require_experts(op: str, indices: Tensor, pair: int, experts: int) -> None:
    if pair >= 0:
        raise ValueError(
            f"{op}: indices holds {int(indices.flatten()[pair])}; allowed: 0 to {experts - 1}, the experts."
        )


def plan(op: str, indices: Tensor, experts: int, backend: str) -> Plan:
    """The plan of indices (T, k) int64. Raises ValueError for one that is no expert; on CUDA only with
    LLMCORE_CHECK=1."""
    indices = indices.contiguous()
    if backend == "cpu":
        result = empty_plan(indices, experts)
        pair = _native.module(backend).moe_plan(
            indices.data_ptr(), *(t.data_ptr() for t in result), indices.numel(), experts
        )
        _require_experts(op, indices, pair, experts)
        return result
    flat = indices.flatten()
    if values_are_checked(indices):
        wrong = (flat < 0) | (flat >= experts)
        _require_experts(op, indices, int(wrong.int().argmax()) if bool(wrong.any()) else -1, experts)
    if backend == "triton":
        from llmcore.kernels import expert_plan

        result = empty_plan(indices, experts)
        expert_plan.expert_plan(flat, *result)
        return result
    exists = (flat >= 0) & (flat < experts)
    flat = flat.where(exists, experts)  # behind all others
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = flat.new_zeros(experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[:experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Plan(order.int(), place.where(exists, -1).int(), offsets.int())


def sum_pairs(pairs: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """(T, C), the sum of each token's pairs (P, C), times their weights (T, k): in float32 or float64."""
    wide = pairs.to(torch.promote_types(pairs.dtype, torch.float32)).unflatten(0, (-1, top_k))
    return (wide if weights is None else wide * weights[..., None]).sum(1)


def few_shapes(rows: int, dtype: torch.dtype) -> int:
    """At least `rows`, at most an eighth more. On the CPU a product in 16 bits of a shape that was never seen before
    costs 1 to 2 ms more, for which oneDNN compiles it, and groups are never of one size for long."""
    if dtype not in (torch.bfloat16, torch.float16):
        return rows
    step = 1 << max((rows - 1).bit_length() - 4, 0)
    return (rows + step - 1) // step * step


def product_into(out: Tensor, begin: int, a: Tensor, b: Tensor) -> None:
    """out[begin:] begins with a @ b. Rows of a beyond its group's own spoil the next groups', which come later."""
    rows = min(a.shape[0], out.shape[0] - begin)
    if rows == a.shape[0]:
        torch.mm(a, b, out=out[begin : begin + rows])
    else:
        out[begin:] = torch.mm(a, b)[:rows]


def groups(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first place, place after the last) of each expert that has rows."""
    places = offsets.tolist()
    for expert, (begin, end) in enumerate(zip(places, places[1:], strict=False)):
        if begin < end:
            yield expert, begin, end


def zero_of_no_rows(offsets: Tensor, *gradients: Tensor) -> None:
    """Zeros in the gradients (E, ...) of the weights that met no row. Not in all: together they outgrow the cache."""
    for expert in (offsets[1:] == offsets[:-1]).nonzero().flatten().tolist():
        for gradient in gradients:
            gradient[expert].zero_()
