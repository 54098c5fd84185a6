"""A DeepSpeed configuration file, checked and completed with the run's own numbers.

DeepSpeed ignores top-level keys that it does not know, and ends with an assertion where numbers do not fit each other.
Here whatever is wrong becomes a ConfigError of one sentence; where file and run differ, the run rules, with a note.
"""

import copy
import difflib
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmcore.train.config import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]


class Fixed(NamedTuple):
    """A key that DeepSpeed has and llmcore needs at one value; None is to leave it out."""

    value: Any
    reason: str


FLAG, TEXT, SECTION = "true or false", "a text", "a set of keys and values"
FROM_0, FROM_1, NUMBER = "a whole number of at least 0", "a whole number of at least 1", "a number of at least 0"
EVEN = "an even number of at least 2"
LIMIT = 2**63
DTYPES = ("fp32", "fp16", "bf16")
OTHER_PARALLELISM = Fixed(None, "llmcore's processes are data parallel only")
OTHER_OPTIMIZER = "llmcore's optimizer is PyTorch's, in fp32, and this needs DeepSpeed's own"

# The keys of DeepSpeed 0.19.8, but for those that it calls deprecated. None is not checked.
Table = dict[str, Any]
STAGE_3_KEYS: Table = {
    "prefetch_bucket_size": FROM_0,
    "param_persistence_threshold": FROM_0,
    "model_persistence_threshold": FROM_0,
    "max_live_parameters": FROM_0,
    "max_reuse_distance": FROM_0,
    "gather_16bit_weights_on_model_save": FLAG,
    "module_granularity_threshold": FROM_0,
    "use_all_reduce_for_fetch_params": FLAG,
    "allgather_sequential": FLAG,
}
OFFLOAD_KEYS: Table = {"device": ("none", "cpu", "nvme"), "nvme_path": TEXT, "buffer_count": FROM_0, "pin_memory": FLAG}
ZERO_KEYS: Table = {
    "stage": None,
    "contiguous_gradients": FLAG,
    "reduce_scatter": FLAG,
    "reduce_bucket_size": FROM_1,
    "use_multi_rank_bucket_allreduce": FLAG,
    "allgather_partitions": FLAG,
    "allgather_bucket_size": EVEN,
    "overlap_comm": FLAG,
    "compute_grad_norm": Fixed(True, "llmcore clips and logs the gradient's norm"),
    "load_from_fp32_weights": FLAG,
    "elastic_checkpoint": FLAG,
    "offload_param": {**OFFLOAD_KEYS, "buffer_size": FROM_0, "max_in_cpu": FROM_0},
    "offload_optimizer": {
        **OFFLOAD_KEYS,
        "pipeline_read": FLAG,
        "pipeline_write": FLAG,
        "fast_init": FLAG,
        "ratio": Fixed(1, OTHER_OPTIMIZER),
        "super_offload": Fixed(False, OTHER_OPTIMIZER),
        "cpuadam_cores_perc": NUMBER,
    },
    "zenflow": Fixed(None, OTHER_OPTIMIZER),
    "sub_group_size": FROM_0,
    **STAGE_3_KEYS,
    **{f"stage3_{key}": kind for key, kind in STAGE_3_KEYS.items()},
    "ignore_unused_parameters": FLAG,
    "legacy_stage1": Fixed(False, "DeepSpeed no longer has it"),
    "round_robin_gradients": FLAG,
    "parameter_alignment": FLAG,
    "zero_hpz_partition_size": FROM_1,
    "zero_quantized_weights": FLAG,
    "zero_quantized_nontrainable_weights": FLAG,
    "zero_quantized_gradients": FLAG,
    "memory_efficient_linear": FLAG,
    "pipeline_loading_checkpoint": FLAG,
    "override_module_apply": FLAG,
    "log_trace_cache_warnings": FLAG,
    "enable_sanity_checks": FLAG,
    "save_muon_momentum_buffer_in_memory": FLAG,
    "leaf_module": SECTION,
}
KEYS: Table = {
    "train_batch_size": FROM_1,
    "train_micro_batch_size_per_gpu": FROM_1,
    "gradient_accumulation_steps": FROM_1,
    "gradient_clipping": NUMBER,
    "zero_optimization": ZERO_KEYS,
    "bf16": {
        "enabled": FLAG,
        "immediate_grad_update": FLAG,
        "check_grad_overflow": FLAG,
        "bf16_master_weights_and_grads": Fixed(False, OTHER_OPTIMIZER),
        "bf16_optimizer_states": Fixed(False, OTHER_OPTIMIZER),
    },
    "fp16": {
        "enabled": FLAG,
        "auto_cast": FLAG,
        "loss_scale": NUMBER,
        "initial_scale_power": range(33),
        "loss_scale_window": FROM_1,
        "hysteresis": FROM_0,
        "consecutive_hysteresis": FLAG,
        "min_loss_scale": FROM_1,
        "fp16_master_weights_and_grads": Fixed(False, OTHER_OPTIMIZER),
    },
    "data_types": {
        "grad_accum_dtype": DTYPES,
        "param_dtype": Fixed(None, "bf16.enabled and fp16.enabled say it"),
        "buffer_dtype": Fixed(None, "bf16.enabled and fp16.enabled say it"),
        "keep_in_fp32_modules": Fixed(None, "the model is of one type"),
    },
    "communication_data_type": DTYPES,
    "prescale_gradients": Fixed(False, "the gradients are added up, then divided"),
    "gradient_predivide_factor": Fixed(1, "the gradients are added up, then divided"),
    "gradient_allreduce_op": Fixed("mean", "the loss is the mean over all processes"),
    "managed_gradient_accumulation": Fixed(True, "gradient_accumulation says when a step is made"),
    "optimizer": SECTION,
    "scheduler": SECTION,
    "activation_checkpointing": SECTION,
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
    "steps_per_print": None,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "disable_allgather": FLAG,
    "disable_python_gc": FLAG,
    "dataloader_drop_last": FLAG,
    "vocabulary_size": FROM_1,
    "log_level": TEXT,
    "aio": SECTION,
    "checkpoint": SECTION,
    "datastates_ckpt": SECTION,
    "comms_logger": SECTION,
    "flops_profiler": SECTION,
    "timers": SECTION,
    "tensorboard": SECTION,
    "wandb": SECTION,
    "csv_monitor": SECTION,
    "comet": SECTION,
    "torch_autocast": Fixed(None, "bf16.enabled and fp16.enabled set the precision"),
    "data_efficiency": Fixed(None, "llmcore chooses the batches"),
    "autotuning": Fixed(None, "llmcore chooses the batches"),
    "compile": Fixed(None, "llmcore does not use DeepSpeed's compiler"),
    "hybrid_engine": Fixed(None, "llmcore generates without it"),
    "weight_quantization": Fixed(None, "it is for inference"),
    "sequence_parallel_size": OTHER_PARALLELISM,
    "data_parallel_size": OTHER_PARALLELISM,
    "seq_parallel_communication_data_type": OTHER_PARALLELISM,
    "tensor_parallel": OTHER_PARALLELISM,
    "expert_parallel": OTHER_PARALLELISM,
    "use_data_before_expert_parallelism": OTHER_PARALLELISM,
    "pipeline": OTHER_PARALLELISM,
}
RENAMED = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "zero_optimization.offload_optimizer.pin_memory",
}
RULED_BY = {
    "optimizer": "the run's optimizer.* rules",
    "scheduler": "the run's optimizer.* rules",
    "activation_checkpointing": "the run's activation_checkpointing rules",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "the run's log.* rules"),
    **dict.fromkeys(
        ("wall_clock_breakdown", "memory_breakdown", "flops_profiler", "comms_logger", "timers"),
        "the run's profile_steps rules",
    ),
    **dict.fromkeys(("dump_state", "log_level"), "llmcore lets DeepSpeed tell of errors only"),
}
NEVER = 2**31 - 1  # steps; DeepSpeed before 0.17 prints every 10 steps where it is told nothing


