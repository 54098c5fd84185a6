"""Experts on several ranks: each holds some of them, and rows travel to their experts and back (Lepikhin et al.,
GShard, 2020, arXiv:2006.16668), as many as there are: nothing is padded or dropped.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmcore import ops
from llmcore.nn.moe import Experts, MoE


class _Exchange(torch.autograd.Function):
    """Rows to the ranks in turn, `sent` of them to each, for `received` of each; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        sent, received = ctx.splits
        return _exchange(drows, received, sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class _Mean(torch.autograd.Function):
    """The weight itself; its gradient, which here is the sum over the ranks' losses, becomes their mean, as DDP makes
    it for weights that every rank has."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor, None]:
        return dweight / ctx.ranks, None


class ShardedExperts(nn.Module):
    """The experts of one rank of `group`: rank r has the r-th part of them. In the place of `nn.moe.Experts`.

    Args:
        gate_up_proj: (E, 2F, C), down_proj: (E, C, F), of all E experts, of which this rank's part is copied.
        group: the ranks that share the experts; E must be a multiple of their number.

    Every rank must call it as often as the others, forward and backward, whatever it has to send. The weights'
    gradients are those of the mean of the ranks' losses. DDP must leave them alone: `unshared` names them.
    """

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__()
        ranks, rank, experts = group.size(), group.rank(), gate_up_proj.shape[0]
        if experts % ranks:
            raise ValueError(
                f"ShardedExperts: the group has {ranks} ranks; allowed: a divisor of the {experts} experts."
            )
        self.group, self.num_experts = group, experts
        mine = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
        self.gate_up_proj = nn.Parameter(gate_up_proj.detach()[mine].clone())
        self.down_proj = nn.Parameter(down_proj.detach()[mine].clone())

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x: (T, C), weights, indices: (T, k) -> (T, C)."""
        ranks, here = self.group.size(), self.gate_up_proj.shape[0]
        top_k = indices.shape[1]
        flat = indices.flatten()
        order = flat.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = flat.new_zeros(self.num_experts).scatter_add_(0, flat, torch.ones_like(flat)).view(ranks, here)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        sent, received = counts.sum(1).tolist(), theirs.sum(1).tolist()

        rows = _Exchange.apply(x[order // top_k], sent, received, self.group)
        # From each rank its rows come sorted by expert.
        expert = torch.arange(here, device=x.device).repeat(ranks).repeat_interleave(theirs.flatten())[:, None]
        w_gate_up, w_down = (_Mean.apply(w, ranks) for w in (self.gate_up_proj, self.down_proj))
        rows = ops.moe_mlp(rows, w_gate_up, w_down, torch.ones_like(expert, dtype=torch.float32), expert)
        rows = _Exchange.apply(rows, received, sent, self.group)
        pairs = rows[place].unflatten(0, (-1, top_k)).float() * weights[..., None]
        return pairs.sum(1).to(x.dtype)


def shard_experts(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Leaves of each layer of experts in `model` this rank's part. All ranks must have built the same model.

    Raises ValueError where the ranks' number does not divide that of the experts.
    """
    for module in model.modules():
        if isinstance(module, MoE) and isinstance(module.experts, Experts):
            module.experts = ShardedExperts(module.experts.gate_up_proj, module.experts.down_proj, group)


def unshared(model: nn.Module) -> list[str]:
    """The names of the parameters that differ between the ranks, which DDP must not average."""
    return [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, ShardedExperts)
        for weight in ("gate_up_proj", "down_proj")
    ]
