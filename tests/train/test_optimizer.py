"""Which parameters an optimizer takes, which of them decay, and that each kind learns."""

import pytest
import torch

from llmcore import models
from llmcore.nn.moe import Experts
from llmcore.train.config import OptimizerConfig
from llmcore.train.optimizer import build_optimizer

KINDS = ["adamw", "adam", "muon"]


def build(preset, **changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return models.build(models.ModelConfig.from_preset(preset, **sizes, **changes))


@pytest.fixture(params=["untied", "tied", "experts"])
def model(request):
    if request.param == "experts":
        return build("tiny_moe", moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2)
    return build("tiny", intermediate_size=64, tie_word_embeddings=request.param == "tied")


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_taken_once_and_vectors_do_not_decay(model, kind):
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, weight_decay=0.3))
    taken = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.3) for p in group["params"])


def test_muon_takes_the_layers_matrices_only(model):
    muon, adamw = build_optimizer(model, OptimizerConfig(kind="muon")).optimizers
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    routers = {n for n, _ in model.named_parameters() if n.endswith("mlp.gate.weight")}
    assert taken == {n for n, p in model.named_parameters() if ".layers." in n and p.ndim >= 2} - routers
    assert any("embed" in names[id(p)] for group in adamw.param_groups for p in group["params"])


def test_muon_takes_each_experts_matrices_on_their_own():
    """As torch.optim.Muon steps with the gate's, the up and the down projection's matrices of each expert."""
    model = build("tiny_moe", moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2)
    config = OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.2, beta1=0.9)
    optimizer = build_optimizer(model, config)
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    stacked = [experts.gate_up_proj, experts.down_proj, model.model.layers[0].self_attn.q_proj.weight]
    alone = [*experts.gate_up_proj.view(12, 24, 32).unbind(), *experts.down_proj.unbind(), stacked[2]]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in alone]
    reference = torch.optim.Muon(
        alone, lr=config.lr, weight_decay=config.weight_decay, momentum=config.beta1, adjust_lr_fn="match_rms_adamw"
    )
    for seed in range(3):
        for p in stacked:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        gradients = [*stacked[0].grad.view(12, 24, 32).unbind(), *stacked[1].grad.unbind(), stacked[2].grad]
        for p, gradient in zip(alone, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        reference.step()
    actual = [*stacked[0].view(12, 24, 32).unbind(), *stacked[1].unbind(), stacked[2]]
    torch.testing.assert_close(actual, alone, rtol=0, atol=1e-2 * config.lr)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_skipped_leaves_all_as_it_was(model, kind):
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, lr=0.1))

    def step(value, skip):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step(torch.tensor(skip))
        moments = [m.clone() for p in model.parameters() for m in optimizer.state_of(p).values()]
        return [p.detach().clone() for p in model.parameters()] + moments

    before = step(1.0, 0.0)
    torch.testing.assert_close(step(float("nan"), 1.0), before, rtol=0, atol=0)
    assert not any(torch.equal(a, b) for a, b in zip(step(2.0, 0.0), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_learns(model, kind):
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, lr=1e-2))
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        optimizer.set_learning_rate(1e-2)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_that_are_named_are_those_there_are(model, kind):
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind))
    tokens = torch.randint(256, (1, 9))
    model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    optimizer.step()
    for parameter in model.parameters():
        assert set(optimizer.state_of(parameter)) == set(optimizer.moments_of(parameter))
