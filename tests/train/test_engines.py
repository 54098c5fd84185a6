"""Every engine, on every number of ranks, trains as one process does, and goes on to the same bits when it was killed."""

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_minimal
from llmcore import models
from llmcore.train.checkpoint import checkpoints
from llmcore.train.config import ConfigError, TrainConfig
from llmcore.train.distributed import World
from llmcore.train.engine import Engine, Plan, make_plan
from llmcore.train.run import read_log

Script = Callable[[list[str], list[str]], subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
STEPS, SEQUENCES = 9, 12  # sequences a step, which one to four ranks can share
# train_minimal.py, one rank of which is killed at the beginning of a step
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_minimal
original = train_minimal.forward_backward
def forward_backward(engine, inputs, targets, step):
    if step == {step} and engine.world.rank == engine.world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(engine, inputs, targets, step)
train_minimal.forward_backward = forward_backward
sys.exit(train_minimal.main(sys.argv[2:]))  # the first is the script that this one stands for
"""

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
ENGINES = [
    *(pytest.param(0, ranks, id=f"ddp on {ranks}") for ranks in (1, 2, 3, 4)),
    *(pytest.param(stage, 2, id=f"zero {stage} on 2", marks=needs_deepspeed) for stage in (1, 2, 3)),
]


def torchrun(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc_per_node", str(ranks)]


def options(small: list[str], folder: Path, stage: int, ranks: int) -> list[str]:
    """Of a run on so many ranks; stage 0 is DDP."""
    argv = [*small, "--out_dir", str(folder), "--max_steps", str(STEPS), "--checkpoint_interval", "3"]
    argv += ["--eval_interval", "4", "--keep_checkpoints", "null", "--batch_size", str(SEQUENCES // ranks)]
    if stage == 0:
        return [*argv, "--engine", "ddp"]
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return [
        *argv,
        "--batch_size",
        str(SEQUENCES // ranks // 2),
        "--gradient_accumulation",
        "2",
        "--deepspeed",
        str(file),
    ]


def curve(run: Path) -> list[float]:
    """The losses and the validations; of a step that was made twice, the last."""
    lines = {(line["step"], key): line[key] for line in read_log(run) for key in ("loss", "val_bpb") if key in line}
    return [value for _, value in sorted(lines.items())]


def same_bits(a: Path, b: Path) -> bool:
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in ("model.safetensors", "optimizer.safetensors"))


@pytest.fixture
def one(small: list[str], tmp_path: Path) -> Path:
    """The run that all others are to equal: one process."""
    argv = [*options(small, tmp_path, 0, 1), "--engine", "single", "--name", "one"]
    assert train_minimal.main(argv) == 0
    return tmp_path / "one"


def assert_same_training(given: Path, expected: Path) -> None:
    assert curve(given) == pytest.approx(curve(expected), rel=1e-5)
    weights = models.load(expected / "final").state_dict()
    for name, value in models.load(given / "final").state_dict().items():
        # Adam divides by the gradient's size: where a gradient is nothing but rounding, so is its step of up to lr.
        difference = (value - weights[name]).abs()
        assert difference.mean() < 1e-6 and difference.max() < 1e-3, name


@pytest.mark.parametrize(("stage", "ranks"), ENGINES)
def test_the_curve_of_one_process(
    stage: int, ranks: int, small: list[str], one: Path, tmp_path: Path, run_script: Script
):
    result = run_script(torchrun(ranks), [*options(small, tmp_path, stage, ranks), "--name", "given"])
    assert result.returncode == 0, result.stderr
    assert_same_training(tmp_path / "given", one)
    assert layout(tmp_path / "given" / "step_9") == layout(one / "step_9")


EXPERTS = {
    "feed_forward_pattern": "[experts]", "num_experts": 4, "moe_intermediate_size": 16, "router_bias_rate": 0.05,
    "router_balance_loss": 0, "router_z_loss": 0,
}  # fmt: skip
FEW = [pytest.param(0, 2, id="ddp on 2"), pytest.param(2, 2, id="zero 2 on 2", marks=needs_deepspeed)]
MORE = [pytest.param(s, 2, id=f"zero {s} on 2", marks=[needs_deepspeed, pytest.mark.slow]) for s in (1, 3)]


@pytest.mark.parametrize(("stage", "ranks"), FEW + MORE)
def test_experts_balance_by_the_load_of_all_ranks(
    stage: int, ranks: int, small: list[str], tmp_path: Path, run_script: Script
):
    """The curve and the biases of one process, and the same bits after a resume."""
    small += [f"--model.{name}={value}" for name, value in EXPERTS.items()]
    argv = options(small, tmp_path, stage, ranks)
    result = run_script(torchrun(ranks), [*argv, "--name", "given"])
    assert result.returncode == 0, result.stderr
    assert train_minimal.main([*options(small, tmp_path, 0, 1), "--engine", "single", "--name", "one"]) == 0
    given, expected, resumed = tmp_path / "given", tmp_path / "one", tmp_path / "resumed"
    assert_same_training(given, expected)
    lines = [line for line in read_log(given) if "loss" in line]
    assert all(line["routing_loss"] == 0 for line in lines)
    assert all(1 <= line["expert_load"] <= 4 and 0 < line["expert_entropy"] <= 1 for line in lines)
    mine, theirs = (models.load(run / "final").state_dict() for run in (given, expected))
    biases = [name for name in mine if name.endswith("mlp.bias")]
    assert len(biases) == 2
    for name in biases:
        assert bool(mine[name].any())
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)
    resumed.mkdir()
    shutil.copy(given / "config.yaml", resumed)
    shutil.copytree(given / "step_6", resumed / "step_6")
    result = run_script(torchrun(ranks), ["--resume", str(resumed)])
    assert result.returncode == 0, result.stderr
    assert same_bits(resumed / "step_9", given / "step_9")


def test_what_balances_experts_is_logged_apart(small: list[str], tmp_path: Path):
    small += [f"--model.{name}={value}" for name, value in {**EXPERTS, "router_balance_loss": 0.9}.items()]
    argv = options(small, tmp_path, 0, 1)
    assert train_minimal.main([*argv, "--engine", "single", "--name", "run"]) == 0
    lines = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert lines and all(line["loss"] < 6 and 1.6 < line["routing_loss"] < 3 for line in lines)


def layout(checkpoint: Path) -> dict[str, list[str]]:
    """The names and shapes of all tensors."""
    from safetensors import safe_open

    found = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        with safe_open(checkpoint / name, framework="pt") as file:
            found[name] = [
                f"{key} {file.get_slice(key).get_shape()} {file.get_tensor(key).dtype}" for key in file.keys()
            ]
    return found


SLOW = {
    "ddp on 1",
    "ddp on 2",
    "ddp on 4",
    "ddp on 3",
    "zero 1 on 2",
    "zero 2 on 2",
}  # test_dying_ranks kills DDP too


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        pytest.param(*p.values, id=p.id, marks=[*p.marks, *([pytest.mark.slow] if p.id in SLOW else [])])
        for p in ENGINES
    ],
)
def test_killed_twice_it_goes_on_to_the_same_bits(
    stage: int, ranks: int, small: list[str], tmp_path: Path, run_script: Script
):
    argv = [*options(small, tmp_path, stage, ranks), "--ema_decay", "0.9"]
    result = run_script(torchrun(ranks), [*argv, "--name", "straight"])
    assert result.returncode == 0, result.stderr
    for step in (4, 7):
        script = tmp_path / "killed.py"
        script.write_text(KILLED.format(root=str(ROOT), step=step))
        result = run_script([*torchrun(ranks), str(script)], [*argv, "--name", "killed", "--resume", "auto"])
        assert result.returncode != 0
        assert max(checkpoints(tmp_path / "killed")) in range(step - 3, step + 1)
    result = run_script(torchrun(ranks), [*argv, "--name", "killed", "--resume", "auto"])
    assert result.returncode == 0, result.stderr
    for step in (6, 9):
        assert same_bits(tmp_path / "killed" / f"step_{step}", tmp_path / "straight" / f"step_{step}")
        assert same_bits_of_average(tmp_path / "killed" / f"step_{step}", tmp_path / "straight" / f"step_{step}")
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")


def same_bits_of_average(a: Path, b: Path) -> bool:
    name = "ema/model.safetensors"
    return (a / name).read_bytes() == (b / name).read_bytes()


CHANGES = [
    pytest.param((0, 2), (0, 1), id="two ranks, then one", marks=pytest.mark.slow),
    pytest.param((0, 1), (0, 3), id="one rank, then three", marks=pytest.mark.slow),
    pytest.param((0, 2), (3, 2), id="ddp, then zero 3", marks=[needs_deepspeed, pytest.mark.slow]),
    pytest.param((2, 2), (0, 1), id="zero 2, then one", marks=needs_deepspeed),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_another_number_of_ranks_or_engine_goes_on_with_the_same_batch(
    before: tuple[int, int], after: tuple[int, int], small: list[str], one: Path, tmp_path: Path, run_script: Script
):
    argv = options(small, tmp_path, *before)
    result = run_script(torchrun(before[1]), [*argv, "--name", "given"])
    assert result.returncode == 0, result.stderr
    for path in (tmp_path / "given").glob("step_*"):
        if path.name > "step_3":
            shutil.rmtree(path)
    engine = ["--engine", "ddp", "--deepspeed", "null"]
    if after[0]:
        (tmp_path / "after.json").write_text(json.dumps({"zero_optimization": {"stage": after[0]}}))
        engine = ["--engine", "deepspeed", "--deepspeed", str(tmp_path / "after.json")]
    result = run_script(torchrun(after[1]), ["--resume", str(tmp_path / "given"), *engine])
    assert result.returncode == 0, result.stderr
    assert "batch   12 sequences x 32 = 384 tokens a step" in result.stdout
    assert_same_training(tmp_path / "given", one)


def test_a_batch_that_cannot_be_shared(small: list[str], one: Path, run_script: Script):
    result = run_script(torchrun(5), ["--resume", str(one), "--max_steps", "12", "--engine", "ddp"])
    assert result.returncode != 0
    assert result.stderr.count("the run was made with 12 sequences a step, which 5 processes cannot share evenly") == 1


def test_share():
    config = TrainConfig(batch_size=8, gradient_accumulation=2)
    for world_size, expected in ((1, (8, 4)), (2, (8, 2)), (4, (8, 1)), (8, (4, 1)), (32, (1, 1))):
        shared = config.share(32, world_size)
        assert (shared.batch_size, shared.gradient_accumulation) == expected
        assert shared.global_batch(world_size) == 32
    with pytest.raises(ConfigError, match="made with 32 sequences a step, which 3 processes cannot share evenly"):
        config.share(32, 3)


def test_tokens_weigh_the_same_wherever_they_are():
    config = TrainConfig(
        batch_size=1,
        gradient_accumulation=4,
        model={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
    )
    torch.manual_seed(0)
    model = models.build(models.ModelConfig.from_preset("tiny", **config.model))
    engine = Engine(model, config, Plan("single", "fp32"), World(0, 1, torch.device("cpu")))
    inputs, targets = torch.randint(256, (2, 4, 16))
    targets[0, 3:] = targets[1, :] = targets[2, :9] = -100  # one sequence has no target at all
    total = train_minimal.forward_backward(engine, inputs, targets, 0)
    given = [p.grad.clone() for p in model.parameters()]
    engine.optimizer.zero_grad()
    loss = model(inputs, targets).loss
    loss.backward()
    assert total.item() == pytest.approx(loss.item(), rel=1e-6)
    for p, gradient in zip(model.parameters(), given, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-7)


@needs_deepspeed
def test_zero_without_a_launcher(small: list[str], one: Path, tmp_path: Path, run_script: Script):
    argv = [argument for argument in options(small, tmp_path, 3, 1) if argument]
    result = run_script([], [*argv, "--name", "given"])
    assert result.returncode == 0, result.stderr
    assert_same_training(tmp_path / "given", one)


@needs_deepspeed
def test_what_deepspeed_refuses_is_said(small: list[str], tmp_path: Path, run_script: Script):
    content = {"zero_optimization": {"stage": 2}, "checkpoint": {"tag_validation": "sometimes"}}
    (tmp_path / "z.json").write_text(json.dumps(content))
    result = run_script([], [*small, "--num_gpus", "2", "--deepspeed", str(tmp_path / "z.json"), "--name", "a"])
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert f"train_minimal.py: DeepSpeed cannot use {tmp_path / 'z.json'}: " in result.stderr
    assert not list((tmp_path / "runs").iterdir())


def test_muon_needs_whole_matrices(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    config = TrainConfig(deepspeed=str(file))
    config.optimizer.kind = "muon"
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    with pytest.raises(ConfigError, match="optimizer.kind is muon, which needs whole matrices"):
        make_plan(config, 2, torch.device("cpu"))
