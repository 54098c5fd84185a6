"""A checkpoint comes back as it was, and one that is damaged is found out."""

import json
from pathlib import Path

import pytest
import torch

from llmcore import models
from llmcore.train.checkpoint import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    require_model,
    save_checkpoint,
    verify,
)
from llmcore.train.config import OptimizerConfig
from llmcore.train.optimizer import Optimizers, build_optimizer

CONFIG = models.ModelConfig.from_preset(
    "tiny", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)

TEXT = {"train": {"bytes": 3, "sha256": "ab"}}


def trained(seed: int, steps: int = 2, kind: str = "adamw") -> tuple[models.Decoder, Optimizers]:
    torch.manual_seed(seed)
    model = models.build(CONFIG)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind))
    for _ in range(steps):
        tokens = torch.randint(256, (2, 9))
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, 3, 1.5, *trained(0), {"seed": 0}, TEXT)


def test_round_trip(checkpoint: Path):
    model, optimizer = trained(0)
    again, again_optimizer = trained(1, steps=0)
    load_checkpoint(checkpoint, again, again_optimizer)
    for (name, expected), given in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(given, expected), name
        state, given_state = optimizer.state_of(expected), again_optimizer.state_of(given)
        assert set(state) == set(given_state) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[key], given_state[key]) for key in state)
    assert torch.equal(models.load(checkpoint).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("kind", ["adamw", "adam", "muon"])
def test_training_goes_on_to_the_same_bits(tmp_path: Path, kind: str):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(seed))
            model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = trained(0, kind=kind)
    saved = save_checkpoint(tmp_path, 2, 0.0, model, optimizer, {}, TEXT)
    steps(model, optimizer, range(3))
    again, again_optimizer = trained(1, steps=0, kind=kind)
    load_checkpoint(saved, again, again_optimizer)
    steps(again, again_optimizer, range(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path):
    saved = save_checkpoint(tmp_path, 2, 0.0, *trained(0, kind="muon"), {}, TEXT)
    with pytest.raises(CheckpointError, match="holds the state of another optimizer: momentum_buffer of model.layers"):
        load_checkpoint(saved, *trained(1, steps=0))


def test_meta(checkpoint: Path):
    meta = verify(checkpoint)
    assert (checkpoint.name, meta["step"], meta["seconds"], meta["config"]) == ("step_3", 3, 1.5, {"seed": 0})
    assert set(meta["files"]) == {"model.safetensors", "config.json", "optimizer.safetensors"}
    assert meta["text"] == TEXT and meta["versions"]["torch"] == torch.__version__
    assert not list(checkpoint.parent.glob("*.tmp"))


def test_truncated(checkpoint: Path):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated: it has 1,000 bytes, and meta\.json"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "meta.json"])
def test_one_flipped_bit(checkpoint: Path, name: str):
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is corrupted"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "meta.json"])
def test_missing_file(checkpoint: Path, name: str):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        verify(checkpoint)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null"])
def test_meta_that_is_no_meta(checkpoint: Path, content: bytes):
    (checkpoint / "meta.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"meta\.json is corrupted"):
        verify(checkpoint)


def test_newest_that_verifies(checkpoint: Path):
    run = checkpoint.parent
    newer = save_checkpoint(run, 20, 2.0, *trained(1), {}, TEXT)
    (run / "step_30.tmp").mkdir()  # cut off while writing
    assert newest_checkpoint(run) == newer
    (newer / "optimizer.safetensors").write_bytes(b"")
    assert newest_checkpoint(run) == checkpoint
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_20.optimizer\.safetensors is truncated"):
        newest_checkpoint(run)


def test_a_left_over_is_replaced_but_never_a_checkpoint(tmp_path: Path):
    (tmp_path / "step_3.tmp").mkdir()
    (tmp_path / "step_3.tmp" / "model.safetensors").write_text("half a file")
    checkpoint = save_checkpoint(tmp_path, 3, 0.0, *trained(0), {}, TEXT)
    before = (checkpoint / "meta.json").read_bytes()
    with pytest.raises(OSError):
        save_checkpoint(tmp_path, 3, 9.0, *trained(1), {}, TEXT)
    assert (checkpoint / "meta.json").read_bytes() == before


def test_another_model_is_named(checkpoint: Path):
    wider = models.ModelConfig.from_dict({**CONFIG.to_dict(), "intermediate_size": 128})
    with pytest.raises(CheckpointError, match="holds a model with intermediate_size=64; this run asks for 128"):
        require_model(checkpoint, wider)
    require_model(checkpoint, CONFIG)


def test_meta_is_plain_json(checkpoint: Path):
    assert json.loads((checkpoint / "meta.json").read_text())["step"] == 3
