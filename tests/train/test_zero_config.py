"""DeepSpeed's configuration: what of a file is repaired, what is refused, and whether DeepSpeed takes what comes out."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcore.train import zero_config as module
from llmcore.train.config import ConfigError
from llmcore.train.zero_config import KEYS, RENAMED, Fixed, ZeroConfig, read_zero_config, require_deepspeed, zero_config

FILES = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed")
Content = dict[str, Any]


def complete(content: Content, **changes: Any) -> ZeroConfig:
    run: Any = dict(batch_size=4, gradient_accumulation=2, world_size=2, grad_clip=1.0, precision="auto") | changes
    return zero_config("z.json", content, **run)


def zero(**keys: Any) -> Content:
    return {"zero_optimization": {"stage": 2, **keys}}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_files_need_no_repair(file: Path):
    content = read_zero_config(str(file))
    for world_size in range(1, 9):
        config = complete(content, world_size=world_size)
        assert config.notes == [] and config.values["train_batch_size"] == 8 * world_size
        assert config.precision == ("fp16" if file.stem == "6x32gb" else "bf16")
        for key, value in content.items():
            assert value == "auto" or config.values[key].items() >= value.items()
    name = file.stem
    if name.startswith("zero"):
        assert (config.stage, config.offload_optimizer) == (int(name[4]), name.endswith("offload"))
        assert config.offload_parameters == (name == "zero3_offload")


def test_readme_has_a_row_for_every_file():
    text = (FILES[0].parent / "README.md").read_text()
    for file in FILES:
        assert f"| `{file.name}` |" in text and f"| `scripts/launch/{file.stem}.sh` |" in text


# DeepSpeed's own reading of configurations, each in a world of its size; or why it refuses one.
TAKES = """
import json, sys
from deepspeed.runtime import config
from deepspeed.runtime.config import DeepSpeedConfig

answers = []
for world_size, values in json.load(sys.stdin):
    config.dist.get_rank = lambda: 0
    config.dist.get_world_size = lambda: world_size
    try:
        read = DeepSpeedConfig(values)
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
        continue
    zero = read.zero_config
    answers.append({
        "world_size": read.world_size,
        "batch": [read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps],
        "stage": int(zero.stage),
        "optimizer": bool(zero.offload_optimizer and zero.offload_optimizer.device == "cpu"),
        "parameters": bool(zero.offload_param and zero.offload_param.device == "cpu"),
        "precision": "bf16" if read.bfloat16_config.enabled else "fp16" if read.float16_config.enabled else "fp32",
        "clip": read.gradient_clipping,
    })
print("ANSWER", json.dumps(answers))
"""

# The keys that DeepSpeed looks for at the top, and those of its sections.
ASKS = """
import json
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

class Watched(dict):
    asked = set()
    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)
    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)
    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)
    def keys(self):
        return self

def names(model):
    for name, field in model.model_fields.items():
        if not (field.json_schema_extra or {}).get("deprecated"):
            yield from {name, field.alias or name}

DeepSpeedConfig(Watched(train_batch_size=1, zero_optimization={"stage": 2}))
print("ANSWER", json.dumps({
    "": sorted(Watched.asked - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)),
    "zero_optimization": sorted(names(DeepSpeedZeroConfig)),
    "zero_optimization.offload_optimizer": sorted(names(DeepSpeedZeroOffloadOptimizerConfig)),
    "zero_optimization.offload_param": sorted(names(DeepSpeedZeroOffloadParamConfig)),
    "bf16": sorted(names(DeepSpeedBF16Config)),
    "fp16": sorted(names(DeepSpeedFP16Config)),
}))
"""


def ask_deepspeed(script: str, given: Any = None) -> Any:
    """What `script` answers, in a process of its own: importing DeepSpeed changes the process for good."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(given), env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    answer = [line for line in result.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answer, result.stderr
    return json.loads(answer[0].removeprefix("ANSWER "))


