"""A checkpoint comes back as it was, and one that is damaged is found out."""

import json
from pathlib import Path

import pytest
import torch

from llmcore import models
from llmcore.train.checkpoint import (
    CheckpointError,
    SaveError,
    newest_checkpoint,
    require_model,
    save_checkpoint,
    verify,
)
from llmcore.train.config import OptimizerConfig, TrainConfig
from llmcore.train.distributed import World
from llmcore.train.engine import Engine, Plan

CONFIG = models.ModelConfig.from_preset(
    "tiny", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
FACTS = {"seconds": 1.5, "config": {"seed": 0}, "text": {"train": {"bytes": 3, "sha256": "ab"}}}


def trained(seed: int, steps: int = 2, precision: str = "fp32", **options) -> Engine:
    torch.manual_seed(seed)
    config = TrainConfig(optimizer=OptimizerConfig(**options))
    engine = Engine(models.build(CONFIG), config, Plan("single", precision), World(0, 1, torch.device("cpu")))
    train(engine, range(steps))
    return engine


def train(engine: Engine, seeds: range) -> None:
    for seed in seeds:
        tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(seed))
        engine.backward(engine.loss(tokens[:, :-1], tokens[:, 1:]))
        engine.step(1e-3, seed)


def save(run: Path, step: int, engine: Engine) -> Path:
    return save_checkpoint(run, step, engine.snapshot(), CONFIG, FACTS)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path, 3, trained(0))


def test_round_trip(checkpoint: Path):
    engine, again = trained(0), trained(1, steps=0)
    again.restore(checkpoint, None)
    given = dict(again.model.named_parameters())
    for name, expected in engine.model.named_parameters():
        assert torch.equal(given[name], expected), name
        state, given_state = engine.optimizer.state_of(expected), again.optimizer.state_of(given[name])
        assert set(state) == set(given_state) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[key], given_state[key]) for key in state)
    assert torch.equal(models.load(checkpoint).lm_head.weight, engine.model.lm_head.weight)


def test_a_snapshot_is_apart_from_the_model():
    engine = trained(0)
    snapshot = engine.snapshot()
    before = {name: value.clone() for name, value in {**snapshot.weights, **snapshot.moments}.items()}
    train(engine, range(2, 4))
    assert all(torch.equal({**snapshot.weights, **snapshot.moments}[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("kind", "precision"), [("adamw", "fp32"), ("adam", "fp32"), ("muon", "fp32"), ("adamw", "bf16"), ("adamw", "fp16")]
)
def test_training_goes_on_to_the_same_bits(tmp_path: Path, kind: str, precision: str):
    engine = trained(0, kind=kind, precision=precision)
    saved = save(tmp_path, 2, engine)
    train(engine, range(2, 5))
    again = trained(1, steps=0, kind=kind, precision=precision)
    again.restore(saved, verify(saved)["scale"])
    train(again, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), again.model.parameters(), strict=True))


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path):
    saved = save(tmp_path, 2, trained(0, kind="muon"))
    with pytest.raises(CheckpointError, match="holds the state of another optimizer: momentum_buffer of model.layers"):
        trained(1, steps=0).restore(saved, None)


def test_meta(checkpoint: Path):
    meta = verify(checkpoint)
    assert (checkpoint.name, meta["step"], meta["seconds"], meta["config"]) == ("step_3", 3, 1.5, {"seed": 0})
    assert set(meta["files"]) == {"model.safetensors", "config.json", "optimizer.safetensors"}
    assert meta["text"] == FACTS["text"] and meta["versions"]["torch"] == torch.__version__
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
    newer = save(run, 20, trained(1))
    (run / "step_30.tmp").mkdir()  # cut off while writing
    assert newest_checkpoint(run).path == newer
    (newer / "optimizer.safetensors").write_bytes(b"")
    assert newest_checkpoint(run).path == checkpoint
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_20.optimizer\.safetensors is truncated"):
        newest_checkpoint(run)


def test_a_left_over_is_replaced_but_never_a_checkpoint(tmp_path: Path):
    (tmp_path / "step_3.tmp").mkdir()
    (tmp_path / "step_3.tmp" / "model.safetensors").write_text("half a file")
    checkpoint = save(tmp_path, 3, trained(0))
    before = (checkpoint / "meta.json").read_bytes()
    with pytest.raises(SaveError, match="step_3 could not be written: "):
        save(tmp_path, 3, trained(1))
    assert not list(tmp_path.glob("*.tmp"))
    assert (checkpoint / "meta.json").read_bytes() == before


def test_another_model_is_named(checkpoint: Path):
    wider = models.ModelConfig.from_dict({**CONFIG.to_dict(), "intermediate_size": 128})
    with pytest.raises(CheckpointError, match="holds a model with intermediate_size=64; this run asks for 128"):
        require_model(checkpoint, wider)
    require_model(checkpoint, CONFIG)


def test_meta_is_plain_json(checkpoint: Path):
    assert json.loads((checkpoint / "meta.json").read_text())["step"] == 3
