"""Decoders with experts: what they compute, what they count, how they balance, and that they come back from disk."""

import pytest
import torch

from llmcore import models
from llmcore.models import ModelConfig, build
from llmcore.nn import MoE, SwiGLU

TOKENS = torch.arange(60).view(2, 30) % 50
SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
    feed_forward_pattern=["dense", "experts"], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
)  # fmt: skip


def small(**changes):
    torch.manual_seed(0)
    return build(ModelConfig.from_dict({**SMALL, **changes}))


def test_layers_follow_the_pattern():
    assert [type(layer.mlp) for layer in small().model.layers] == [SwiGLU, MoE, SwiGLU, MoE]
    hybrid = small(layer_pattern=["mamba", "attention"], feed_forward_pattern=["experts"])
    assert [type(layer.mlp) for layer in hybrid.model.layers] == [type(None), MoE] * 2
    jamba = small(layer_pattern=["mamba", "attention"], mamba_feed_forward=True)
    assert [type(layer.mlp) for layer in jamba.model.layers] == [SwiGLU, MoE] * 2


def test_loss_and_gradients_reach_every_weight():
    model = small(num_shared_experts=1)
    output = model.train()(TOKENS, TOKENS)
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert output.routing_loss > 0
    held_out = model.eval()(TOKENS, TOKENS)
    assert held_out.routing_loss is None
    torch.testing.assert_close(output.loss - output.routing_loss, held_out.loss)


def test_loads_are_counted_in_training_alone():
    model = small()
    model.eval()(TOKENS, TOKENS)
    with torch.no_grad():
        model.train()(TOKENS, TOKENS)
    assert model.expert_load().sum() == 0
    for _ in range(2):
        model(TOKENS, TOKENS)
    load = model.expert_load()
    assert load.shape == (2, 4) and load.sum(1).tolist() == [2 * 60 * 2] * 2
    model.balance_experts(load)
    assert model.expert_load().sum() == 0
    assert small(feed_forward_pattern=["dense"]).expert_load() is None


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_recomputed_layers_count_once_and_give_the_same_gradients(jitter):
    whole, again = small(router_jitter=jitter), small(router_jitter=jitter)
    again.checkpoint_layers(4)
    for model in (whole, again):
        torch.manual_seed(1)
        model.train()(TOKENS, TOKENS).loss.backward()
    torch.testing.assert_close(again.expert_load(), whole.expert_load(), rtol=0, atol=0)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def test_step_by_step_equals_the_whole():
    model = small(num_shared_experts=1, scoring_func="sigmoid").eval()
    with torch.no_grad():
        whole = model(TOKENS).logits
        cache = model.new_cache(2, 30)
        steps = torch.cat([model(TOKENS[:, t : t + 1], cache=cache).logits for t in range(30)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)
    assert model.generate(TOKENS[:, :5], 4, temperature=0).shape == (2, 9)


def test_biases_come_back_from_disk(tmp_path):
    model = small(router_bias_rate=0.1, router_balance_loss=0.0, router_z_loss=0.0)
    model.train()(TOKENS, TOKENS)
    model.balance_experts(model.expert_load())
    biases = [layer.bias for layer in model.expert_layers()]
    assert all(bool((bias != 0).any()) for bias in biases)
    models.save(model, tmp_path / "m")
    loaded = models.load(tmp_path / "m")
    for mine, theirs in zip(loaded.expert_layers(), biases, strict=True):
        torch.testing.assert_close(mine.bias, theirs, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, model.eval()(TOKENS).logits, rtol=0, atol=0)


def test_a_bias_that_was_cast_is_float32_again():
    """In bfloat16 a bias of 0.5 no longer moves by 0.001."""
    for assign in (False, True):
        model = small(router_bias_rate=0.1)
        model.load_state_dict({n: t.bfloat16() for n, t in model.state_dict().items()}, assign=assign)
        assert all(layer.bias.dtype == torch.float32 for layer in model.expert_layers())


def test_initialisation():
    for name, weight in small(hidden_size=128, num_attention_heads=2).named_parameters():
        if "norm" not in name:
            assert abs(weight.std().item() - 0.02) < 0.002 and abs(weight.mean().item()) < 0.002, name


def test_cost_of_a_token_counts_active_experts():
    config = ModelConfig.from_dict({**SMALL, "num_shared_experts": 1})
    more = ModelConfig.from_dict({**SMALL, "num_shared_experts": 1, "num_experts": 8})
    assert config.num_parameters(active=True) == config.num_parameters() - 2 * 2 * 3 * 32 * 24
    assert more.flops_per_token(64) - config.flops_per_token(64) == 3 * 2 * 2 * 32 * 4  # the routers' alone


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; allowed: 1 to the 4 experts to choose from"),
        ({"num_experts": 0}, "num_experts is 0; allowed: whole numbers from 1"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1; allowed: whole numbers from 0"),
        ({"num_expert_groups": 3}, "num_expert_groups is 3; allowed: a divisor of num_experts = 4"),
        ({"num_groups_per_tok": 2}, "num_groups_per_tok is 2; allowed: 1 to num_expert_groups = 1"),
        ({"scoring_func": "relu"}, "scoring_func is 'relu'; allowed: softmax, sigmoid"),
        ({"router_jitter": 1.0}, "router_jitter is 1.0; allowed: numbers from 0 to below 1"),
        ({"feed_forward_pattern": ["moe"]}, "feed_forward_pattern is ['moe']; allowed: a list of dense, experts"),
        ({"feed_forward_pattern": []}, "feed_forward_pattern is []; allowed: a list of dense, experts"),
    ],
)
def test_bad_configurations(changes, sentence):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_dict({**SMALL, **changes})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