@needs_deepspeed
def test_deepspeed_takes_what_comes_out():
    cases = [(read_zero_config(str(file)), {"world_size": size}) for file in FILES for size in range(1, 9)]
    cases += [
        (content, {"precision": precision}) for content in PLAIN for precision in ("auto", "fp32", "bf16", "fp16")
    ]
    configs = [(changes.get("world_size", 2), complete(content, **changes)) for content, changes in cases]
    answers = ask_deepspeed(TAKES, [(size, config.values) for size, config in configs])
    for (size, config), answer in zip(configs, answers, strict=True):
        assert answer == {
            "world_size": size,
            "batch": [8 * size, 4, 2],
            "stage": config.stage,
            "optimizer": config.offload_optimizer,
            "parameters": config.offload_parameters,
            "precision": config.precision,
            "clip": 1.0,
        }


@needs_deepspeed
def test_deepspeed_would_refuse_what_is_repaired():
    """So that the test above shows something: the same world, with the mistakes that this module is there for."""
    good = complete(zero()).values
    wrong = [
        good | {"train_batch_size": 17},
        good | zero(reduce_bucket_size=0),
        good | zero(reduce_buckets=1),
        good | {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
    ]
    taken, *refused = ask_deepspeed(TAKES, [(2, values) for values in [good, *wrong]])
    assert taken["batch"] == [16, 4, 2]
    for answer, words in zip(
        refused, ("17 != 4 * 2 * 2", "reduce_bucket_size", "reduce_buckets", "bfloat16"), strict=True
    ):
        assert words in answer


@needs_deepspeed
def test_the_keys_are_those_of_deepspeed():
    for section, names in ask_deepspeed(ASKS).items():
        table = KEYS
        for key in section.split(".") if section else []:
            table = table[key]
        # Looked for once the processes have joined.
        more = set() if section else {"data_parallel_size", "sequence_parallel_size"}
        assert set(table) - more == set(names) - set(RENAMED), section


PLAIN: list[Content] = [
    zero(),
    zero() | {"bf16": {"enabled": True, "check_grad_overflow": False}},
    zero() | {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12}, "bf16": {"enabled": False}},
    zero() | {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale_window": "auto"}},
    {
        **zero(stage=3, offload_param={"device": "cpu", "pin_memory": True}, offload_optimizer={"device": "cpu"}),
        "train_batch_size": 12, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2.0,
        "gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "scheduler": {"type": "WarmupLR"},
        "activation_checkpointing": {"partition_activations": True}, "steps_per_print": 10, "zero_force_ds_cpu_optimizer": True,
        "wall_clock_breakdown": True,
    },
    zero(stage=3.0, reduce_bucket_size="auto", stage3_prefetch_bucket_size="auto", sub_group_size=1e9, zero_hpz_partition_size=2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "changes", "notes"),
    [
        (zero(), {}, []),
        (zero() | {"train_batch_size": 16, "gradient_accumulation_steps": 2, "gradient_clipping": 1}, {}, []),
        (
            zero() | {"train_batch_size": 32},
            {},
            ["train_batch_size is 32; 16 is used, as batch_size 4 x gradient_accumulation 2 x 2 processes = 16."],
        ),
        (
            zero() | {"train_batch_size": 9},
            {"world_size": 1},
            ["train_batch_size is 9; 8 is used, as batch_size 4 x gradient_accumulation 2 x 1 process = 8."],
        ),
        (
            zero() | {"train_micro_batch_size_per_gpu": 3},
            {},
            ["train_micro_batch_size_per_gpu is 3; 4 is used, the run's batch_size."],
        ),
        (
            zero() | {"gradient_accumulation_steps": 1},
            {},
            ["gradient_accumulation_steps is 1; 2 is used, the run's gradient_accumulation."],
        ),
        (
            zero() | {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2},
            {},
            [
                "train_micro_batch_size_per_gpu is 3; 4 is used, the run's batch_size.",
                "train_batch_size 16 is no multiple of train_micro_batch_size_per_gpu 3 x gradient_accumulation_steps 2, so that these could fit no number of processes.",
            ],
        ),
        (
            zero() | {"train_batch_size": 16, "gradient_accumulation_steps": 3},
            {"gradient_accumulation": 3},
            [
                "train_batch_size is 16; 24 is used, as batch_size 4 x gradient_accumulation 3 x 2 processes = 24.",
                "train_batch_size 16 is no multiple of gradient_accumulation_steps 3, so that these could fit no number of processes.",
            ],
        ),
        (
            zero() | {"gradient_clipping": 1.0},
            {"grad_clip": 0},
            ["gradient_clipping is 1.0; 0 is used, the run's optimizer.grad_clip."],
        ),
        (
            PLAIN[4] | {"train_batch_size": 16},
            {},
            [
                "optimizer is left out; the run's optimizer.* rules.",
                "scheduler is left out; the run's optimizer.* rules.",
                "activation_checkpointing is left out; the run's activation_checkpointing rules.",
                "wall_clock_breakdown is left out; the run's profile_steps rules.",
                "gradient_clipping is 0.5; 1.0 is used, the run's optimizer.grad_clip.",
                "zero_force_ds_cpu_optimizer is true; false is used, as llmcore's optimizer is PyTorch's, in fp32, and this needs DeepSpeed's own.",
                "steps_per_print is left out; the run's log_interval rules.",
            ],
        ),
        (PLAIN[1], {"precision": "fp32"}, ["bf16.enabled is true; fp32 is used, the run's precision."]),
        (
            PLAIN[2],
            {"precision": "bf16"},
            ["bf16.enabled is false and fp16.enabled is true; bf16 is used, the run's precision."],
        ),
        (
            PLAIN[1],
            {},
            ["bf16.check_grad_overflow is false; true is used, as steps whose gradient is not finite are skipped."],
        ),
        (
            PLAIN[3],
            {},
            [
                'bf16.enabled and fp16.enabled are "auto", as is the run\'s precision; fp32 is used.',
                'fp16.loss_scale_window is "auto"; DeepSpeed\'s defaults are used.',
            ],
        ),
        (PLAIN[3], {"precision": "bf16"}, ['fp16.loss_scale_window is "auto"; DeepSpeed\'s defaults are used.']),
        (zero() | {"fp16": {"enabled": "auto"}}, {"precision": "fp16"}, []),
        (
            PLAIN[5],
            {},
            [
                'zero_optimization.reduce_bucket_size and zero_optimization.stage3_prefetch_bucket_size are "auto"; DeepSpeed\'s defaults are used.'
            ],
        ),
        (
            zero(reduce_bucket_size="auto", allgather_bucket_size="auto", offload_optimizer={"device": "auto"}),
            {},
            [
                "zero_optimization.reduce_bucket_size, zero_optimization.allgather_bucket_size and "
                'zero_optimization.offload_optimizer.device are "auto"; DeepSpeed\'s defaults are used.'
            ],
        ),
    ],
)
def test_notes(content: Content, changes: Content, notes: list[str]):
    assert complete(content, **changes).notes == [f"z.json: {note}" for note in notes]


def test_what_deepspeed_is_given():
    config = complete(PLAIN[4])
    assert (config.stage, config.offload_optimizer, config.offload_parameters, config.precision) == (
        3,
        True,
        True,
        "fp32",
    )
    assert config.values == {
        "zero_optimization": PLAIN[4]["zero_optimization"],
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": module.NEVER,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
    }
    config = complete(PLAIN[3], precision="bf16")
    assert config.values["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config.values["fp16"] == {"enabled": False}
    config = complete(PLAIN[2])
    assert config.precision == "fp16" and config.values["fp16"] == PLAIN[2]["fp16"]
    assert complete(zero() | {"timers": {}}).values["timers"] == {"throughput": {"enabled": False}}


number = st.one_of(st.integers(1, 64), st.integers(1, 64).map(float), st.just("auto"))
numbers = st.fixed_dictionaries(
    {},
    optional={
        "train_batch_size": number,
        "train_micro_batch_size_per_gpu": number,
        "gradient_accumulation_steps": number,
        "gradient_clipping": st.sampled_from(["auto", 0, 0.5, 1, 1.0]),
        "bf16": st.fixed_dictionaries(
            {}, optional={"enabled": st.sampled_from(["auto", True, False]), "check_grad_overflow": st.booleans()}
        ),
        "fp16": st.fixed_dictionaries({}, optional={"enabled": st.sampled_from(["auto", False])}),
        "steps_per_print": st.sampled_from(["auto", 10]),
        "scheduler": st.just({"type": "WarmupLR"}),
        "communication_data_type": st.sampled_from(["auto", "fp32"]),
    },
)
batches = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 16),
        "gradient_accumulation": st.integers(1, 8),
        "world_size": st.integers(1, 8),
        "grad_clip": st.sampled_from([0.0, 0.5, 1.0]),
        "precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
    }
)


