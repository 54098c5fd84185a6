"""Muon: the step is a matrix's momentum, orthogonalised (Jordan et al., https://kellerjordan.github.io/posts/muon) and
scaled to the size of AdamW's steps (Liu et al., arXiv:2502.16982), so that one learning rate fits both.

    m = beta m + (1 - beta) g        o = orthogonal(beta m + (1 - beta) g)
    w = (1 - lr decay) w - 0.2 lr sqrt(max(R, C)) o
torch.optim.Muon computes the same for one matrix; this one also takes stacks of them, and can skip a step.

N matrices of a parameter, R rows, C columns.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Its parameters are (..., R, C), stacks of matrices. A group's `parts` says of how many matrices, one below the
    other, each of those is made; 1 unless it is given.

    Where `found_inf` is set to a tensor that is 1.0, a step leaves weights and momentum alone, as torch's fused
    optimizers do.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, weight_decay: float, momentum: float
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        skip = None if self.found_inf is None else self.found_inf.bool()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group, skip)

    def _step(self, p: Tensor, gradient: Tensor, group: dict[str, Any], skip: Tensor | None) -> None:
        state, beta = self.state[p], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        momentum = state["momentum_buffer"]
        if skip is not None:  # a gradient that is the momentum leaves the momentum as it is
            gradient = torch.where(skip, momentum, gradient)
        momentum.lerp_(gradient, 1 - beta)
        rows, columns = p.shape[-2] // group["parts"], p.shape[-1]
        update = gradient.lerp(momentum, beta)
        alone = update.shape == (rows, columns)
        update = orthogonal(update if alone else update.reshape(-1, rows, columns)).reshape(p.shape)
        kept = 1 - group["lr"] * group["weight_decay"]
        if skip is not None:
            update = update.masked_fill(skip, 0)
            kept = torch.where(skip, 1.0, kept)
        p.mul_(kept).add_(update, alpha=-0.2 * group["lr"] * max(rows, columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """Of a matrix (R, C) or of each of (N, R, C) about the orthogonal factor of its polar decomposition, in bfloat16:
    singular values become about 1, from 0.5 to 1.5. A matrix of zeros stays one."""
    a, b, c = NEWTON_SCHULZ
    add_product = torch.addmm if matrices.dim() == 2 else torch.baddbmm  # of one matrix the latter is slower
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
