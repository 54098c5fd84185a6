import json

import pytest
import torch

from llmcore import models
from llmcore.models import ModelConfig, build

TOKENS = torch.arange(12).view(1, 12)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = build(ModelConfig.from_preset("tiny", num_hidden_layers=1))
    models.save(model, tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, tied):
    model = build(ModelConfig.from_preset("tiny", num_hidden_layers=1, tie_word_embeddings=tied))
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits) and again.config == model.config
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    again(TOKENS, TOKENS).loss.backward()


def test_nothing_is_overwritten(saved):
    model, path = saved
    before = (path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        models.save(model, path)
    assert (path / "model.safetensors").read_bytes() == before


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def flip_the_header(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[12] ^= 0xFF
    (path / "model.safetensors").write_bytes(data)


def change(**values):
    def apply(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **values}))

    return apply


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda p: (p / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing"),
        (lambda p: (p / "config.json").unlink(), FileNotFoundError, "config.json is missing"),
        (truncate, ValueError, "model.safetensors is damaged or truncated"),
        (flip_the_header, ValueError, "model.safetensors is damaged or truncated"),
        (lambda p: (p / "config.json").write_text("{"), ValueError, "config.json is not valid JSON"),
        (lambda p: (p / "config.json").write_text("[]"), ValueError, "config.json must hold an object"),
        (change(num_hidden_layers=2), ValueError, "lacks model.layers.1"),
        (change(hidden_size=64, head_dim=32), ValueError, "has shape (256, 128); config.json asks for (256, 64)"),
        (change(hidden=64), ValueError, "ModelConfig has no field 'hidden'; did you mean 'hidden_size'?"),
    ],
)
def test_damaged_checkpoints(saved, damage, error, words):
    _, path = saved
    damage(path)
    with pytest.raises(error) as caught:
        models.load(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
