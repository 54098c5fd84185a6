"""Which parameters an optimizer takes, which of them decay, and that each kind learns."""

import pytest
import torch

from llmcore import models
from llmcore.train.config import OptimizerConfig
from llmcore.train.optimizer import build_optimizer

KINDS = ["adamw", "adam", "muon"]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    torch.manual_seed(0)
    config = models.ModelConfig.from_preset(
        "tiny", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    return models.build(config)


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
    assert taken == {n for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    assert any("embed" in names[id(p)] for group in adamw.param_groups for p in group["params"])


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