@dataclass(frozen=True)
class ZeroConfig:
    """What deepspeed.initialize is given, and what llmcore needs to know of it."""

    values: dict[str, Any]
    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    precision: Precision
    notes: list[str]
    """A sentence for everything in the file that was repaired."""


def require_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("engine is deepspeed, but deepspeed is not installed: pip install 'llmcore[deepspeed]'.")


def read_zero_config(file: str) -> dict[str, Any]:
    """The content of `file`, whose keys and values DeepSpeed and llmcore can use. Raises ConfigError."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"the DeepSpeed configuration {file} does not exist.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"the DeepSpeed configuration {file} cannot be read: {error}.") from error

    twice: list[str] = []

    def section(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(key for key in keys if keys.count(key) > 1)
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=section)
    except json.JSONDecodeError as error:
        place = f"at line {error.lineno}, column {error.colno}"
        raise ConfigError(f"the DeepSpeed configuration {file} is not JSON {place}: {error.msg}.") from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"the DeepSpeed configuration {file} cannot be read: {error}.") from error
    if twice:
        raise ConfigError(f"the DeepSpeed configuration {file} has the key {twice[0]} twice; allowed is once.")
    _check(file, content)
    return content


def zero_config(
    file: str,
    content: dict[str, Any],
    *,
    batch_size: int,
    gradient_accumulation: int,
    world_size: int,
    grad_clip: float,
    precision: Literal["auto", "fp32", "bf16", "fp16"],
) -> ZeroConfig:
    """The configuration `content` of `file` for a run of `world_size` processes, each of which passes `batch_size`
    sequences forward at a time. Raises ConfigError."""
    _check(file, content)
    values, notes = copy.deepcopy(content), []
    for key, reason in RULED_BY.items():
        if values.pop(key, None) not in (None, False, "auto", {}, {"enabled": False}):
            notes.append(f"{file}: {key} is left out; {reason}.")
    notes += _set_batch(file, values, batch_size, gradient_accumulation, world_size)
    if _differs(values, "gradient_clipping", grad_clip):
        said = values["gradient_clipping"]
        notes.append(f"{file}: gradient_clipping is {said}; {grad_clip} is used, the run's optimizer.grad_clip.")
    values["gradient_clipping"] = float(grad_clip)
    used, precision_notes = _set_precision(file, values, precision)
    notes += precision_notes
    if _differs(values, "zero_force_ds_cpu_optimizer", False):
        notes.append(f"{file}: zero_force_ds_cpu_optimizer is true; false is used, as {OTHER_OPTIMIZER}.")
    values["zero_force_ds_cpu_optimizer"] = False
    if _differs(values, "steps_per_print", NEVER):
        notes.append(f"{file}: steps_per_print is left out; the run's log_interval rules.")
    values["steps_per_print"] = NEVER
    # DeepSpeed's own throughput, which nobody would see, waits for the GPU twice in every forward pass.
    values["timers"] = {"throughput": {"enabled": False}}
    dropped = _drop_autos(values, KEYS)
    if dropped:
        notes.append(f'{file}: {_are(dropped)} "auto"; DeepSpeed\'s defaults are used.')

    zero = values["zero_optimization"]
    zero["stage"] = int(zero["stage"])
    group = zero.get("zero_hpz_partition_size", 1)
    if world_size % min(group, world_size):
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size in {file} is {group}; allowed is a divisor of the number of "
            f"processes, {world_size}."
        )
    return ZeroConfig(
        values=values,
        stage=zero["stage"],
        offload_optimizer=_device(zero, "offload_optimizer") == "cpu",
        offload_parameters=_device(zero, "offload_param") == "cpu",
        precision=used,
        notes=notes,
    )


def _check(file: str, content: Any) -> None:
    if not isinstance(content, dict):
        given = json.dumps(content)
        raise ConfigError(f"the DeepSpeed configuration {file} holds {given}; allowed is {SECTION}.")
    _check_section(file, content, KEYS, "")
    if _enabled(content, "bf16") and _enabled(content, "fp16"):
        raise ConfigError(f"bf16.enabled and fp16.enabled in {file} are both true; allowed is one of them.")
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        given = "missing" if stage is None else json.dumps(stage)
        raise ConfigError(f"zero_optimization.stage in {file} is {given}; allowed is one of 1, 2, 3.")
    for key in ("offload_optimizer", "offload_param"):
        if _device(zero, key) == "nvme":
            raise ConfigError(
                f"zero_optimization.{key}.device in {file} is nvme, which llmcore's checkpoints do not hold; "
                "allowed is one of none, cpu."
            )
    if _device(zero, "offload_param") == "cpu" and stage != 3:
        raise ConfigError(
            f"zero_optimization.offload_param.device in {file} is cpu, but stage {stage} keeps all parameters on every "
            "GPU; allowed is none, or stage 3."
        )


def _check_section(file: str, section: dict[str, Any], table: Table, prefix: str) -> None:
    for key, value in section.items():
        name = prefix + (key if key.isprintable() else ascii(key))
        if key not in table:
            raise ConfigError(f"unknown key {name} in {file}{_did_you_mean(name, table, prefix)}")
        kind = table[key]
        if isinstance(kind, dict) and isinstance(value, dict):
            _check_section(file, value, kind, f"{name}.")
        elif isinstance(kind, Fixed) and kind.value is None:
            raise ConfigError(f"{name} in {file} cannot be used, as {kind.reason}; leave it out.")
        elif not _fits(value, kind):
            allowed = SECTION if isinstance(kind, dict) else kind
            if isinstance(kind, Fixed):
                allowed = f"{json.dumps(kind.value)}, as {kind.reason}"
            elif isinstance(kind, tuple):
                allowed = f"one of {', '.join(kind)}"
            elif isinstance(kind, range):
                allowed = f"a whole number from {kind.start} to {kind.stop - 1}"
            elif _is_number(value) and abs(value) >= LIMIT:
                allowed += ", below 2^63"
            raise ConfigError(f"{name} in {file} is {json.dumps(value)}; allowed is {allowed}.")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, Fixed):
        return value == "auto" or (value == kind.value and isinstance(value, bool) == isinstance(kind.value, bool))
    if isinstance(kind, dict) or kind == SECTION:
        return isinstance(value, dict)
    if kind is None or value == "auto":
        return True
    if isinstance(kind, tuple):
        return value in kind
    if kind == FLAG:
        return isinstance(value, bool)
    if kind == TEXT:
        return isinstance(value, str)
    if not _is_number(value) or not abs(value) < LIMIT:  # which no NaN is
        return False
    if kind == NUMBER:
        return value >= 0
    if isinstance(kind, range):
        return value in kind
    if kind == EVEN:
        return value >= 2 and value % 2 == 0
    return value == int(value) and value >= (1 if kind == FROM_1 else 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _did_you_mean(name: str, table: Table, prefix: str) -> str:
    known = _names(KEYS, "")
    near = [RENAMED[name]] if name in RENAMED else [key for key in known if key.split(".")[-1] == name.split(".")[-1]]
    near = near or difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; allowed are {', '.join(key for key in _names(table, prefix) if key.count('.') == prefix.count('.'))}."


def _names(table: Table, prefix: str) -> list[str]:
    """The keys that can be used, with dots: train_batch_size, ..., zero_optimization.stage, ..."""
    names = []
    for key, kind in table.items():
        if not (isinstance(kind, Fixed) and kind.value is None):
            names += [prefix + key, *(_names(kind, f"{prefix}{key}.") if isinstance(kind, dict) else [])]
    return names


def _set_batch(
    file: str, values: dict[str, Any], batch_size: int, gradient_accumulation: int, world_size: int
) -> list[str]:
    """Fill in DeepSpeed's three numbers; the notes on those that were others."""
    total = batch_size * gradient_accumulation * world_size
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    product = f"batch_size {batch_size} x gradient_accumulation {gradient_accumulation} x {processes} = {total}"
    said = {}
    notes = []
    for key, number, reason in (
        ("train_batch_size", total, f"as {product}"),
        ("train_micro_batch_size_per_gpu", batch_size, "the run's batch_size"),
        ("gradient_accumulation_steps", gradient_accumulation, "the run's gradient_accumulation"),
    ):
        if values.get(key, "auto") != "auto":
            said[key] = int(values[key])
        if _differs(values, key, number):
            notes.append(f"{file}: {key} is {values[key]}; {number} is used, {reason}.")
        values[key] = number
    factors = {key: number for key, number in said.items() if key != "train_batch_size"}
    if "train_batch_size" in said and said["train_batch_size"] % math.prod(factors.values()):
        product = " x ".join(f"{key} {number}" for key, number in factors.items())
        notes.append(
            f"{file}: train_batch_size {said['train_batch_size']} is no multiple of {product}, so that these could fit "
            "no number of processes."
        )
    return notes


