"""The whole run: it learns, stops, saves, resumes to the last bit, samples, and writes over nothing."""

import math
import shutil
import time
from pathlib import Path

import pytest
import torch

import train_minimal
from llmcore import models
from llmcore.data import load_corpus
from llmcore.train.checkpoint import verify
from llmcore.train.loss_scale import LossScale
from llmcore.train.run import read_log


def run(*argv: str) -> None:
    assert train_minimal.main(list(argv)) == 0


def losses(path: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(path) if "loss" in line}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return models.load(checkpoint).state_dict()


def test_a_run_learns_logs_and_samples(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(*small, "--name", "a", "--max_steps", "40", "--eval_interval", "20", "--sample.prompt", "line ")
    path = tmp_path / "runs" / "a"
    assert {file.name for file in path.iterdir()} == {"config.yaml", "log.jsonl", "step_20", "step_40", "best", "final"}

    curve = losses(path)
    assert list(curve) == list(range(1, 41)) and curve[40] < curve[1] - 1
    log = read_log(path)
    assert [line["step"] for line in log if "val_bpb" in line] == [20, 40, 40]
    assert all({"lr", "seconds", "tokens_per_second", "tflops"} <= set(line) for line in log if "loss" in line)
    assert log[-1]["val_bpb"] == pytest.approx(curve[40] / 0.6931, rel=0.2), "bits per byte are nats / ln 2"

    output = capsys.readouterr().out
    assert "step 40  loss" in output and "tokens/s" in output and "bits per byte" in output
    assert len(output.split("\n\nline ")) == 2, "the sample is the last thing printed, after an empty line"


EXACT = {
    "plain": [],
    "fp16": ["--precision", "fp16"],
    "muon in bf16": ["--precision", "bf16", "--optimizer.kind", "muon"],
    "dropout": ["--model.dropout", "0.1", "--batch_size", "2", "--gradient_accumulation", "2"],
    "dropout, recomputed": ["--model.dropout", "0.1", "--activation_checkpointing", "1", "--data.workers", "2"],
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_resume_is_exact(options: list[str], small: list[str], tmp_path: Path):
    straight, resumed = tmp_path / "runs" / "straight", tmp_path / "runs" / "resumed"
    run(*small, *options, "--name", "straight", "--max_steps", "20", "--checkpoint_interval", "10")
    resumed.mkdir()
    shutil.copy(straight / "config.yaml", resumed)
    shutil.copytree(straight / "step_10", resumed / "step_10")
    run("--resume", str(resumed))
    assert losses(resumed) == {step: loss for step, loss in losses(straight).items() if step > 10}
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (resumed / "step_20" / name).read_bytes() == (straight / "step_20" / name).read_bytes()


def test_the_average_of_the_weights_resumes_exactly_and_is_what_is_validated(small: list[str], tmp_path: Path):
    straight, resumed = tmp_path / "runs" / "straight", tmp_path / "runs" / "resumed"
    ema = ["--ema_decay", "0.9", "--max_steps", "20", "--checkpoint_interval", "10", "--eval_interval", "10"]
    run(*small, *ema, "--name", "straight")
    resumed.mkdir()
    shutil.copy(straight / "config.yaml", resumed)
    shutil.copytree(straight / "step_10", resumed / "step_10")
    run("--resume", str(resumed))
    for name in ("model.safetensors", "ema/model.safetensors"):
        assert (resumed / "step_20" / name).read_bytes() == (straight / "step_20" / name).read_bytes()
    average, last = weights(straight / "step_20" / "ema"), weights(straight / "step_20")
    assert any(not torch.equal(average[name], last[name]) for name in last)
    run(*small, *ema, "--ema_decay", "0", "--name", "plain")
    bits = [
        [line["val_bpb"] for line in read_log(tmp_path / "runs" / n) if "val_bpb" in line]
        for n in ("straight", "plain")
    ]
    assert bits[0] != bits[1] and losses(straight) == losses(tmp_path / "runs" / "plain"), (
        "training itself is as before"
    )


def test_the_newest_and_the_best_checkpoints_are_kept(small: list[str], tmp_path: Path, monkeypatch):
    bits = iter([3.0, 2.0, 2.5, 2.2, 2.1, 9.9, 9.9])
    monkeypatch.setattr(train_minimal, "bits_per_byte", lambda *_: next(bits))
    run(*small, "--name", "a", "--eval_interval", "1", "--checkpoint_interval", "1", "--keep_checkpoints", "2")
    path = tmp_path / "runs" / "a"
    assert {p.name for p in path.iterdir() if p.is_dir()} == {"step_2", "step_5", "step_6", "best", "final"}
    assert (path / "best").resolve().name == "step_2" and (path / "final").resolve().name == "step_6"
    assert torch.equal(models.load(path / "best").lm_head.weight, models.load(path / "step_2").lm_head.weight)


def test_patience_ends_a_run_across_a_resume(small: list[str], tmp_path: Path, monkeypatch, capsys):
    bits = [3.0, 2.0, 2.5, 2.4, 2.3, 2.2, 2.1]
    for name, steps in (("a", "4"), ("b", "6")):
        given = iter(bits)
        monkeypatch.setattr(train_minimal, "bits_per_byte", lambda *_, given=given: next(given))
        run(
            *small,
            "--name",
            name,
            "--eval_interval",
            "1",
            "--checkpoint_interval",
            "1",
            "--patience",
            "3",
            "--max_steps",
            steps,
        )
    assert "no better validation since step 2" in capsys.readouterr().out
    assert (tmp_path / "runs" / "b" / "final").resolve().name == "step_5"
    given_again = iter([2.3, 2.2])
    monkeypatch.setattr(train_minimal, "bits_per_byte", lambda *_: next(given_again))
    run("--resume", str(tmp_path / "runs" / "a"), "--max_steps", "6")
    assert "no better validation since step 2" in capsys.readouterr().out
    assert (tmp_path / "runs" / "a" / "final").resolve().name == "step_5"


def test_epochs_set_the_number_of_steps(small: list[str], tmp_path: Path):
    run(*small, "--name", "a", "--epochs", "0.05")
    text = load_corpus(small[1], None)
    assert max(losses(tmp_path / "runs" / "a")) == math.ceil(0.05 * text.train.size / (4 * 32))


def test_resume_from_a_checkpoint_makes_a_new_run(small: list[str], tmp_path: Path):
    run(*small, "--name", "a", "--checkpoint_interval", "3")
    before = sorted((tmp_path / "runs").rglob("*"))
    run("--resume", str(tmp_path / "runs" / "a" / "step_3"), "--out_dir", str(tmp_path / "runs"), "--name", "b")
    assert [path for path in sorted((tmp_path / "runs").rglob("*")) if "b" not in path.parts] == before
    assert list(losses(tmp_path / "runs" / "b")) == [4, 5, 6]


def test_resume_auto(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = tmp_path / "runs"
    run(*small, "--resume", "auto", "--name", "first")  # nothing to resume yet
    run(*small, "--name", "second", "--checkpoint_interval", "2")
    file = runs / "second" / "step_6" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    run("--resume", "auto", "--out_dir", str(runs), "--max_steps", "8")
    assert "runs/second/step_4" in capsys.readouterr().out
    names = {path.name for path in (runs / "second").iterdir() if path.is_dir()}
    assert names == {"step_4", "step_6", "step_6.corrupt", "step_8", "final"}
    run("--resume", str(runs / "second"))  # over already: nothing is trained, nothing is written over


def test_nothing_is_written_over(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(*small, "--name", "a")
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train_minimal.main([*small, "--name", "a"]) == 2
    assert "runs/a exists already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content


def test_unnamed_runs_do_not_meet(small: list[str], tmp_path: Path):
    run(*small, "--max_steps", "1")
    run(*small, "--max_steps", "1")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_damaged_checkpoint(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(*small, "--name", "a")
    file = tmp_path / "runs" / "a" / "step_6" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    for path in (file.parent, file.parent.parent):
        assert train_minimal.main(["--resume", str(path)]) == 2
        output = capsys.readouterr()
        assert output.err.count("\n") == 1 and "optimizer.safetensors is truncated" in output.err and output.out == ""
    assert train_minimal.main(["--resume", str(file.parent), "--model.hidden_size", "64"]) == 2


def test_dry_run_writes_nothing(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(*small, "--dry_run")
    assert not (tmp_path / "runs").exists()
    output = capsys.readouterr().out
    for words in (
        "parameters",
        "held out",
        "4 sequences x 32 = 128 tokens a step",
        "6 steps",
        "GFLOP a step",
        "memory  about",
    ):
        assert words in output


def test_accumulation_changes_nothing(small: list[str], tmp_path: Path):
    run(*small, "--name", "whole")
    run(*small, "--name", "parts", "--batch_size", "1", "--gradient_accumulation", "4")
    whole, parts = (losses(tmp_path / "runs" / name) for name in ("whole", "parts"))
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-5)


def test_time_limit(small: list[str], tmp_path: Path):
    run(*small, "--name", "a", "--max_steps", "null", "--max_seconds", "1", "--log_interval", "10")
    log = read_log(tmp_path / "runs" / "a")
    rates = [line["lr"] for line in log if "lr" in line]
    assert 0.9 < log[-1]["seconds"] < 5 and rates[-1] < rates[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_less_precision(precision: str, small: list[str], tmp_path: Path):
    run(*small, "--name", "fp32")
    run(*small, "--name", "less", "--precision", precision)
    fp32, less = (losses(tmp_path / "runs" / name) for name in ("fp32", "less"))
    assert fp32 != less and list(less.values()) == pytest.approx(list(fp32.values()), rel=0.02)


def test_the_loss_scale_falls_until_gradients_are_finite(small: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (2.0**40,))
    run(*small, "--name", "a", "--precision", "fp16", "--max_steps", "40", "--max_skipped", "30")
    skipped = [line["skipped"] for line in read_log(tmp_path / "runs" / "a") if "loss" in line]
    assert 5 < skipped[-1] < 35 and skipped[-1] == skipped[-3], "and then training goes on"
    meta = verify(tmp_path / "runs" / "a" / "step_40")
    assert meta["scale"]["scale"] == 2.0 ** (40 - skipped[-1])


OPTIONS = {
    "workers": ["--data.workers", "2"],
    "recomputed": ["--activation_checkpointing", "all"],
    "deterministic": ["--deterministic", "true"],
    "profiled": ["--profile_steps", "2", "--max_steps", "9"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_that_change_no_bit(options: list[str], small: list[str], tmp_path: Path):
    run(*small, "--max_steps", "9", "--name", "plain")
    run(*small, "--max_steps", "9", *options, "--name", "a")
    assert losses(tmp_path / "runs" / "a") == losses(tmp_path / "runs" / "plain")
    assert (tmp_path / "runs" / "a" / "profile" / "trace.json").exists() == ("--profile_steps" in options)
    assert not torch.are_deterministic_algorithms_enabled() or "--deterministic" in options
    torch.use_deterministic_algorithms(False)


def test_a_loss_that_is_not_finite_stops_the_run(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [
        *small,
        "--name",
        "a",
        "--optimizer.lr",
        "1e30",
        "--optimizer.grad_clip",
        "0",
        "--optimizer.warmup_steps",
        "0",
        "--max_skipped",
        "2",
    ]
    assert train_minimal.main(argv) == 1
    assert "lower optimizer.lr" in capsys.readouterr().err
    assert not list((tmp_path / "runs" / "a").glob("step_*"))


def test_weights_that_are_not_finite_are_not_saved(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = [*small, "--name", "a", "--max_steps", "1", "--optimizer.lr", "1e39", "--optimizer.warmup_steps", "0"]
    assert train_minimal.main(argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the largest weight is" in error and "no checkpoint to go on from" in error
    assert not list((tmp_path / "runs" / "a").glob("step_*"))


def test_no_sample_after_a_validation_that_is_not_finite(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(train_minimal, "bits_per_byte", lambda *_: float("nan"))
    assert train_minimal.main([*small, "--name", "a", "--max_steps", "1"]) == 1
    assert "the loss on the held-out text is nan at step 1" in capsys.readouterr().err


@pytest.mark.parametrize(("interval", "words"), [("2", "goes on from its last checkpoint"), ("0", "no checkpoint")])
def test_interrupted(
    interval: str, words: str, small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    steps = iter(range(3))

    def three_steps(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return forward_backward(*arguments)

    forward_backward = train_minimal.forward_backward
    monkeypatch.setattr(train_minimal, "forward_backward", three_steps)
    assert train_minimal.main([*small, "--name", "a", "--checkpoint_interval", interval]) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_validation_and_checkpoints_are_no_training_time(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def slow(*_: object) -> float:
        time.sleep(0.3)
        return 1.0

    monkeypatch.setattr(train_minimal, "bits_per_byte", slow)
    run(*small, "--name", "a", "--eval_interval", "1", "--max_steps", "4")
    assert read_log(tmp_path / "runs" / "a")[-1]["seconds"] < 1


def test_a_name_for_a_run_that_has_one(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(*small, "--name", "a", "--max_steps", "1")
    assert train_minimal.main(["--resume", str(tmp_path / "runs" / "a"), "--name", "b"]) == 2
    assert "name is 'b', but --resume" in capsys.readouterr().err


def test_a_name_is_another_name_of_a_checkpoint(small: list[str], tmp_path: Path):
    run(*small, "--name", "a", "--max_steps", "4", "--eval_interval", "2", "--checkpoint_interval", "2")
    folder = tmp_path / "runs"
    run("--resume", str(folder / "a" / "final"), "--out_dir", str(folder), "--name", "b", "--max_steps", "5")
    assert list(losses(folder / "b")) == [5]
    options = ["--max_steps", "8", "--checkpoint_interval", "1", "--keep_checkpoints", "1"]
    run("--resume", str(folder / "a"), *options)
    models.load(folder / "a" / "final")


def test_text_that_changed(small: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "text"
    shutil.copytree(text, copy)
    run(*small, "--data.train", str(copy), "--name", "a", "--max_steps", "1")
    with (copy / "0.txt").open("a") as file:
        file.write("more")
    again = ["--resume", str(tmp_path / "runs" / "a"), "--max_steps", "2"]
    capsys.readouterr()
    assert train_minimal.main(again) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{copy} " in error and "give --data.train to go on with this text" in error
    run(*again, "--data.train", str(copy))
    best = verify(tmp_path / "runs" / "a" / "step_2")["best"]
    assert best["bits"] is None, "what was best on the other text is not, on this one"