def changed(said: Content, used: Content) -> list[str]:
    """The keys of `said` that `used` lacks or has otherwise. What was "auto" may be filled in, but not be missing."""
    keys = []
    for key, value in said.items():
        if isinstance(value, dict) and key in used:
            keys += [f"{key}.{inner}" for inner in changed(value, used[key])]
        elif key not in used or value not in ("auto", used[key]):
            keys.append(key)
    return keys


@given(numbers, batches)
def test_the_batch_is_the_runs_and_every_change_is_noted(said: Content, run: Content):
    before = json.dumps(said)
    config = complete(zero() | said, **run)
    values = config.values
    assert json.dumps(said) == before
    assert (values["train_micro_batch_size_per_gpu"], values["gradient_accumulation_steps"]) == (run["batch_size"], run["gradient_accumulation"])  # fmt: skip
    assert values["train_batch_size"] == (
        values["train_micro_batch_size_per_gpu"] * values["gradient_accumulation_steps"] * run["world_size"]
    )
    assert values["gradient_clipping"] == run["grad_clip"] and isinstance(values["train_batch_size"], int)
    on = [name for name in ("bf16", "fp16") if values.get(name, {}).get("enabled")]
    assert on == ([] if config.precision == "fp32" else [config.precision])
    assert "auto" not in json.dumps(values)

    keys = changed(said, values)
    if run["precision"] == "auto":
        keys += [name for name in ("bf16", "fp16") if said.get(name, {}).get("enabled") == "auto"]
    else:
        assert config.precision == run["precision"]
    if values.get("bf16", {}).get("check_grad_overflow") is False:
        assert config.precision != "bf16"
    assert bool(config.notes) == bool(keys)
    assert all(note.startswith("z.json: ") and note.endswith(".") and "\n" not in note for note in config.notes)