def _set_precision(
    file: str, values: dict[str, Any], precision: Literal["auto", "fp32", "bf16", "fp16"]
) -> tuple[Precision, list[str]]:
    """Enable `precision` and nothing else, or what the file enables where that is auto; with the notes on it."""
    notes = []
    used: Precision
    said = {name: values[name]["enabled"] for name in ("bf16", "fp16") if "enabled" in values.get(name, {})}
    if precision == "auto":
        used = "bf16" if said.get("bf16") is True else "fp16" if said.get("fp16") is True else "fp32"
        unsaid = [f"{name}.enabled" for name, enabled in said.items() if enabled == "auto"]
        if unsaid:
            notes.append(f'{file}: {_are(unsaid)} "auto", as is the run\'s precision; {used} is used.')
    else:
        used = precision
        wrong = [
            f"{name}.enabled is {json.dumps(enabled)}"
            for name, enabled in said.items()
            if enabled != "auto" and enabled != (name == used)
        ]
        if wrong:
            notes.append(f"{file}: {_listed(wrong)}; {used} is used, the run's precision.")
    for name in ("bf16", "fp16"):
        if name == used:
            values.setdefault(name, {})["enabled"] = True
        elif name in values:
            values[name]["enabled"] = False
    if used == "bf16":
        if _differs(values["bf16"], "check_grad_overflow", True):
            notes.append(
                f"{file}: bf16.check_grad_overflow is false; true is used, as steps whose gradient is not finite are "
                "skipped."
            )
        values["bf16"]["check_grad_overflow"] = True
    return used, notes


def _drop_autos(section: dict[str, Any], table: Table, prefix: str = "") -> list[str]:
    """Take out every "auto", as Hugging Face's files have; their names."""
    dropped = []
    for key, value in list(section.items()):
        if isinstance(table[key], dict):
            dropped += _drop_autos(value, table[key], f"{prefix}{key}.")
        elif value == "auto" and table[key] is not None:
            del section[key]
            dropped.append(prefix + key)
    return dropped


def _differs(section: dict[str, Any], key: str, value: Any) -> bool:
    """Whether the file says another value than `value`; "auto" says nothing."""
    return section.get(key, "auto") not in ("auto", value)


def _enabled(content: dict[str, Any], name: str) -> bool:
    return content.get(name, {}).get("enabled") is True


def _device(zero: dict[str, Any], key: str) -> str:
    return zero.get(key, {}).get("device", "none")


def _are(names: list[str]) -> str:
    return f"{_listed(names)} {'is' if len(names) == 1 else 'are'}"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
