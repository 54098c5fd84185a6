"""Experts on several ranks: each holds some of them, and rows travel to their experts and back (Lepikhin et al.,
GShard, 2020, arXiv:2006.16668), as many as there are: nothing is padded or dropped.
"""

from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmcore import ops
from llmcore.nn.moe import Experts, MoE
from llmcore.ops import _checks
from llmcore.ops._dispatch import resolve
from llmcore.ops._experts import plan, sum_pairs


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


class _Rows(torch.autograd.Function):
    """x's rows `taken`, each of which stands at `top_k` places: for row t at placed[t k:t k + k]. Their gradients are
    summed as moe_mlp sums them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Tensor, placed: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(placed)
        ctx.top_k = top_k
        return x.index_select(0, taken)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        (placed,) = ctx.saved_tensors
        return sum_pairs(drows.index_select(0, placed), None, ctx.top_k).to(drows.dtype), None, None, None


class _Mean(torch.autograd.Function):
    """The weight itself; its gradient, which here is of the sum of the group's losses, becomes that of the mean of all
    ranks' losses, as DDP makes it for weights that every rank has."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ranks: int, copies: dist.ProcessGroup | None) -> Tensor:
        ctx.ranks, ctx.copies = ranks, copies
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor | None, ...]:
        dweight = dweight / ctx.ranks
        if ctx.copies is not None:
            dist.all_reduce(dweight, group=ctx.copies)
        return dweight, None, None


