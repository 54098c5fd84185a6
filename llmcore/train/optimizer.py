"""The optimizers: matrices and embeddings decay, vectors (norm weights) and what a module spares do not.

AdamW: Loshchilov and Hutter, arXiv:1711.05101. Adam: Kingma and Ba, arXiv:1412.6980. Muon orthogonalises a matrix's
momentum: Jordan et al., https://kellerjordan.github.io/posts/muon; its step is scaled to AdamW's (Liu et al.,
arXiv:2502.16982), so that one learning rate fits both.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.train.config import OptimizerConfig

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
        return ("momentum_buffer",) if isinstance(self._owner(parameter), torch.optim.Muon) else ADAM

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
            if skip is not None and isinstance(optimizer, torch.optim.Muon):
                _step_of_muon(optimizer, skip.bool())
            else:
                optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
                optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizers:
    betas = (config.beta1, config.beta2)
    if config.kind == "muon":
        matrices = list(_matrices_of_layers(model))
        rest = _groups(model, config, without=matrices)
        muon = torch.optim.Muon(
            matrices, lr=config.lr, weight_decay=config.weight_decay, momentum=config.beta1,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        return Optimizers([muon, torch.optim.AdamW(rest, lr=config.lr, betas=betas, fused=True)])
    adam = torch.optim.Adam if config.kind == "adam" else torch.optim.AdamW
    return Optimizers([adam(_groups(model, config), lr=config.lr, betas=betas, fused=True)])


@torch.no_grad()
def _step_of_muon(muon: torch.optim.Muon, skip: Tensor) -> None:
    """Muon cannot skip a step itself. A gradient that is the momentum leaves the momentum as it is, and the weights are
    put back: next to Muon's matrix products a copy costs nothing."""
    parameters = [p for group in muon.param_groups for p in group["params"]]
    before = [p.clone() for p in parameters]
    for p in parameters:
        momentum = muon.state[p].get("momentum_buffer", torch.zeros((), dtype=p.dtype, device=p.device))
        p.grad = torch.where(skip, momentum, p.grad)
    muon.step()
    for p, old in zip(parameters, before, strict=True):
        p.copy_(torch.where(skip, old, p))


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


def _matrices_of_layers(model: nn.Module) -> Iterator[Tensor]:
    """Weights of linear layers but the output layer's, which like the embedding is a table of tokens."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head" and id(module.weight) not in tables:
            yield module.weight
