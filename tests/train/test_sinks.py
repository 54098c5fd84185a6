"""Figures reach TensorBoard and Weights & Biases, through a resume too; llmcore plot draws what log.jsonl holds."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

import train_minimal
from llmcore.cli import main, plot
from llmcore.train.run import read_log


def test_wandb_sees_one_run_through_a_resume(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started, logged, finished = [], [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            finished.append(True)

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: started.append(options) or Run()
    wandb.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = ["--name", "a", "--log.wandb", "true", "--log.wandb_project", "p", "--max_steps", "4"]
    assert train_minimal.main([*small, *options]) == 0
    run = tmp_path / "runs" / "a"
    assert train_minimal.main(["--resume", str(run), "--max_steps", "6"]) == 0
    assert [(s["project"], s["name"], s["resume"]) for s in started] == [("p", "a", "allow")] * 2
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["config"]["batch_size"] == 4 and len(finished) == 2
    losses = [(step, values["loss"]) for step, values in logged if "loss" in values]
    assert losses == [(line["step"], line["loss"]) for line in read_log(run) if "loss" in line]
    assert [step for step, _ in losses] == list(range(1, 7))
    assert any("val_bpb" in values for _, values in logged)


def test_tensorboard_holds_the_figures(small: list[str], tmp_path: Path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train_minimal.main([*small, "--name", "a", "--log.tensorboard", "true"]) == 0
    run = tmp_path / "runs" / "a"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    expected = [(line["step"], pytest.approx(line["loss"])) for line in read_log(run) if "loss" in line]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    assert {"lr", "grad_norm", "tokens_per_second", "val_bpb"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_named_before_anything_is_written(package, small, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert train_minimal.main([*small, "--name", "a", f"--log.{package}", "true"]) == 2
    assert f"log.{package} is true, but {package} is not installed" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_weights_and_biases_that_cannot_start(small: list[str], tmp_path: Path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    def init(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", init)
    assert train_minimal.main([*small, "--name", "a", "--log.wandb", "true"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot start: No API key configured. Use `wandb login`; log in by" in error


def test_plot_draws_runs_over_each_other(small: list[str], tmp_path: Path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    for name in "ab":
        assert train_minimal.main([*small, "--name", name]) == 0
    runs = [str(tmp_path / "runs" / name) for name in "ab"]
    assert main(["plot", *runs]) == 0
    picture = tmp_path / "runs" / "a" / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in capsys.readouterr().out
    assert main(["plot", runs[0], "--out", str(tmp_path / "nowhere" / "x.png")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_plot_takes_what_a_resumed_and_cut_off_run_has_written(tmp_path: Path):
    lines = [{"event": "start", "step": 0}, *({"step": s, "loss": v} for s, v in ((1, 3.0), (2, 2.5), (2, 2.0)))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert plot.read(tmp_path) == {"loss": [(1, 3.0), (2, 2.0)]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is no run: "),
        ("", "has nothing to draw yet: no step has been logged."),
        ('{"step": 1, "loss": 1}\nx\n{"step": 2, "loss": 1}\n', "is damaged: line 2 is not the JSON"),
    ],
)
def test_plot_says_what_is_wrong(text: str | None, sentence: str, tmp_path: Path, capsys):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    assert main(["plot", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
