import pytest
import torch
import torch.nn.functional as F
import transformers

import llmcore
from bench.plain_model import PlainDecoder
from llmcore.models import ModelConfig, build

CONFIG = ModelConfig.from_preset("tiny", num_hidden_layers=2, num_key_value_heads=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(CONFIG)


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


def test_equals_the_plain_pytorch_model(model, tokens):
    plain = PlainDecoder(CONFIG)
    plain.load_state_dict(model.state_dict())
    loss, expected = model(tokens, tokens.roll(-1, 1)).loss, plain(tokens, tokens.roll(-1, 1))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_equals_transformers_llama(model, tokens):
    config = transformers.LlamaConfig(**{**CONFIG.to_dict(), "attn_implementation": "eager"})
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_loss_or_logits(model, tokens):
    out = model(tokens)
    assert out.loss is None and out.logits.shape == (2, 40, 256)
    targets = tokens.clone()
    targets[:, ::2] = -100
    out = model(tokens, targets)
    assert out.logits is None and out.loss.dtype == torch.float32
    expected = F.cross_entropy(model(tokens).logits[:, 1::2].flatten(0, 1), tokens[:, 1::2].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_no_target_gives_zero_loss_and_gradients(model, tokens):
    loss = model(tokens, torch.full_like(tokens, -100)).loss
    loss.backward()
    assert loss.item() == 0 and all(bool((p.grad == 0).all()) for p in model.parameters())


def test_causal(model, tokens):
    changed = tokens.clone()
    changed[:, 30:] = 0
    torch.testing.assert_close(model(tokens).logits[:, :30], model(changed).logits[:, :30])


def test_compiles_to_one_graph(model, tokens):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)(tokens, tokens).loss
    torch.testing.assert_close(compiled, model(tokens, tokens).loss)


def test_bf16_autocast_is_near(model, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(tokens, tokens).loss, rtol=0.01, atol=0.01)
    loss.backward()


def test_tied_embeddings(tokens):
    tied = build(ModelConfig.from_preset("tiny", tie_word_embeddings=True, num_hidden_layers=1))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied(tokens, tokens).loss.backward()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, t: m(t[0]), ValueError, "input_ids must be (B, T) of int64 or int32, but it is (40,) of int64"),
        (lambda m, t: m(t.float()), ValueError, "but it is (2, 40) of float32"),
        (lambda m, t: m(t + 256), ValueError, "allowed: 0 to 255, the vocabulary"),
        (lambda m, t: m(t, t - 300), ValueError, "targets holds"),
        (lambda m, t: m(t, t.float()), ValueError, "targets must be int64 or int32, but they are torch.float32"),
        (lambda m, t: m([1, 2]), TypeError, "input_ids must be a tensor, but a list was given"),
        (lambda m, t: m(t, t[:, 1:]), ValueError, "targets must have input_ids' shape (2, 40), but it is (2, 39)"),
        (lambda m, t: m(torch.zeros(1, 1025, dtype=torch.long)), ValueError, "1025 tokens were given; allowed: max_position_embeddings = 1024"),
        (lambda m, t: m(t, cu_seqlens=torch.tensor([0, 40])), NotImplementedError, "cu_seqlens (packed documents) is not supported yet"),
        (lambda m, t: llmcore.models.build({"a": 1}), TypeError, "config must be a ModelConfig, but a dict was given"),
    ],
)  # fmt: skip
def test_bad_input(model, tokens, call, error, words):
    with pytest.raises(error) as caught:
        call(model, tokens)
    assert words in str(caught.value) and "\n" not in str(caught.value)
