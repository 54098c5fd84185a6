import pytest
import torch

from llmcore.models import ModelConfig, build
from llmcore.models.generation import _forbid_repeated_ngrams, _penalise_repetition, _sample


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(ModelConfig.from_preset("tiny", num_hidden_layers=2, num_key_value_heads=1, initializer_range=0.2))


PROMPT = torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(1))


def test_greedy_with_the_cache_equals_the_whole_sequence_again(model):
    expected = PROMPT
    for _ in range(20):
        expected = torch.cat((expected, model(expected).logits[:, -1].argmax(-1)[:, None]), 1)
    assert torch.equal(model.generate(PROMPT, 20, temperature=0), expected)


def test_cache_in_chunks(model):
    cache = model.new_cache(3, 7)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        model(PROMPT[:, :4], cache=cache)
    with torch.no_grad():
        check_chunks(model, cache)


def check_chunks(model, cache):
    first, second = model(PROMPT[:, :4], cache=cache).logits, model(PROMPT[:, 4:], cache=cache).logits
    torch.testing.assert_close(torch.cat((first, second), 1), model(PROMPT).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="KVCache: a batch of 2 was given; it was made for 3"):
        model(PROMPT[:2], cache=cache)
    with pytest.raises(ValueError, match="KVCache: 8 tokens do not fit; it was made for 7"):
        model(PROMPT[:, :1], cache=cache)


def test_stream_gives_the_same_tokens(model):
    torch.manual_seed(5)
    whole = model.generate(PROMPT, 9, top_k=20)
    torch.manual_seed(5)
    streamed = torch.stack(list(model.generate(PROMPT, 9, top_k=20, stream=True)), 1)
    assert torch.equal(whole[:, 7:], streamed) and torch.is_grad_enabled()


def test_eos_ends_a_row_and_then_the_batch(model):
    eos = model.generate(PROMPT, 1, temperature=0)[0, -1].item()
    out = model.generate(PROMPT, 30, temperature=0, eos_token_id=eos)
    assert bool((out[0, 7:] == eos).all())
    single = model.generate(PROMPT[:1], 30, temperature=0, eos_token_id=eos)
    assert single.shape == (1, 8)


def test_top_k_and_top_p():
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, 4)
    assert set(_sample(logits, 1.0, 2, None).tolist()) == {0, 1}
    assert set(_sample(logits, 1.0, None, 0.6).tolist()) == {0, 1}
    assert set(_sample(logits, 1.0, None, 0.5).tolist()) == {0}
    assert set(_sample(logits, 0.0, None, None).tolist()) == {0}
    frequency = (_sample(logits, 1.0, None, None) == 0).float().mean().item()
    assert abs(frequency - 0.5) < 0.05
    cold = (_sample(logits, 0.5, None, None) == 0).float().mean().item()
    assert abs(cold - 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)) < 0.05


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    assert _penalise_repetition(logits, torch.tensor([[0, 1, 1]]), 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_no_repeated_ngrams(model):
    banned = _forbid_repeated_ngrams(torch.zeros(1, 5), torch.tensor([[1, 2, 3, 1, 2]]), 3)
    assert banned.isneginf().tolist() == [[False, False, False, True, False]]
    assert _forbid_repeated_ngrams(torch.zeros(1, 5), torch.tensor([[4, 2, 4]]), 1).isneginf().tolist() == [
        [False, False, True, False, True]
    ]
    row = model.generate(PROMPT[:1], 200, temperature=0, no_repeat_ngram_size=2)[0].tolist()
    pairs = list(zip(row[6:], row[7:], strict=False))
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens is -1; allowed: 0 and above"),
        (dict(temperature=-0.1), "temperature is -0.1; allowed: 0 (greedy) and above"),
        (dict(top_k=0), "top_k is 0; allowed: 1 and above, or None"),
        (dict(top_p=1.5), "top_p is 1.5; allowed: above 0, up to 1, or None"),
        (dict(max_new_tokens=2000), "make 2007 tokens; allowed: max_position_embeddings = 1024"),
        (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), "input_ids holds no token"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_arguments(model, changes, words, stream):
    with pytest.raises(ValueError) as caught:
        model.generate(**{"input_ids": PROMPT, "max_new_tokens": 3, "stream": stream, **changes})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [dict(temperature="hot"), dict(max_new_tokens=None), dict(top_k=2.5), dict(top_p="a")]
)
def test_bad_types(model, changes):
    with pytest.raises(TypeError, match="generate: .* allowed: a (whole )?number"):
        model.generate(**{"input_ids": PROMPT, "max_new_tokens": 3, **changes})


def test_when_every_token_is_forbidden():
    everything = _forbid_repeated_ngrams(torch.zeros(1, 3), torch.tensor([[0, 1, 2]]), 1)
    assert bool((everything == 0).all())