class ShardedExperts(nn.Module):
    """The experts of one rank of `group`: rank r has the r-th part of them. In the place of `nn.moe.Experts`.

    Args:
        gate_up_proj: (E, 2F, C), down_proj: (E, C, F), of all E experts, of which this rank's part is copied. It is
            trained if they are.
        group: the ranks that share the experts; E must be a multiple of their number.
        copies: the ranks that have this part, one of each such group; None where there is one group.

    Every rank must call it as often as the others, forward and backward, whatever it has to send. The weights'
    gradients are those of the mean of all ranks' losses. DDP must leave them alone: `unshared` names them.
    """

    def __init__(
        self,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        group: dist.ProcessGroup,
        copies: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        ranks, rank, experts = group.size(), group.rank(), gate_up_proj.shape[0]
        if experts % ranks:
            raise ValueError(
                f"ShardedExperts: the group has {ranks} ranks; allowed: a divisor of the {experts} experts."
            )
        self.group, self.copies, self.num_experts = group, copies, experts
        mine = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
        self.gate_up_proj = nn.Parameter(gate_up_proj.detach()[mine].clone(), gate_up_proj.requires_grad)
        self.down_proj = nn.Parameter(down_proj.detach()[mine].clone(), down_proj.requires_grad)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x: (T, C), weights, indices: (T, k) -> (T, C). Dtypes are those of `ops.moe_mlp`. Raises ValueError for an
        index that is no expert, as it does."""
        (x,) = _checks.autocast(x)
        ranks, here, top_k = self.group.size(), self.gate_up_proj.shape[0], indices.shape[1]
        order, place, offsets = plan("ShardedExperts", indices, self.num_experts, resolve("moe_mlp", x))
        counts = offsets.diff().view(ranks, here)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        sent, received = torch.stack([counts.sum(1), theirs.sum(1)]).tolist()

        rows = _Exchange.apply(_Rows.apply(x, order // top_k, place, top_k), sent, received, self.group)
        # From each rank its rows come sorted by expert.
        expert = torch.arange(here, device=x.device).repeat(ranks)
        expert = expert.repeat_interleave(theirs.flatten(), output_size=sum(received))[:, None]
        ranks *= 1 if self.copies is None else self.copies.size()
        w_gate_up, w_down = (_Mean.apply(w, ranks, self.copies) for w in (self.gate_up_proj, self.down_proj))
        rows = ops.moe_mlp(rows, w_gate_up, w_down, torch.ones_like(expert, dtype=torch.float32), expert)
        rows = _Exchange.apply(rows, received, sent, self.group)
        return sum_pairs(_Rows.apply(rows, place, order, 1), weights, top_k).to(x.dtype)

    def gather(self) -> Experts:
        """All experts; every rank of the group must call it."""
        _, inner, width = self.gate_up_proj.shape
        with torch.device("meta"):
            whole = Experts(self.num_experts, width, inner // 2)
        for name, mine in self.named_parameters():
            weight = mine.new_empty(self.num_experts, *mine.shape[1:])
            dist.all_gather(list(weight.chunk(self.group.size())), mine.detach().contiguous(), group=self.group)
            setattr(whole, name, nn.Parameter(weight, mine.requires_grad))
        return whole


def shard_experts(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Leaves of each layer of experts in `model` this rank's part. All ranks must have built the same model and call
    this, each with the group that it is in. Where there are several groups, as one for each machine, they hold copies
    of the experts, whose gradients are averaged over the groups in every backward pass.

    Raises ValueError where the ranks' number does not divide that of the experts, or the groups are not of one size
    with each rank in one of them.
    """
    copies = _copies(group)
    for module in model.modules():
        if isinstance(module, MoE) and isinstance(module.experts, Experts):
            module.experts = ShardedExperts(module.experts.gate_up_proj, module.experts.down_proj, group, copies)


def _copies(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The ranks with the same place in their groups as this one has in `group`; None where all ranks are in it."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tuple(dist.get_process_group_ranks(group)))
    groups = sorted(set(everyone))
    if (
        sorted(rank for ranks in groups for rank in ranks) != list(range(len(everyone)))
        or len(set(map(len, groups))) > 1
    ):
        raise ValueError(
            f"shard_experts: the groups have the ranks {', '.join(map(str, groups))}; allowed: groups of one size, "
            f"with each of the {len(everyone)} ranks in one of them."
        )
    if len(groups) == 1:
        return None
    return dist.new_subgroups_by_enumeration([list(ranks) for ranks in zip(*groups, strict=True)])[0]


def gather_experts(model: nn.Module) -> ExitStack:
    """Puts all experts back into each layer that `shard_experts` has left a part of; all ranks must call it, and each
    needs the memory for all of them. They are copies: an optimizer and DDP still hold the parts.

    Returns:
        What puts the parts back when it is closed: `with gather_experts(model): ...` saves a model that is in training.
    """
    with ExitStack() as parts:
        for module in model.modules():
            if isinstance(module, MoE) and isinstance(module.experts, ShardedExperts):
                parts.callback(setattr, module, "experts", module.experts)
                module.experts = module.experts.gather()
        return parts.pop_all()


def require_whole(model: nn.Module, who: str) -> None:
    """Raises ValueError where `model` has a part of its experts only."""
    if unshared(model):
        raise ValueError(
            f"{who}: the model's experts are shared out to ranks; allowed: whole ones, as "
            "llmcore.nn.expert_parallel.gather_experts(model) puts back."
        )


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of the gradient of the whole model, the experts of other ranks among it, on all ranks; each of them must
    call it."""
    groups = {p: m.group for m in model.modules() if isinstance(m, ShardedExperts) for p in m.parameters()}
    gradients: dict[dist.ProcessGroup | None, list[Tensor]] = defaultdict(list)
    for p in model.parameters():
        if p.grad is not None:
            gradients[groups.get(p)].append(p.grad)
    norms = []
    for group, its_gradients in gradients.items():
        norm = nn.utils.get_total_norm(its_gradients)
        if group is not None:
            parts = norm.new_empty(group.size())
            dist.all_gather(list(parts.chunk(len(parts))), norm[None], group=group)
            norm = parts.norm()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)


def unshared(model: nn.Module) -> list[str]:
    """The names of the parameters that differ between the ranks, which DDP must neither overwrite nor average: those
    that `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model` takes before the model is wrapped."""
    return [
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, ShardedExperts)
        for weight in ("gate_up_proj", "down_proj")
    ]
