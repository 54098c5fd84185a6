"""The command line and YAML: what wins over what, and one sentence for whatever is wrong."""

import importlib.util
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import train_minimal
from llmcore.ops import _dispatch
from llmcore.train.config import ConfigError, TrainConfig, model_config
from llmcore.train.parse import parse

CONFIGS = Path(__file__).parents[2] / "configs"


def test_later_wins(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\nmodel: {num_hidden_layers: 3}\noptimizer: {lr: 1e-4}\n")
    resumed = {
        **TrainConfig().to_dict(),
        "seed": 7,
        "batch_size": 2,
        "optimizer": {"lr": 0.5, "beta1": 0.8},
        "name": "old",
    }
    argv = ["--config", str(file), "--seed", "2", "--model.hidden_size", "64", "--data.valid", "v.txt"]
    config = parse(argv, "", resumed)
    assert (config.seed, config.batch_size, config.seq_len) == (2, 2, TrainConfig().seq_len)
    assert config.model == {"num_hidden_layers": 3, "hidden_size": 64}
    assert (config.optimizer.lr, config.optimizer.beta1) == (1e-4, 0.8)
    assert (config.data.train, config.data.valid, config.name) == (None, "v.txt", None)
    model = model_config(config)
    assert (model.num_hidden_layers, model.hidden_size) == (3, 64)


def test_tiny_yaml_is_the_default():
    assert parse(["--config", str(CONFIGS / "tiny.yaml")], "") == parse([], "") == TrainConfig()


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configurations_are_right(file: Path):
    config = parse(["--config", str(file)], "")
    config.check()
    model_config(config)


def test_help_documents_every_key(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        train_minimal.main(["--help"])
    assert exit.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for key in (
        "--preset",
        "--max_seconds",
        "--optimizer.final_lr_ratio",
        "--data.train",
        "--sample.top_p",
        "--dry_run",
    ):
        assert re.search(rf"{key} ?\w* [A-Z]\w+", text), f"{key} has no description"


def test_print_config_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit):
        train_minimal.main(["--seed", "5", "--model.num_hidden_layers", "1", "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    config = parse(["--config", str(tmp_path / "c.yaml")], "")
    assert config.seed == 5 and config.model == {"num_hidden_layers": 1}


# Arguments, a YAML file or None, and what the sentence must say.
WRONG_IN_A_PROCESS = {
    "unknown option": (["--max_step", "3"], None, "unknown option --max_step; did you mean --max_steps?"),
    "unknown key": ([], "optimizer:\n  learning: 1\n", "unknown key optimizer.learning in"),
    "no YAML": ([], "seed: [1\nname: x\n", "is not YAML at line 2"),
    "unknown preset": (["--preset", "tinny"], None, "unknown preset 'tinny'; did you mean 'tiny'?"),
    "no checkpoint": (["--resume", "nowhere/step_5"], None, "there is no checkpoint nowhere/step_5"),
}


@pytest.fixture(scope="module")
def results(
    run_script: Callable[[list[str], list[str]], subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("yaml")
    jobs = {}
    with ThreadPoolExecutor(2) as pool:
        for number, (name, (argv, yaml, _)) in enumerate(WRONG_IN_A_PROCESS.items()):
            file = folder / f"{number}.yaml"
            file.write_text(yaml or "")
            jobs[name] = pool.submit(run_script, [], [*argv, *(["--config", str(file)] if yaml else [])])
    return {name: job.result() for name, job in jobs.items()}


@pytest.mark.parametrize("name", WRONG_IN_A_PROCESS)
def test_exit_code_and_one_line(name: str, results: dict[str, subprocess.CompletedProcess[str]]):
    result = results[name]
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("train_minimal.py: ")
    assert WRONG_IN_A_PROCESS[name][2] in result.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--precision", "fp8"], "precision is 'fp8'; allowed is one of auto, fp32, bf16, fp16."),
        (["--max_steps", "1.5"], "max_steps is '1.5'; allowed is a whole number or null."),
        (["--seed"], "--seed has no value; allowed is a whole number."),
        (["steps=3"], "unexpected argument 'steps=3'"),
        (["--batch_size", "0"], "batch_size is 0; allowed is from 1 to 16777216."),
        (["--batch_size", "1000000000000000"], "batch_size is 1000000000000000; allowed is from 1 to 16777216."),
        (["--epochs", "1e308"], "epochs is 1e+308; allowed is from 0 to 1000000."),
        (["--deepspeed="], "deepspeed is empty; give it a value, or leave it out."),
        (["--optimizer.lr", ".nan"], "optimizer.lr is nan; allowed is at least 0."),
        (["--optimizer.lr", "fast"], "optimizer.lr is 'fast'; allowed is a number."),
        (["--lr", "1"], "unknown option --lr; did you mean --optimizer.lr?"),
        (["--data.train", "nowhere.txt"], "the text nowhere.txt does not exist"),
        (["--optimizer.final_lr_ratio", "2"], "optimizer.final_lr_ratio is 2.0; allowed is from 0 to 1."),
        (["--max_steps", "null"], "max_steps, epochs and max_seconds are all null"),
        (["--epochs", "0"], "epochs is 0; allowed is more than 0."),
        (["--patience", "2", "--eval_interval", "0"], "patience is 2, but eval_interval is 0"),
        (["--keep_checkpoints", "0"], "keep_checkpoints is 0; allowed is at least 1."),
        (["--ema_decay", "1"], "ema_decay is 1.0; allowed is from 0 to 0.999999."),
        (["--optimizer.kind", "sgd"], "optimizer.kind"),
        (["--gradient_accumulation", "0"], "gradient_accumulation is 0; allowed is from 1 to"),
        (["--activation_checkpointing", "-1"], "activation_checkpointing is -1; allowed is at least 0, or all."),
        (["--activation_checkpointing", "5"], "activation_checkpointing is 5; allowed is at most the model's 4 layers"),
        (
            ["--activation_checkpointing", "some"],
            "activation_checkpointing is 'some'; allowed is a whole number or all.",
        ),
        (["--engine", "zero"], "engine is 'zero'; allowed is one of auto, single, ddp, deepspeed."),
        (["--engine", "single", "--num_gpus", "3"], "engine is single, but there are 3 processes; allowed are ddp and"),
        (["--engine", "ddp"], "engine is ddp, but this process was started alone"),
        (["--engine", "deepspeed"], "engine is deepspeed, but deepspeed names no file; ready ones are in configs/deep"),
        (["--engine", "ddp", "--deepspeed", "a.json"], "engine is ddp, but deepspeed names a.json; leave one of them"),
        (["--data.workers", "100"], "data.workers is 100; allowed is from 0 to 64."),
        (["--model.dropout", "1"], "dropout is 1; allowed"),
        (["--seq_len", "100000"], "seq_len is 100000; allowed is at most model.max_position_embeddings"),
        (["--model.num_layers", "2"], "did you mean 'num_hidden_layers'?"),
        (["--model.hidden_size", "wide"], "hidden_size is 'wide'"),
        (["--model.vocab_size", "100"], "model.vocab_size is 100; allowed is at least 256"),
        (["--sample.tokens", "100000"], "sample.prompt and sample.tokens make 100004 tokens"),
        (["--sample.prompt", ""], "sample.prompt is empty"),
        (["--config", "missing.yaml"], "the configuration file missing.yaml does not exist."),
        (["--seed=18446744073709551616"], "seed is 18446744073709551616; allowed is from 0 to 9223372036854775807."),
        (["--sample.prompt", "a\udcff"], r"sample.prompt is 'a\udcff'; allowed is text that UTF-8 can encode."),
        (["--sample.top_p", "0"], "sample.top_p is 0; allowed is more than 0"),
        (["--name", "n" * 300], "allowed is the name of a folder"),
        (["--name", "a\0b"], r"name is 'a\x00b'; allowed is the name of a folder"),
        (["--name", "a/b"], "name is 'a/b'; allowed is the name of a folder"),
        (["--out_dir", __file__], "is no folder"),
        (["--out_dir", f"{__file__}/runs"], "is no folder"),
        (["--resume", "r" * 300], "there is no checkpoint rrr"),
        (["--model", "5"], "model is '5'; allowed is a set of keys and values."),
        (["--model", "tiny_moe"], "allowed is a set of keys and values; did you mean --preset tiny_moe?"),
        (["--num_experts", "8"], "unknown option --num_experts; did you mean --model.num_experts?"),
        (["--model.num_experts", "8"], "model.num_experts is given, but no layer of this model has experts"),
        (
            ["--preset", "tiny_mamba", "--model.feed_forward_pattern", "[experts]"],
            "model.feed_forward_pattern is given, but no layer of this model has experts",
        ),
        (["--model.preset", "tiny_moe"], "unknown option --model.preset; did you mean --preset?"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_wrong_values(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert train_minimal.main([*argv, "--dry_run"] if "--seed" not in argv else argv) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and words in output.err and output.out == ""


def test_empty_and_list_yaml(tmp_path: Path):
    for content in ("", "- 1\n", "text"):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(ConfigError, match="allowed are keys such as"):
            parse(["--config", str(tmp_path / "c.yaml")], "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seed: 1\nname: a\nseed: 2", "{} is not YAML at line 3, column 1: the key seed comes twice."),
        ("seed: null", "seed in {} is null; allowed is a whole number."),
        ("engine: null", "engine in {} is null; allowed is one of auto, single, ddp, deepspeed."),
        ("optimizer: {lr: null}", "optimizer.lr in {} is null; allowed is a number."),
    ],
)
def test_null_where_it_is_not_allowed(content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.yaml").write_text(content)
    assert train_minimal.main(["--config", str(tmp_path / "c.yaml"), "--dry_run"]) == 2
    assert words.format(tmp_path / "c.yaml") in capsys.readouterr().err


@pytest.mark.parametrize("section", ["optimizer:\n  # lr: 1\n", "optimizer: 5\n", "model:\n", "model: {1: 2}\n"])
def test_sections_that_are_none(section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.yaml").write_text(section)
    assert train_minimal.main(["--config", str(tmp_path / "c.yaml"), "--dry_run"]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and f"{section.split(':')[0]} in {tmp_path / 'c.yaml'} " in output.err


@pytest.mark.parametrize(("backend", "words"), [("foo", "LLMCORE_BACKEND is 'foo'"), ("cuda", "the cuda backend, but")])
def test_backend_that_cannot_run(
    backend: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(_dispatch, "_process_backend", backend)
    monkeypatch.setattr("llmcore.train.launch.device", lambda _: torch.device("cpu"))
    assert train_minimal.main(["--dry_run"]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and words in output.err


def test_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("llmcore.train.run.os.access", lambda *_: False)  # root may write anywhere
    assert train_minimal.main(["--dry_run", "--out_dir", str(tmp_path / "runs" / "more")]) == 2
    assert f"but {tmp_path} cannot be written to" in capsys.readouterr().err


EVERY = [
    *(["--config", str(path)] for path in sorted(CONFIGS.glob("*.yaml"))),
    *(["--deepspeed", str(path)] for path in sorted((CONFIGS / "deepspeed").glob("*.json"))),
]


@pytest.mark.parametrize("num_gpus", ["1", "8"])
@pytest.mark.parametrize("argv", EVERY, ids=lambda argv: Path(argv[1]).name)
def test_every_configuration_dry_runs(argv: list[str], num_gpus: str, capsys: pytest.CaptureFixture[str]):
    if argv[0] == "--deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    assert train_minimal.main([*argv, "--num_gpus", num_gpus, "--dry_run"]) == 0
    output = capsys.readouterr()
    assert output.err == "" and f"x {num_gpus} processes" in output.out and "note" not in output.out
