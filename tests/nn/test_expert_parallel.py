"""Experts shared out to ranks compute what one rank computes with all of them."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from llmcore.nn import MoE
from llmcore.nn.expert_parallel import ShardedExperts, shard_experts, unshared

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
COUNTS = (7, 0, 12, 3)  # tokens of each rank


def layer():
    torch.manual_seed(0)
    return MoE(16, 24, num_experts=8, top_k=3, num_shared_experts=1)


def tokens(rank):
    return torch.randn(COUNTS[rank], 16, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def cost(y):
    """A rank's loss."""
    return y.square().sum() / 5


def on_rank(rank, ranks, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    moe = layer()
    shard_experts(torch.nn.ModuleList([moe]), dist.group.WORLD)
    names = unshared(moe)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(moe, names)
    parallel, x = DistributedDataParallel(moe), tokens(rank)
    y, routing = parallel(x)
    cost(y).backward()
    gradients = {name: p.grad for name, p in moe.named_parameters()}
    torch.save((y.detach(), x.grad, gradients, names, routing.load), folder / f"{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one(tmp_path, ranks):
    mp.spawn(on_rank, (ranks, free_port(), tmp_path), nprocs=ranks)
    moe, xs = layer(), [tokens(rank) for rank in range(ranks)]
    ys = [moe(x)[0] for x in xs]
    (sum(map(cost, ys)) / ranks).backward()
    expected = {name: p.grad for name, p in moe.named_parameters()}
    for rank in range(ranks):
        y, dx, gradients, names, load = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(y, ys[rank].detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dx, xs[rank].grad * ranks, rtol=1e-5, atol=1e-6)
        assert sorted(names) == ["experts.down_proj", "experts.gate_up_proj"]
        assert load.sum() == 3 * COUNTS[rank]
        for name, gradient in gradients.items():
            whole = expected[name]
            mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
            torch.testing.assert_close(gradient, whole[mine] if name in names else whole, rtol=1e-5, atol=1e-6)


def test_experts_must_be_a_multiple_of_the_ranks():
    class Group:
        def size(self):
            return 3

        def rank(self):
            return 0

    moe = layer()
    with pytest.raises(ValueError, match="the group has 3 ranks; allowed: a divisor of the 8 experts"):
        ShardedExperts(moe.experts.gate_up_proj, moe.experts.down_proj, Group())
