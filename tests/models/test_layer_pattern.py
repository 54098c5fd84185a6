"""Decoders whose layers follow a pattern: Mamba or Mamba-2 alone, and between attention."""

import pytest
import torch

import train_minimal
from llmcore import models
from llmcore.models import ModelConfig, build
from llmcore.nn import Mamba
from llmcore.train.config import OptimizerConfig
from llmcore.train.optimizer import build_optimizer

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=2, mamba_state_size=4, mamba2_state_size=6,
    mamba2_head_dim=8,
)  # fmt: skip
KINDS = [
    pytest.param({**SMALL, "layer_pattern": ["mamba"], "num_hidden_layers": 2}, id="mamba"),
    pytest.param(
        {**SMALL, "layer_pattern": ["mamba", "attention"], "num_hidden_layers": 5, "mamba_feed_forward": True},
        id="hybrid",
    ),
    pytest.param({**SMALL, "layer_pattern": ["mamba2"], "num_hidden_layers": 2, "mamba2_num_groups": 2}, id="mamba2"),
    pytest.param(
        {
            **SMALL,
            "layer_pattern": ["mamba", "attention", "mamba2"],
            "num_hidden_layers": 4,
            "mamba2_step_limit": [0.01, 0.5],
        },
        id="all three",
    ),
]


def model_of(kind) -> models.Decoder:
    torch.manual_seed(0)
    return build(ModelConfig(vocab_size=64, max_position_embeddings=64, **kind))


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_equals_the_whole(kind):
    model, tokens = model_of(kind).eval(), torch.arange(24).view(2, 12)
    whole = model(tokens).logits
    cache, parts = model.new_cache(2, 12), []
    with torch.no_grad():
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 12)):
            parts.append(model(tokens[:, begin:end], cache=cache).logits)
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_the_whole_again_and_again(kind):
    model, prompt = model_of(kind).eval(), torch.arange(6).view(1, 6)
    expected = prompt
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(prompt, 8, temperature=0), expected)


def test_a_mamba_cache_does_not_grow():
    model = model_of(KINDS[0].values[0])
    sizes = [
        sum(t.numel() for state in cache.states for t in (state.conv, state.ssm)) + cache.kv.k_LBTKD.numel()
        for cache in (model.new_cache(1, 8), model.new_cache(1, 60))
    ]
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_compiled_loss(kind):
    model = model_of(kind)
    assert model.num_parameters() == model.config.num_parameters()
    tokens = torch.arange(24).view(2, 12)
    loss = model(tokens, tokens).loss
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model)(tokens, tokens).loss, loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_give_the_same_bits(kind):
    model, tokens = model_of(kind), torch.arange(24).view(2, 12)
    grads = []
    for layers in (0, model.config.num_hidden_layers):
        model.checkpoint_layers(layers)
        model.zero_grad()
        model(tokens, tokens).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_on_disk_and_back(kind, tmp_path):
    model, tokens = model_of(kind).eval(), torch.arange(12).view(1, 12)
    models.save(model, tmp_path / "m")
    again = models.load(tmp_path / "m").eval()
    assert again.config == model.config and torch.equal(again(tokens).logits, model(tokens).logits)


def test_what_decays():
    model = model_of(KINDS[1].values[0])
    decays, rest = build_optimizer(model, OptimizerConfig()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)].split(".")[-1] for p in rest["params"]}
    assert decays["weight_decay"] > rest["weight_decay"] == 0 and spared == {"A_log", "D", "bias", "weight"}
    assert all("norm" in names[id(p)] for p in rest["params"] if names[id(p)].endswith("weight"))
    assert not any(names[id(p)].endswith(("A_log", "D", "bias")) for p in decays["params"])


def test_layers_of_a_pattern():
    layers = model_of(KINDS[1].values[0]).model.layers
    assert [isinstance(getattr(layer, "mixer", None), Mamba) for layer in layers] == [True, False, True, False, True]
    assert [layer.number for layer in layers] == [0, 0, 1, 1, 2]
    names = set(model_of(KINDS[0].values[0]).state_dict())
    assert "model.layers.0.mixer.A_log" in names and not any("mlp" in name or "self_attn" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"layer_pattern": ["mamba", "lstm"]},
            "layer_pattern is ['mamba', 'lstm']; allowed: a list of attention, mamba, mamba2.",
        ),
        ({"layer_pattern": []}, "layer_pattern is []; allowed: a list of attention, mamba, mamba2."),
        ({"layer_pattern": "mamba"}, "layer_pattern is 'mamba'; allowed: a list"),
        ({"mamba_conv_width": 5}, "mamba_conv_width is 5; allowed: 2 to 4."),
        ({"mamba_state_size": 300}, "mamba_state_size is 300; allowed: 1 to 256."),
        ({"mamba2_state_size": 300}, "mamba2_state_size is 300; allowed: 1 to 256."),
        ({"layer_pattern": ["mamba2"], "hidden_size": 80}, "mamba2_head_dim is 64; allowed: a divisor of mamba_expand * hidden_size = 160."),
        ({"layer_pattern": ["mamba2"], "mamba2_num_groups": 3}, "mamba2_num_groups is 3; allowed: a divisor of the 16 heads."),
        ({"layer_pattern": ["mamba2"], "mamba2_step_limit": [0.5, 0.1]}, "mamba2_step_limit is [0.5, 0.1]; allowed: none, or two numbers that rise from at least 0."),
        ({"mamba_expand": 0}, "mamba_expand is 0; allowed: whole numbers from 1."),
        ({"mamba_feed_forward": 1}, "mamba_feed_forward is 1; allowed: true, false."),
    ],
)  # fmt: skip
def test_bad_patterns(changes, words):
    with pytest.raises(ValueError) as error:
        ModelConfig(**changes)
    assert words in str(error.value)


def test_a_mamba2_decays_nothing_of_its_recurrence():
    model = model_of(KINDS[2].values[0])
    names = {id(p): name for name, p in model.named_parameters()}
    _, rest = build_optimizer(model, OptimizerConfig()).param_groups
    spared = {names[id(p)].rsplit(".", 1)[-1] for p in rest["params"]}
    assert spared == {"A_log", "D", "dt_bias", "bias", "weight"}


@pytest.mark.parametrize("preset", ["tiny_mamba", "tiny_mamba2", "tiny_hybrid"])
def test_train_minimal(preset, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a b c d e f g\n" * 600)
    argv = ["--preset", preset, "--data.train", str(tmp_path / "text.txt"), "--out_dir", str(tmp_path), "--name", "a"]
    argv += ["--model.num_hidden_layers", "3", "--seq_len", "64", "--max_steps", "30", "--sample.tokens", "8"]
    assert train_minimal.main([*argv, "--optimizer.warmup_steps", "5"]) == 0
    out = capsys.readouterr().out
    bits = float(out.split("held-out text: ")[-1].split()[0])
    assert bits < 1.5 and "def " in out
    assert train_minimal.main(["--resume", str(tmp_path / "a"), "--max_steps", "31"]) == 0
