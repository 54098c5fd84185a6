"""Experts shared out to ranks compute what one rank computes with all of them."""

import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from llmcore import models
from llmcore.nn import MoE
from llmcore.nn.expert_parallel import ShardedExperts, gather_experts, shard_experts, unshared
from llmcore.train.config import TrainConfig
from llmcore.train.distributed import World
from llmcore.train.engine import Engine, Plan, build_engine

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


def mine(experts, rank, size):
    """The experts that are a rank's in groups of `size`."""
    part = rank % size
    return slice(part * experts // size, (part + 1) * experts // size)


def on_rank(rank, ranks, port, work, arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    work(rank, ranks, *arguments)
    dist.destroy_process_group()


def on_ranks(ranks, work, *arguments):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(on_rank, (ranks, port, work, arguments), nprocs=ranks)


@pytest.fixture
def alone():
    """The group of a process that is its only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


SIZES = (4, 2, 1)  # of the groups, of which those of fewer than 4 ranks hold copies of the experts


def differentiate(rank, ranks, folder):
    for size in SIZES:
        differentiate_in_groups(rank, size, folder / f"{size}_{rank}.pt")


def differentiate_in_groups(rank, size, path):
    moe = layer()
    shard_experts(torch.nn.ModuleList([moe]), dist.new_subgroups(size)[0])
    names = unshared(moe)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(moe, names)
    parallel, x = DistributedDataParallel(moe), tokens(rank)
    y, routing = parallel(x)
    cost(y).backward()
    gradients = {name: p.grad for name, p in moe.named_parameters()}
    torch.save((y.detach(), x.grad, gradients, names, routing.load), path)


def test_ranks_equal_one(tmp_path):
    on_ranks(4, differentiate, tmp_path)
    moe, xs = layer(), [tokens(rank) for rank in range(4)]
    ys = [moe(x)[0] for x in xs]
    (sum(map(cost, ys)) / 4).backward()
    expected = {name: p.grad for name, p in moe.named_parameters()}
    for size, rank in itertools.product(SIZES, range(4)):
        y, dx, gradients, names, load = torch.load(tmp_path / f"{size}_{rank}.pt")
        torch.testing.assert_close(y, ys[rank].detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dx, xs[rank].grad * 4, rtol=1e-5, atol=1e-6)
        assert sorted(names) == ["experts.down_proj", "experts.gate_up_proj"]
        assert load.sum() == 3 * COUNTS[rank]
        for name, gradient in gradients.items():
            whole = expected[name][mine(8, rank, size)] if name in names else expected[name]
            torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-6)


def shard_unevenly(rank, ranks):
    groups = [dist.new_group([0]), dist.group.WORLD]
    with pytest.raises(ValueError, match=r"the groups have the ranks \(0,\), \(0, 1\); allowed: groups of one size"):
        shard_experts(layer(), groups[rank])


def test_groups_are_of_one_size():
    on_ranks(2, shard_unevenly)


CONFIG = TrainConfig(
    seq_len=12,
    model={
        "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "initializer_range": 0.1,
    },
)  # fmt: skip
CONFIG.optimizer.grad_clip = 0.25


def decoder():
    torch.manual_seed(0)
    return models.build(models.ModelConfig.from_preset("tiny_moe", **CONFIG.model))


def text(rank, step):
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randint(256, (2, 3, CONFIG.seq_len), generator=generator)


def train_on_rank(rank, ranks, folder):
    model = decoder()
    shard_experts(model, dist.new_subgroups(2)[0])
    engine = Engine(model, CONFIG, Plan("ddp", "fp32"), World(rank, ranks, torch.device("cpu")))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    norms = []
    for step in range(3):
        engine.backward(engine.loss(*text(rank, step)))
        norms.append(engine.step(1e-3, step))
    for refused in (engine.snapshot, lambda: engine.restore(folder, None)):
        with pytest.raises(ValueError, match=r"shared out to ranks; allowed: whole ones, as .*gather_experts\(model\)"):
            refused()
    with pytest.raises(ValueError, match=r"has 2 of the 4 experts; save on one rank inside .*gather_experts"):
        models.save(model, folder / "refused")
    parameters = list(model.parameters())
    with gather_experts(model):
        assert not unshared(model)
        if rank == 0:
            models.save(model, folder / "saved")
    assert all(p is before for p, before in zip(model.parameters(), parameters, strict=True))
    torch.save((start, norms, model.state_dict(), unshared(model)), folder / f"{rank}.pt")


def test_training(tmp_path):
    """Two groups of two ranks. The engine clips by the norm of all experts' gradients, and what it trains is saved."""
    on_ranks(4, train_on_rank, tmp_path)
    model = decoder()
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, CONFIG, Plan("single", "fp32"), World(0, 1, torch.device("cpu")))
    norms = []
    for step in range(3):
        for rank in range(4):
            engine.backward(engine.loss(*text(rank, step)) / 4)
        norms.append(engine.step(1e-3, step))
    assert min(norms) > CONFIG.optimizer.grad_clip
    saved, trained = models.load(tmp_path / "saved").state_dict(), model.state_dict()
    for rank in range(4):
        start, its_norms, state, names = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(its_norms, norms, rtol=2e-5, atol=0)
        for name, value in state.items():
            part = mine(4, rank, 2) if name in names else slice(None)
            assert torch.equal(start[name], begin[name][part]), name
            assert torch.equal(value, saved[name][part]), name
            torch.testing.assert_close(value, trained[name][part], rtol=0, atol=1e-4)


def test_zero_is_refused(alone):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    model = decoder()
    shard_experts(model, alone)
    with pytest.raises(
        ValueError, match=r"deepspeed: the model's experts are shared out to ranks; allowed: whole ones"
    ):
        build_engine(model, CONFIG, Plan("deepspeed", "fp32"), World(0, 1, torch.device("cpu")))


def test_experts_keep_what_they_are(alone):
    moe = layer().bfloat16()
    moe.experts.down_proj.requires_grad_(False)
    shard_experts(moe, alone)
    for _ in range(2):
        assert not moe.experts.down_proj.requires_grad and moe.experts.gate_up_proj.requires_grad
        assert {p.dtype for p in moe.experts.parameters()} == {torch.bfloat16}
        gather_experts(moe)


def compute(experts, x, weights, indices):
    x = x.clone().requires_grad_()
    y = experts(x, weights, indices)
    dx, *dweights = torch.autograd.grad(
        y, [x, *experts.parameters()], torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    )
    return y, dx, *dweights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_dtypes_and_errors_are_those_of_experts(dtype, autocast, alone):
    whole = layer().experts.to(dtype)
    sharded = ShardedExperts(whole.gate_up_proj, whole.down_proj, alone)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 16, generator=generator).to(dtype)
    indices = torch.rand(400, 8, generator=generator).argsort(1)
    weights = torch.rand(400, 8, generator=generator).to(torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        given, theirs = (compute(experts, x, weights, indices) for experts in (sharded, whole))
    exact = compute(whole.double(), x.double(), weights.double(), indices)
    for name, mine, its, right in zip(("y", "dx", "dw_gate_up", "dw_down"), given, theirs, exact, strict=True):
        assert mine.dtype == its.dtype, name
        error, allowed = ((t.double() - right).square().mean().sqrt() for t in (mine, its))
        assert error <= 1.25 * allowed + 1e-14 * right.abs().max(), f"{name}: {error / allowed:.3f}"


def test_indices_must_be_experts(alone):
    moe = layer()
    shard_experts(moe, alone)
    with pytest.raises(ValueError, match="ShardedExperts: indices holds 8; allowed: 0 to 7, the experts"):
        moe.experts(torch.randn(2, 16), torch.ones(2, 1), torch.tensor([[3], [8]]))


def test_experts_must_be_a_multiple_of_the_ranks():
    class Group:
        def size(self):
            return 3

        def rank(self):
            return 0

    moe = layer()
    with pytest.raises(ValueError, match="the group has 3 ranks; allowed: a divisor of the 8 experts"):
        ShardedExperts(moe.experts.gate_up_proj, moe.experts.down_proj, Group())
