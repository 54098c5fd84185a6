"""The optimizers: matrices and embeddings decay, vectors (norm weights) and what a module spares do not.

AdamW: Loshchilov and Hutter, arXiv:1711.05101. Adam: Kingma and Ba, arXiv:1412.6980. Muon is in muon.py.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.nn.expert_parallel import ShardedExperts
from llmcore.nn.moe import Experts, MoE
from llmcore.train.config import OptimizerConfig
from llmcore.train.muon import Muon

ADAM = ("step", "exp_avg", "exp_avg_sq")


class Optimizers:
    """Several optimizers, each of its own parameters, as one."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """What its optimizer keeps of a parameter, by name; empty before the first step."""
        return self._owner(parameter).state[parameter]

    def moments_of(self, parameter: Tensor) -> tuple[str, ...]:
        """The names that state_of has after a step."""
        return ("momentum_buffer",) if isinstance(self._owner(parameter), Muon) else ADAM

    def _owner(self, parameter: Tensor) -> torch.optim.Optimizer:
        for optimizer in self.optimizers:
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer
        raise ValueError("the parameter belongs to no optimizer")

    def set_learning_rate(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    def step(self, skip: Tensor | None = None) -> None:
        """Make a step, unless `skip` is 1.0, which leaves weights and moments alone. A GPU is not waited for."""
        for optimizer in self.optimizers:
            optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizers:
    betas = (config.beta1, config.beta2)
    if config.kind == "muon":
        halves, whole = _matrices_of_layers(model)
        rest = _groups(model, config, without=[*halves, *whole])
        groups = [{"params": p, "parts": parts} for p, parts in ((whole, 1), (halves, 2)) if p]
        muon = Muon(groups, lr=config.lr, weight_decay=config.weight_decay, momentum=config.beta1)
        return Optimizers([muon, torch.optim.AdamW(rest, lr=config.lr, betas=betas, fused=True)])
    adam = torch.optim.Adam if config.kind == "adam" else torch.optim.AdamW
    return Optimizers([adam(_groups(model, config), lr=config.lr, betas=betas, fused=True)])


def _groups(model: nn.Module, config: OptimizerConfig, without: Iterable[Tensor] = ()) -> list[dict[str, Any]]:
    left_out = {id(p) for p in without}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]
    spared = {id(getattr(m, name)) for m in model.modules() for name in getattr(m, "no_weight_decay", ())}
    decays = [p.ndim >= 2 and id(p) not in spared for p in parameters]
    groups = [
        {"params": [p for p, decay in zip(parameters, decays, strict=True) if decay == whether], "weight_decay": weight}
        for whether, weight in ((True, config.weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


def _matrices_of_layers(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Weights that are two matrices one below the other (or stacks of such), and those that are one: experts' weights
    and those of linear layers, but not the output layer's, which like the embedding is a table of tokens, nor a
    router's."""
    modules = list(model.modules())
    experts = [m for m in modules if isinstance(m, Experts | ShardedExperts)]
    spared = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    spared |= {id(m.gate.weight) for m in modules if isinstance(m, MoE)}
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head" and id(module.weight) not in spared
    ]
    return [m.gate_up_proj for m in experts], [*linear, *(m.down_proj for m in experts)]
