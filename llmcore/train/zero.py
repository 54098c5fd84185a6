"""The engine of DeepSpeed: ZeRO stages 1 to 3 (Rajbhandari et al., arXiv:1910.02054), with offload to the CPU (Ren et
al., arXiv:2101.06840).

In bf16 and fp16 the model itself is in that type, and each rank keeps the fp32 weights and moments of its share only.
"""

import contextlib
import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from llmcore import models
from llmcore.models.files import WEIGHTS
from llmcore.nn.expert_parallel import require_whole
from llmcore.train.average import Average
from llmcore.train.config import ConfigError, TrainConfig
from llmcore.train.distributed import World
from llmcore.train.engine import Engine, Plan
from llmcore.train.launch import threads_per_process
from llmcore.train.optimizer import ADAM, build_optimizer

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # the state of DeepSpeed's loss scaler


class ZeroEngine(Engine):
    def __init__(self, model: models.Decoder, config: TrainConfig, plan: Plan, world: World) -> None:
        require_whole(model, "deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # collectives through shared memory are compiled when first used, and gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed calls collectives by names that PyTorch is about to change
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
        self.model, self.config, self.world = model, config, world
        self.expert_load: Tensor | None = None
        self.routing_loss = self.routing_losses = torch.zeros((), device=world.device)
        self.passes = 0
        assert plan.zero is not None
        self.stage, self.fp16 = plan.zero.stage, plan.precision == "fp16"
        if plan.zero.offload_optimizer:  # which then runs on this process's share of the processors
            torch.set_num_threads(threads_per_process(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        (adam,) = build_optimizer(model, config.optimizer).optimizers
        self.zero: Any
        try:
            self.zero, *_ = deepspeed.initialize(
                model=model, optimizer=adam, config=plan.zero.values, dist_init_required=False
            )
        except RuntimeError:  # of the memory, or of another rank
            raise
        except Exception as error:  # its configuration's errors have no class in common
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"DeepSpeed cannot use {config.deepspeed}: {reason.rstrip('.')}.") from error
        self.parallel = self.zero
        if self.fp16:
            self.zero.optimizer.loss_scaler.raise_error_at_min_scale = False  # the run ends by its own max_skipped
        self.autocast = torch.autocast(world.device.type, enabled=False)
        self.average = self._start_average()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss_of(self.zero(inputs, targets))

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self.zero.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.zero.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, step: int) -> Tensor:
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self.zero.step()
        norm = torch.as_tensor(self.zero.get_global_grad_norm(), device=self.world.device).float()
        if self.average is not None:
            self.average.update(step)
        self.balance_experts(norm.isfinite().float())
        return norm

    def largest_weight(self) -> float:
        mine = [shard.abs().max() for shard in self._shards() if shard.numel()]
        largest = torch.stack(mine).max() if mine else torch.zeros((), device=self.world.device)
        largest = largest.nan_to_num(nan=math.inf, posinf=math.inf).to(self.world.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def _shards(self) -> list[Tensor]:
        """This rank's fp32 weights, a flat tensor for each group."""
        optimizer = self.zero.optimizer
        if self.stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return [p for group in optimizer.optimizer.param_groups for p in group["params"]]

    def _start_average(self) -> Average | None:
        decay = self.config.ema_decay
        return Average(self._shards(), decay) if decay else None

    @torch.no_grad()
    def _weights_changed(self) -> None:
        """The model's weights become those of the shards, rounded."""
        for p in self.model.parameters():
            whole = safe_get_full_fp32_param(p)
            with self._gathered([p]):
                p.data.copy_(whole)

    def _gathered(self, parameters: Iterable[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Inside the block the parameters are whole, and rank 0 may write to them."""
        if self.stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)

    def _weights(self) -> dict[str, Tensor]:
        weights = ((name, safe_get_full_fp32_param(p)) for name, p in self.model.named_parameters())
        return self._collect(itertools.chain(weights, self._buffers().items()))

    def _buffers(self) -> dict[str, Tensor]:
        """Those that belong to the model's state; ZeRO shards none."""
        names = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in names}

    def _moments(self) -> dict[str, Tensor]:
        steps = [state["step"] for state in self._states().values() if "step" in state]
        if not steps:
            return {}
        self._link_moments()
        named = list(self.model.named_parameters())
        moments = {name: torch.tensor(float(steps[0])) for name in (f"{name}.step" for name, _ in named)}
        for moment in ADAM[1:]:
            moments |= self._collect(
                (f"{name}.{moment}", safe_get_full_optimizer_state(p, moment)) for name, p in named
            )
        return moments if self.world.rank == 0 else {}

    def _collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """On the CPU of rank 0, one at a time."""
        collected = {}
        for name, tensor in tensors:
            if self.world.rank == 0:
                collected[name] = tensor.detach().to("cpu", copy=True)
        return collected

    def _load_weights(self, folder: Path) -> None:
        with safe_open(folder / WEIGHTS, framework="pt") as file:  # one tensor at a time: no rank need hold them all
            for name, p in self.model.named_parameters():
                safe_set_full_fp32_param(p, file.get_tensor(name).to(self.world.device))
            for name, buffer in self._buffers().items():
                buffer.copy_(file.get_tensor(name))
        self._weights_changed()

    def _load_moments(self, read: Callable[[str], Tensor], names: list[str]) -> None:
        if not names:
            return
        states = self._states()
        for shard in self._shards():
            states[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                **{moment: torch.zeros_like(shard) for moment in ADAM[1:]},
            }
        self._link_moments()
        for name, p in self.model.named_parameters():
            for state in states.values():
                state["step"].copy_(read(f"{name}.step"))
            for moment in ADAM[1:]:
                safe_set_full_optimizer_state(p, read(f"{name}.{moment}").to(self.world.device), moment)

    def _scale_state(self) -> dict[str, float] | None:
        if not self.fp16:
            return None
        scaler = self.zero.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)}  # a fixed scale has the first

    def _load_scale(self, state: dict[str, float]) -> None:
        if self.fp16 and (scaler := self.zero.optimizer.loss_scaler).dynamic:
            scaler.cur_scale = state["scale"] if "scale" in state else state["cur_scale"]
            for name in SCALER[1:]:
                setattr(scaler, name, state.get(name, getattr(scaler, name)))

    def _link_moments(self) -> None:
        """Let stages 1 and 2 know where the moments of each parameter are. DeepSpeed does it after the step of the
        first group of parameters, when the others have none yet."""
        if self.stage < 3:
            self.zero.optimizer._hp_optimizer_states_linked = False
            self.zero.optimizer._lazy_init_hp_params_optimizer_state()

    def _moments_of(self, parameter: Tensor) -> tuple[str, ...]:
        return ADAM

    def _states(self) -> dict[Tensor, dict[str, Any]]:
        return self.zero.optimizer.optimizer.state
