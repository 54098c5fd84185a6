"""What a training run can be told: its keys, their defaults, units and limits. parse.py fills them in."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from llmcore.models import ModelConfig
from llmcore.models.config import OF_EXPERTS


class ConfigError(ValueError):
    """A key or value that is not allowed; the message names it, what was given and what is allowed."""


@dataclass
class DataConfig:
    """The text: byte-level tokens, vocabulary 256."""

    train: str | None = None
    """Text file or folder to train on; null is the standard library of this Python, about 10 MB."""
    valid: str | None = None
    """Text file or folder to validate on; null holds out about 5 % of data.train (of a folder, whole files)."""
    workers: int = 0
    """Threads that prepare batches ahead; 0 prepares each when it is needed."""


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule: the learning rate rises linearly, then follows `schedule` over the run."""

    kind: Literal["adamw", "adam", "muon"] = "adamw"
    """AdamW; Adam, whose decay is part of the gradient; or Muon for the layers' matrices, each expert's on its own, and
    AdamW for the rest: embeddings, the output layer, routers, vectors."""
    lr: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "polynomial", "constant", "wsd"] = "cosine"
    """How it falls: wsd (warm-up, stable, decay) is constant until the last decay_ratio of the run, then linear."""
    final_lr_ratio: float = 0.02
    """Learning rate at the end, as a share of the peak; constant ignores it."""
    power: float = 2.0
    """Exponent of the polynomial schedule; 1 is linear."""
    decay_ratio: float = 0.2
    """Share of the run in which wsd falls."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings; vectors have none."""
    beta1: float = 0.9
    """Decay of the gradient's running mean, per step; also Muon's momentum."""
    beta2: float = 0.98
    """Decay of the squared gradient's running mean, per step."""
    grad_clip: float = 1.0
    """Largest norm of all gradients together; 0 leaves them as they are."""


@dataclass
class LogConfig:
    """Where the figures go besides the run's log.jsonl."""

    tensorboard: bool = False
    """Event files in the run's folder tensorboard."""
    wandb: bool = False
    """Weights & Biases; WANDB_MODE=offline keeps it on this machine."""
    wandb_project: str = "llmcore"
    """The project there."""
    wandb_name: str | None = None
    """The run's name there; null is the name of its folder."""


@dataclass
class SampleConfig:
    """The text generated at the end."""

    prompt: str = "def "
    """Text to continue."""
    tokens: int = 400
    """Tokens to generate; 0 generates nothing."""
    temperature: float = 0.8
    """Above 1 is wilder, below 1 tamer, 0 always takes the likeliest token."""
    top_k: int | None = 50
    """Draw among this many likeliest tokens only; null is all."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability only; null is all."""