@given(numbers)
def test_a_file_of_numbers_that_fit_no_world_is_called_so(said: Content):
    train, micro, steps = (said.get(key, "auto") for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))  # fmt: skip
    product = math.prod(value for value in (micro, steps) if value != "auto")
    fits = train == "auto" or any(train == product * worlds for worlds in range(1, 65))
    assert any("no number of processes" in note for note in complete(zero() | said).notes) != fits


CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/fast"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "the DeepSpeed configuration FILE holds [1]; allowed is a set of keys and values."),
        (None, "the DeepSpeed configuration FILE holds null; allowed is a set of keys and values."),
        ({}, "zero_optimization.stage in FILE is missing; allowed is one of 1, 2, 3."),
        (zero(stage=0), "zero_optimization.stage in FILE is 0; allowed is one of 1, 2, 3."),
        (zero(stage=True), "zero_optimization.stage in FILE is true; allowed is one of 1, 2, 3."),
        (zero(stage="auto"), 'zero_optimization.stage in FILE is "auto"; allowed is one of 1, 2, 3.'),
        (zero(stage=[2]), "zero_optimization.stage in FILE is [2]; allowed is one of 1, 2, 3."),
        ({"zero_optimization": True}, "zero_optimization in FILE is true; allowed is a set of keys and values."),
        (zero() | {"gradient_cliping": 1}, "unknown key gradient_cliping in FILE; did you mean gradient_clipping?"),
        (zero() | {"stage": 2}, "unknown key stage in FILE; did you mean zero_optimization.stage?"),
        (zero() | {"offload_optimizer": CPU}, "unknown key offload_optimizer in FILE; did you mean zero_optimization.offload_optimizer?"),
        (zero() | {"bfloat16": {"enabled": True}}, "unknown key bfloat16 in FILE; did you mean bf16?"),
        (zero() | {"xyz": 1}, "unknown key xyz in FILE; allowed are train_batch_size, train_micro_batch_size_per_gpu, "),
        (zero(reduce_bucket=1), "unknown key zero_optimization.reduce_bucket in FILE; did you mean zero_optimization.reduce_bucket_size?"),
        (zero(cpu_offload=True), "unknown key zero_optimization.cpu_offload in FILE; did you mean zero_optimization.offload_optimizer?"),
        (zero() | {"fp16": {"xyz": 1}}, "unknown key fp16.xyz in FILE; did you mean"),
        (zero(offload_optimizer={"qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq": 1}), "in FILE; allowed are zero_optimization.offload_optimizer.device, "),
        (zero(overlap_comm="yes"), 'zero_optimization.overlap_comm in FILE is "yes"; allowed is true or false.'),
        (zero(overlap_comm=None), "zero_optimization.overlap_comm in FILE is null; allowed is true or false."),
        (zero(reduce_bucket_size="5e8"), 'zero_optimization.reduce_bucket_size in FILE is "5e8"; allowed is a whole number of at least 1.'),
        (zero(allgather_bucket_size=1.5), "zero_optimization.allgather_bucket_size in FILE is 1.5; allowed is an even number of at least 2."),
        (zero(allgather_bucket_size=True), "zero_optimization.allgather_bucket_size in FILE is true; allowed is an even number of at least 2."),
        (zero(reduce_bucket_size=1e30), "zero_optimization.reduce_bucket_size in FILE is 1e+30; allowed is a whole number of at least 1, below 2^63."),
        (zero() | {"train_batch_size": 10**400}, "; allowed is a whole number of at least 1, below 2^63."),
        (zero() | {"fp16": {"initial_scale_power": 10000}}, "fp16.initial_scale_power in FILE is 10000; allowed is a whole number from 0 to 32."),
        (zero() | {"prescale_gradients": True}, "prescale_gradients in FILE is true; allowed is false, as the gradients are added up, then divided."),
        (zero() | {"new\nline": 1}, "unknown key 'new\\nline' in FILE; "),
        (zero() | {"data_types": {"keep_in_fp32_modules": 1}}, "data_types.keep_in_fp32_modules in FILE cannot be used, as the model is of one type; leave it out."),
        (zero(offload_optimizer="cpu"), 'zero_optimization.offload_optimizer in FILE is "cpu"; allowed is a set of keys and values.'),
        (zero(offload_optimizer={"device": "gpu"}), 'zero_optimization.offload_optimizer.device in FILE is "gpu"; allowed is one of none, cpu, nvme.'),
        (zero(offload_optimizer=NVME), "zero_optimization.offload_optimizer.device in FILE is nvme, which llmcore's checkpoints do not hold; allowed is one of none, cpu."),
        (zero(stage=3, offload_param=NVME), "zero_optimization.offload_param.device in FILE is nvme, which"),
        (zero(offload_param=CPU), "zero_optimization.offload_param.device in FILE is cpu, but stage 2 keeps all parameters on every GPU; allowed is none, or stage 3."),
        (zero(offload_optimizer={"ratio": 0.5}), "zero_optimization.offload_optimizer.ratio in FILE is 0.5; allowed is 1, as llmcore's optimizer is PyTorch's"),
        (zero(zenflow={}), "zero_optimization.zenflow in FILE cannot be used, as llmcore's optimizer is PyTorch's, in fp32, and this needs DeepSpeed's own; leave it out."),
        (zero(compute_grad_norm=False), "zero_optimization.compute_grad_norm in FILE is false; allowed is true, as llmcore clips and logs the gradient's norm."),
        (zero(zero_hpz_partition_size=3), "zero_optimization.zero_hpz_partition_size in FILE is 3; allowed is a divisor of the number of processes, 8."),
        (zero() | {"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel in FILE cannot be used, as llmcore's processes are data parallel only; leave it out."),
        (zero() | {"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op in FILE is "sum"; allowed is "mean", as the loss is the mean over all processes.'),
        (zero() | {"train_batch_size": 0}, "train_batch_size in FILE is 0; allowed is a whole number of at least 1."),
        (zero() | {"train_batch_size": 2.5}, "train_batch_size in FILE is 2.5; allowed is a whole number of at least 1."),
        (zero() | {"gradient_accumulation_steps": "2"}, 'gradient_accumulation_steps in FILE is "2"; allowed is a whole number of at least 1.'),
        (zero() | {"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu in FILE is true; allowed is a whole number of at least 1."),
        (zero() | {"gradient_clipping": -1}, "gradient_clipping in FILE is -1; allowed is a number of at least 0."),
        (zero() | {"gradient_clipping": math.nan}, "gradient_clipping in FILE is NaN; allowed is a number of at least 0."),
        (zero() | {"optimizer": "AdamW"}, 'optimizer in FILE is "AdamW"; allowed is a set of keys and values.'),
        (zero() | {"communication_data_type": "int8"}, 'communication_data_type in FILE is "int8"; allowed is one of fp32, fp16, bf16.'),
        (zero() | {"log_level": 1}, "log_level in FILE is 1; allowed is a text."),
        (zero() | {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled and fp16.enabled in FILE are both true; allowed is one of them."),
    ],
)  # fmt: skip
def test_wrong_content(content: Any, words: str, tmp_path: Path):
    file = tmp_path / "z.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        zero_config(
            str(file), read_zero_config(str(file)),
            batch_size=1, gradient_accumulation=1, world_size=8, grad_clip=1.0, precision="auto",
        )  # fmt: skip
    sentence = str(error.value)
    assert words.replace("FILE", str(file)) in sentence
    assert sentence.count("\n") == 0 and sentence[-1] in ".?"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1,\n "b" 2}', "the DeepSpeed configuration FILE is not JSON at line 2, column 6: Expecting ':' delimiter."),
        (b"", "the DeepSpeed configuration FILE is not JSON at line 1, column 1: Expecting value."),
        (b"\xff", "the DeepSpeed configuration FILE cannot be read: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "the DeepSpeed configuration FILE cannot be read: "),
        (b'{"bf16": {"enabled": true, "enabled": false}}', "the DeepSpeed configuration FILE has the key enabled twice; allowed is once."),
        (b'{"train_batch_size": 1' + b"0" * 5000 + b"}", "the DeepSpeed configuration FILE cannot be read: Exceeds the limit"),
    ],
    ids=["no JSON", "empty", "no UTF-8", "deep", "twice", "long number"],
)  # fmt: skip
def test_files_that_cannot_be_read(text: bytes, words: str, tmp_path: Path):
    file = tmp_path / "z.json"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        read_zero_config(str(file))
    assert words.replace("FILE", str(file)) in str(error.value) and str(error.value).count("\n") == 0


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match="^the DeepSpeed configuration nowhere.json does not exist.$"):
        read_zero_config("nowhere.json")
    for file in (str(tmp_path), "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read: "):
            read_zero_config(file)


def test_huge_numbers_do_not_overflow():
    config = complete(zero() | {"train_batch_size": 2**62, "train_micro_batch_size_per_gpu": 3.0})
    assert config.values["train_batch_size"] == 16 and len(config.notes) == 3


def test_every_suggestion_is_a_key():
    for name in RENAMED.values():
        table: Any = KEYS
        for key in name.split("."):
            table = table[key]
        assert not isinstance(table, Fixed)


def test_deepspeed_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^engine is deepspeed, but .*: pip install 'llmcore\[deepspeed\]'.$"):
        require_deepspeed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    require_deepspeed()
