import json

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from llmcore import models
from llmcore.models import ModelConfig, build, decoder

LAYERS = 3
TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


def make(**changes):
    torch.manual_seed(0)
    return build(ModelConfig.from_preset("tiny", num_hidden_layers=LAYERS, num_key_value_heads=2, **changes))


def step(model, bf16=False, seed=5):
    """Loss, gradients and the random state after them."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(TOKENS, TOKENS.roll(-1, 1)).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), torch.get_rng_state()]


def kept_bytes(model, tokens=TOKENS):
    """What autograd holds after a forward pass, weights aside."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens).loss  # noqa: F841 holds the graph, so that no storage is reused
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def test_dropout_falls_on_all_that_enters_the_stream(monkeypatch):
    model, seen = make(dropout=0.25), []

    def all_but_the_embedding(x, probability):
        seen.append((tuple(x.shape), probability))
        return x if len(seen) == 1 else torch.zeros_like(x)

    monkeypatch.setattr(F, "dropout", all_but_the_embedding)
    logits = model(TOKENS).logits
    assert seen == [((2, 40, 128), 0.25)] * (1 + 2 * LAYERS)
    monkeypatch.undo()
    backbone = model.model
    assert torch.equal(logits, model.lm_head(backbone.norm(backbone.embed_tokens(TOKENS))))
    monkeypatch.setattr(F, "dropout", lambda x, probability: torch.zeros_like(x))
    assert not model(TOKENS).logits.any()


def test_dropout_is_random_and_repeats_with_its_seed():
    model = make(dropout=0.1)
    first, again, other = (step(model, seed=seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_dropout_outside_training(monkeypatch):
    expected = make()(TOKENS).logits
    monkeypatch.setattr(F, "dropout", lambda *_: pytest.fail("dropout was called"))
    assert torch.equal(make(dropout=0.5).eval()(TOKENS).logits, expected)
    step(make(dropout=0.0))


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, float("nan"), float("inf"), True, None, "0.1"])
def test_bad_dropout(value):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_preset("tiny", dropout=value)
    assert str(caught.value) == f"ModelConfig: dropout is {value!r}; allowed: numbers from 0 to below 1."


def test_dropout_on_disk(tmp_path):
    models.save(make(dropout=0.1), tmp_path)
    assert models.load(tmp_path).config == make(dropout=0.1).config
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("dropout") == 0.1
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert models.load(tmp_path).config.dropout == 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_keeps_every_bit(dropout, tied, bf16):
    model = make(dropout=dropout, tie_word_embeddings=tied)
    expected = step(model, bf16)
    for n in range(LAYERS + 1):
        model.checkpoint_layers(n)
        assert all(map(torch.equal, step(model, bf16), expected)), f"{n} layers"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_each_recomputed_layer_saves_memory(dropout):
    kept, fake = [], []
    model = make(dropout=dropout)
    for n in range(LAYERS + 1):
        model.checkpoint_layers(n)
        kept.append(kept_bytes(model))
        with FakeTensorMode():
            shadow = make(dropout=dropout)
            shadow.checkpoint_layers(n)
            fake.append(kept_bytes(shadow, torch.zeros(TOKENS.shape, dtype=torch.int64)))
    layer = 2 * TOKENS.numel() * 128 * 4
    assert all(less < more - layer for more, less in zip(kept, kept[1:], strict=False)), kept
    assert fake == kept


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_what_is_recomputed(monkeypatch, dropout):
    model, calls = make(dropout=dropout), []
    original = decoder.checkpoint

    def count(layer, *args, **options):
        calls.append((layer, options["preserve_rng_state"]))
        return original(layer, *args, **options)

    monkeypatch.setattr(decoder, "checkpoint", count)
    model.checkpoint_layers(2)
    step(model)
    assert calls == [(layer, dropout > 0) for layer in model.model.layers[:2]]
    calls.clear()
    model.generate(TOKENS, 2)
    with torch.no_grad():
        model(TOKENS, TOKENS)
    model.eval()(TOKENS, TOKENS).loss.backward()
    model.train().checkpoint_layers(0)
    step(model)
    assert not calls


@pytest.mark.parametrize("n", [0, 2])
def test_compiles_to_one_graph_with_dropout(n):
    torch._dynamo.reset()
    model = make(dropout=0.2)
    expected = step(model)
    model.checkpoint_layers(n)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    torch.manual_seed(5)
    loss = compiled(TOKENS, TOKENS.roll(-1, 1)).loss
    loss.backward()
    for actual, wanted in zip([loss.detach(), *(p.grad for p in model.parameters())], expected, strict=False):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("n", [-1, LAYERS + 1, 1.0, True, None])
def test_bad_number_of_layers(n):
    with pytest.raises(ValueError) as caught:
        make().checkpoint_layers(n)
    assert str(caught.value) == f"Decoder: checkpoint_layers is {n!r}; allowed: 0 to num_hidden_layers = 3."
