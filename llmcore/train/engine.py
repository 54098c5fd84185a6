"""Who shares the work of a step. One interface, three engines:

    single      one process
    ddp         each process has a copy of the model; gradients are averaged (Li et al., arXiv:2006.15704)
    deepspeed   weights, gradients and moments are sharded (ZeRO); it is in zero.py

All ranks call every method. What an engine saves is the same for all, whole tensors by their names, so that a run can
go on with another engine or another number of processes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmcore import models
from llmcore.models.decoder import DecoderOutput
from llmcore.nn.expert_parallel import gradient_norm, require_whole, unshared
from llmcore.train.average import Average
from llmcore.train.checkpoint import OPTIMIZER, CheckpointError, Snapshot, weights_of
from llmcore.train.config import ConfigError, TrainConfig
from llmcore.train.distributed import World
from llmcore.train.loss_scale import LossScale
from llmcore.train.machine import choose_precision
from llmcore.train.optimizer import Optimizers, build_optimizer
from llmcore.train.zero_config import ZeroConfig, read_zero_config, require_deepspeed, zero_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What is chosen before a process is started. engine: single, ddp or deepspeed; precision: fp32, bf16 or fp16;
    zero: the DeepSpeed configuration."""

    engine: str
    precision: str
    zero: ZeroConfig | None = None


class Engine:
    """One process that has the whole model; under DDP, one of several."""

    def __init__(self, model: models.Decoder, config: TrainConfig, plan: Plan, world: World) -> None:
        self.model, self.config, self.world = model.to(world.device), config, world
        self.expert_load: Tensor | None = None
        self.routing_loss = self.routing_losses = torch.zeros((), device=world.device)
        self.passes = 0
        self.optimizer: Optimizers = build_optimizer(self.model, config.optimizer)
        self.average = self._start_average()
        self.scale = LossScale(world.device) if plan.precision == "fp16" else None
        dtype = DTYPES[plan.precision]
        self.autocast = torch.autocast(world.device.type, dtype, enabled=plan.precision != "fp32")
        self.parallel: nn.Module = replicate(self.model, config.seq_len) if plan.engine == "ddp" else self.model

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of tokens (B, T). Without gradients ranks need not meet here. Of it `routing_loss` is what
        balances experts, until the next call."""
        with self.autocast:
            return self._loss_of((self.parallel if torch.is_grad_enabled() else self.model)(inputs, targets))

    def _loss_of(self, output: DecoderOutput) -> Tensor:
        assert output.loss is not None  # there are targets
        routing = output.routing_loss
        self.routing_loss = torch.zeros_like(output.loss) if routing is None else routing.detach()
        if torch.is_grad_enabled():
            self.routing_losses, self.passes = self.routing_losses + self.routing_loss, self.passes + 1
        return output.loss

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a forward and backward pass; ranks meet in the `last` one of a step only."""
        if isinstance(self.parallel, DistributedDataParallel) and not last:
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's loss to those of the step, of which the ranks then take the mean."""
        (loss if self.scale is None else loss * self.scale.scale).backward()

    def step(self, lr: float, step: int) -> Tensor:
        """Clip the gradient, make step `step` and forget the gradient. Returns the gradient's norm before clipping;
        where it is not finite, which all ranks see alike, no rank's weights move. Nothing here waits for a GPU."""
        parameters = list(self.model.parameters())
        if self.scale is not None:
            self.scale.unscale(parameters)
        norm = gradient_norm(self.model)
        nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.grad_clip or math.inf, norm)
        bad = (~norm.isfinite()).float()
        self.optimizer.set_learning_rate(lr)
        self.optimizer.step(skip=bad)
        self.optimizer.zero_grad()
        if self.scale is not None:
            self.scale.update(bad)
        if self.average is not None:
            self.average.update(step)
        self.balance_experts(1 - bad)
        return norm

    def balance_experts(self, made: Tensor) -> None:
        """Move the experts' biases by what they got on all ranks; made: 0 where the step was not, and they stay."""
        load = self.model.expert_load()
        if load is not None:
            load = self.world.sum(load)
            self.model.balance_experts(load * made)
            self.expert_load = load if self.expert_load is None else self.expert_load + load

    def read_experts(self) -> dict[str, float]:
        """How evenly experts were used since the last reading, the worst layer's: the largest load by the mean one, and
        the entropy of the loads by that of even ones; and the mean of what balances them in the loss. Empty without
        experts. All ranks must call it."""
        load, losses, passes = self.expert_load, self.routing_losses, self.passes
        self.expert_load, self.routing_losses, self.passes = None, torch.zeros_like(losses), 0
        if load is None:
            return {}
        routing_loss = (self.world.sum(losses) / (passes * self.world.size)).item()
        shares = load / load.sum(-1, keepdim=True).clamp(min=1)
        entropy = torch.special.entr(shares).sum(-1) / math.log(max(load.shape[1], 2))
        largest = (shares.amax(-1) * load.shape[1]).max()
        return {"routing_loss": routing_loss, "expert_load": largest.item(), "expert_entropy": entropy.min().item()}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model computes with the average of its weights, where the run keeps one."""
        if self.average is None:
            yield
            return
        self.average.swap()
        self._weights_changed()
        try:
            yield
        finally:
            self.average.swap()
            self._weights_changed()

    def largest_weight(self) -> float:
        """Not a number where one of them is not."""
        return torch.stack([p.detach().abs().max() for p in self.model.parameters()]).max().item()

    def snapshot(self) -> Snapshot:
        """All that a checkpoint holds, on the CPU of rank 0 and apart from what goes on changing; empty elsewhere.
        Raises ValueError where the experts are shared out to ranks."""
        require_whole(self.model, "snapshot")
        average = None
        if self.average is not None:
            with self.averaged():
                average = self._weights()
        return Snapshot(self._weights(), self._moments(), average, self._scale_state())

    def restore(self, checkpoint: Path, scale: dict[str, float] | None) -> None:
        """Take over a verified checkpoint of the same model. The average starts from the weights if it has none.
        Raises ValueError where the experts are shared out to ranks."""
        require_whole(self.model, "restore")
        try:
            if self.average is not None:
                with self.averaged():
                    self._load_weights(checkpoint / "ema" if (checkpoint / "ema").is_dir() else checkpoint)
            self._load_weights(checkpoint)
            with safe_open(checkpoint / OPTIMIZER, framework="pt") as file:
                names: list[str] = list(file.keys())
                self._require_moments(checkpoint / OPTIMIZER, names)
                self._load_moments(file.get_tensor, names)
        except (OSError, SafetensorError) as error:  # such as another process that has deleted it since
            raise CheckpointError(f"{checkpoint} cannot be read: {error}.") from error
        if scale is not None:
            self._load_scale(scale)

    def _start_average(self) -> Average | None:
        decay = self.config.ema_decay
        return Average(list(self.model.parameters()), decay) if decay else None

    def _weights_changed(self) -> None:
        """Called when the fp32 weights were written to."""

    def _weights(self) -> dict[str, Tensor]:
        if self.world.rank > 0:
            return {}
        return {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}

    def _moments(self) -> dict[str, Tensor]:
        if self.world.rank > 0:
            return {}
        return {
            f"{name}.{moment}": value.to("cpu", copy=True)
            for name, p in self.model.named_parameters()
            for moment, value in self.optimizer.state_of(p).items()
        }

    def _load_weights(self, folder: Path) -> None:
        self.model.load_state_dict(weights_of(folder))

    def _load_moments(self, read: Callable[[str], Tensor], names: list[str]) -> None:
        parameters = dict(self.model.named_parameters())
        for name in names:
            parameter, _, moment = name.rpartition(".")
            self.optimizer.state_of(parameters[parameter])[moment] = read(name).to(self.world.device)

    def _scale_state(self) -> dict[str, float] | None:
        return None if self.scale is None else self.scale.state()

    def _load_scale(self, state: dict[str, float]) -> None:
        if self.scale is not None:
            self.scale.load(state)

    def _moments_of(self, parameter: Tensor) -> tuple[str, ...]:
        return self.optimizer.moments_of(parameter)

    def _require_moments(self, file: Path, names: list[str]) -> None:
        parameters = dict(self.model.named_parameters())
        if not {name.rpartition(".")[0] for name in names} <= set(parameters):  # Muon's skipped first step leaves none
            raise CheckpointError(f"{file} does not hold the state of this model's parameters.")
        for name in names:
            parameter, _, moment = name.rpartition(".")
            if moment not in self._moments_of(parameters[parameter]):
                raise CheckpointError(
                    f"{file} holds the state of another optimizer: {moment} of {parameter}; "
                    "resume with the optimizer.kind it was trained with."
                )


def replicate(model: models.Decoder, seq_len: int) -> DistributedDataParallel:
    """The model under DDP, whose gradient buckets are already those of the whole run.

    DDP groups the gradients anew after its first backward, in the order in which they came. Sums of three ranks and
    more round differently in other groups, so that a run which was resumed would part from one that was not. Two
    backward passes of a zero loss bring this before the first step. Experts that are shared out to ranks stay theirs.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, unshared(model))
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    tokens = torch.zeros(1, seq_len, dtype=torch.int64, device=next(model.parameters()).device)
    for _ in range(2):
        (parallel(tokens, tokens).loss * 0).backward()
        model.zero_grad()
    for layer in model.expert_layers():
        layer.load.zero_()
    return parallel