@dataclass
class TrainConfig:
    """The run."""

    preset: str = "tiny"
    """Model preset: tiny, tiny_mamba, tiny_mamba2, tiny_hybrid, tiny_moe, or a larger one of llmcore.models.PRESETS."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the preset to change, such as --model.num_hidden_layers 6; llmcore.models.ModelConfig explains them."""
    engine: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    """Who shares the work: one process; DDP, each with a copy of the model; DeepSpeed, which shards it (ZeRO). Auto is
    deepspeed where `deepspeed` names a file, ddp for several processes, single for one."""
    deepspeed: str | None = None
    """DeepSpeed's JSON file, such as configs/deepspeed/zero2.json."""
    batch_size: int = 8
    """Sequences per device in a forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per step, whose gradients add up: a step takes batch_size * gradient_accumulation sequences on
    each device."""
    activation_checkpointing: int | Literal["all"] = 0
    """Layers, from the first, that compute their activations again in the backward pass instead of keeping them."""
    seq_len: int = 256
    """Tokens per sequence."""
    max_steps: int | None = 1500
    """Stop after this many steps; null is no limit."""
    epochs: float | None = None
    """Stop after this many passes over the training text, instead of after max_steps."""
    max_seconds: float | None = None
    """Stop after this many seconds of training, validations and checkpoints aside; null is no limit. The schedule
    follows whichever limit is nearer; where that is the time, a run cannot be repeated exactly."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the matrix products; the weights that are trained are fp32. Auto is bf16 where the processor gains
    from it, and under DeepSpeed what its file says. fp16 scales the loss."""
    deterministic: bool = False
    """The same bits from every run on a GPU too, at some cost; CPUs give them anyway."""
    num_gpus: int | None = None
    """Start this many processes, one per GPU (on the CPU where there is no GPU). Null is one, or torchrun's number."""
    seed: int = 0
    """Of the weights, the batches and the sample."""
    log_interval: int = 10
    """Steps between two lines of the log."""
    profile_steps: int = 0
    """Profile so many steps, after a few to warm up: a trace and a table of operations in the run's folder profile."""
    eval_interval: int = 250
    """Steps between two validations; 0 validates at the end only."""
    eval_tokens: int = 65536
    """Held-out tokens in a validation."""
    final_eval_tokens: int = 524288
    """Held-out tokens in the last validation."""
    patience: int | None = None
    """Stop when this many validations in a row are no better than the best before them; null never does."""
    max_skipped: int = 10
    """Stop after this many steps in a row whose gradient is not finite; such steps are not made, and counted."""
    checkpoint_interval: int = 500
    """Steps between two checkpoints; 0 saves at the end, and after a validation that is the best so far, only."""
    keep_checkpoints: int | None = 3
    """Keep this many of the newest checkpoints, and the best; null keeps all."""
    ema_decay: float = 0.0
    """Per step, of an average of the weights, which is then what is validated and sampled from; 0 keeps none."""
    out_dir: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Name of this run's folder in out_dir, which must not exist yet; null is the preset, the date and the time."""
    resume: str | None = None
    """Go on with a run's folder, from one of its checkpoints in a new folder, or (auto) with the newest run."""
    dry_run: bool = False
    """Check everything, describe the run, train nothing and write nothing."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> None:
        """Raise a ConfigError if a value is out of its range."""
        for name, value, low, high in (
            ("batch_size", self.batch_size, 1, 2**24),
            ("gradient_accumulation", self.gradient_accumulation, 1, 2**24),
            ("profile_steps", self.profile_steps, 0, None),
            ("data.workers", self.data.workers, 0, 64),
            ("seq_len", self.seq_len, 1, 2**24),
            ("max_steps", self.max_steps, 1, None),
            ("epochs", self.epochs, 0, 1_000_000),
            ("max_seconds", self.max_seconds, 1, None),
            ("num_gpus", self.num_gpus, 1, 256),
            ("seed", self.seed, 0, 2**63 - 1),
            ("log_interval", self.log_interval, 1, None),
            ("eval_interval", self.eval_interval, 0, None),
            ("eval_tokens", self.eval_tokens, 1, None),
            ("final_eval_tokens", self.final_eval_tokens, 1, None),
            ("patience", self.patience, 1, None),
            ("max_skipped", self.max_skipped, 1, None),
            ("checkpoint_interval", self.checkpoint_interval, 0, None),
            ("keep_checkpoints", self.keep_checkpoints, 1, None),
            ("ema_decay", self.ema_decay, 0, 0.999999),
            ("optimizer.lr", self.optimizer.lr, 0, None),
            ("optimizer.final_lr_ratio", self.optimizer.final_lr_ratio, 0, 1),
            ("optimizer.power", self.optimizer.power, 0, None),
            ("optimizer.decay_ratio", self.optimizer.decay_ratio, 0, 1),
            ("optimizer.warmup_steps", self.optimizer.warmup_steps, 0, None),
            ("optimizer.weight_decay", self.optimizer.weight_decay, 0, None),
            ("optimizer.beta1", self.optimizer.beta1, 0, 0.99999),
            ("optimizer.beta2", self.optimizer.beta2, 0, 0.99999),
            ("optimizer.grad_clip", self.optimizer.grad_clip, 0, None),
            ("sample.tokens", self.sample.tokens, 0, None),
            ("sample.temperature", self.sample.temperature, 0, None),
            ("sample.top_k", self.sample.top_k, 1, None),
            ("sample.top_p", self.sample.top_p, 0, 1),
        ):
            if value is None:
                continue
            if not low <= value <= (math.inf if high is None else high) or value == math.inf:
                allowed = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ConfigError(f"{name} is {value}; allowed is {allowed}.")
        for name, text in (("deepspeed", self.deepspeed), ("resume", self.resume)):
            if text == "":
                raise ConfigError(f"{name} is empty; give it a value, or leave it out.")
        if self.max_steps is None and self.epochs is None and self.max_seconds is None:
            raise ConfigError(
                "max_steps, epochs and max_seconds are all null; at least one of them must limit the run."
            )
        if self.epochs == 0:
            raise ConfigError("epochs is 0; allowed is more than 0.")
        if self.deepspeed is not None and self.engine not in ("auto", "deepspeed"):
            raise ConfigError(
                f"engine is {self.engine}, but deepspeed names {self.deepspeed}; leave one of them out, or give "
                "--engine deepspeed."
            )
        if self.engine == "deepspeed" and self.deepspeed is None:
            raise ConfigError(
                "engine is deepspeed, but deepspeed names no file; ready ones are in configs/deepspeed, such as "
                "--deepspeed configs/deepspeed/zero2.json."
            )
        if isinstance(self.activation_checkpointing, int) and self.activation_checkpointing < 0:
            raise ConfigError(
                f"activation_checkpointing is {self.activation_checkpointing}; allowed is at least 0, or all."
            )
        if self.patience is not None and not self.eval_interval:
            raise ConfigError(f"patience is {self.patience}, but eval_interval is 0, so that nothing is validated.")
        if self.sample.top_p == 0:
            raise ConfigError("sample.top_p is 0; allowed is more than 0, up to 1.")
        for name, text in (
            ("sample.prompt", self.sample.prompt),
            ("data.train", self.data.train),
            ("data.valid", self.data.valid),
            ("out_dir", self.out_dir),
            ("resume", self.resume),
            ("deepspeed", self.deepspeed),
        ):
            if text is not None and not _is_utf8(text):
                raise ConfigError(f"{name} is {ascii(text)}; allowed is text that UTF-8 can encode.")
        if not self.sample.prompt and self.sample.tokens:
            raise ConfigError("sample.prompt is empty; a sample needs at least one character to continue.")

    def global_batch(self, world_size: int) -> int:
        """Sequences in a step, over all processes."""
        return self.batch_size * self.gradient_accumulation * world_size

    def steps(self, train_tokens: int, world_size: int) -> int | None:
        """The limit in steps, of a text of so many tokens."""
        if self.epochs is None:
            return self.max_steps
        return math.ceil(self.epochs * train_tokens / (self.global_batch(world_size) * self.seq_len))

    def same_batch(self, other: dict[str, Any] | None) -> bool:
        """Whether each device takes what it took by another configuration."""
        return other is not None and all(
            getattr(self, name) == other.get(name) for name in ("batch_size", "gradient_accumulation")
        )

    def share(self, global_batch: int, world_size: int) -> "TrainConfig":
        """The same run with `global_batch` sequences a step on so many processes: batch_size at most as it is, and
        gradient_accumulation to match."""
        each, rest = divmod(global_batch, world_size)
        if rest:
            raise ConfigError(
                f"the run was made with {global_batch} sequences a step, which {world_size} processes cannot share "
                "evenly; give --batch_size and --gradient_accumulation to go on with another batch."
            )
        size = next(size for size in range(min(self.batch_size, each), 0, -1) if each % size == 0)
        return replace(self, batch_size=size, gradient_accumulation=each // size)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def model_config(config: TrainConfig) -> ModelConfig:
    """The preset with the changes of `config.model`. Raises ConfigError."""
    try:
        result = ModelConfig.from_preset(config.preset, **config.model)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    of_experts = [name for name in config.model if name in OF_EXPERTS]
    of_experts += ["feed_forward_pattern"] if "experts" in config.model.get("feed_forward_pattern", ()) else []
    if of_experts and not any(map(result.has_experts, range(result.num_hidden_layers))):
        raise ConfigError(
            f"model.{of_experts[0]} is given, but no layer of this model has experts; they come with "
            "--model.feed_forward_pattern '[\"experts\"]' in layers that have a feed-forward."
        )
    if result.vocab_size < 256:
        raise ConfigError(f"model.vocab_size is {result.vocab_size}; allowed is at least 256, one token per byte.")
    limit = f"model.max_position_embeddings = {result.max_position_embeddings}"
    if config.seq_len > result.max_position_embeddings:
        raise ConfigError(f"seq_len is {config.seq_len}; allowed is at most {limit}.")
    layers = config.activation_checkpointing
    if layers != "all" and layers > result.num_hidden_layers:
        raise ConfigError(
            f"activation_checkpointing is {layers}; allowed is at most the model's {result.num_hidden_layers} layers, "
            "or all."
        )
    length = len(config.sample.prompt.encode()) + config.sample.tokens
    if config.sample.tokens and length > result.max_position_embeddings:
        raise ConfigError(f"sample.prompt and sample.tokens make {length} tokens; allowed is at most {limit}.")
    return result