def make_plan(config: TrainConfig, world_size: int, device: torch.device) -> Plan:
    """What `config` means on so many processes. Raises ConfigError."""
    engine = config.engine
    if engine == "auto":
        engine = "deepspeed" if config.deepspeed else "ddp" if world_size > 1 else "single"
    if engine == "single" and world_size > 1:
        raise ConfigError(f"engine is single, but there are {world_size} processes; allowed are ddp and deepspeed.")
    if engine != "deepspeed":
        return Plan(engine, choose_precision(config.precision, device))
    require_deepspeed()
    if config.optimizer.kind == "muon":
        raise ConfigError(
            "optimizer.kind is muon, which needs whole matrices, but ZeRO cuts them up; allowed are adamw and adam."
        )
    assert config.deepspeed is not None
    zero = zero_config(
        config.deepspeed,
        read_zero_config(config.deepspeed),
        batch_size=config.batch_size,
        gradient_accumulation=config.gradient_accumulation,
        world_size=world_size,
        grad_clip=config.optimizer.grad_clip,
        precision=config.precision,
    )
    choose_precision(zero.precision, device)
    return Plan(engine, zero.precision, zero)


def build_engine(model: models.Decoder, config: TrainConfig, plan: Plan, world: World) -> Engine:
    recompute_layers(model, config)
    if plan.engine == "deepspeed":
        from llmcore.train.zero import ZeroEngine

        return ZeroEngine(model, config, plan, world)
    return Engine(model, config, plan, world)


def recompute_layers(model: models.Decoder, config: TrainConfig) -> None:
    """Let the layers that config.activation_checkpointing names compute their activations again."""
    layers = config.activation_checkpointing
    model.checkpoint_layers(model.config.num_hidden_layers if layers == "all" else layers)
