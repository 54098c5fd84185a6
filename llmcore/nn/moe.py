"""MoE: a layer of experts, of which each token uses a few."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.nn.swiglu import SwiGLU
from llmcore.ops.moe_route import require_choice


class Routing(NamedTuple):
    """What a layer's routing costs and did, in training; None otherwise. loss: what balances it, a float32 scalar that
    has its coefficients, or None without one; load: (E,) float32, the pairs of a token and an expert that each expert
    got."""

    loss: Tensor | None
    load: Tensor | None


class Experts(nn.Module):
    """Weights of E SwiGLU layers. gate_up_proj: (E, 2F, C), the gate's rows first; down_proj: (E, C, F)."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear's."""
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.uniform_(weight, -(weight.shape[2] ** -0.5), weight.shape[2] ** -0.5)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x: (T, C), weights, indices: (T, k) -> (T, C)."""
        return ops.moe_mlp(x, self.gate_up_proj, self.down_proj, weights, indices)


class Router(nn.Linear):
    """The logits of the experts, (T, C) -> (T, E), in float32 (float64 for such x) whatever x and the weight are."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))


class MoE(nn.Module):
    """Mixture of experts in place of a feed-forward layer (Shazeer et al., 2017, arXiv:1701.06538): the sum of top_k
    routed experts' SwiGLU layers, weighted, and of the shared ones that every token uses (Dai et al., DeepSeekMoE,
    2024, arXiv:2401.06066). No token is dropped.

    Args:
        hidden_size: C. intermediate_size: F of an expert. num_experts: E. top_k: k.
        num_shared_experts: S; one SwiGLU of width S F.
        scoring, normalize, num_groups, top_groups, scale: as in `ops.moe_route`. With top_k 1, normalize makes every
            weight 1, so that the router learns from the losses below alone.
        jitter: in training the router sees x times numbers from 1 - jitter to 1 + jitter (Fedus et al., Switch
            Transformers, 2021, arXiv:2101.03961).
        balance_loss: coefficient of E sum_e f_e P_e, with f_e the share of the pairs that expert e gets and P_e its
            mean score, scores summing to one (Fedus et al.); 1 where the load is even.
        z_loss: coefficient of the mean of logsumexp(logits)^2 (Zoph et al., ST-MoE, 2022, arXiv:2202.08906).
        bias_rate: how much `balance` moves the bias that the experts are chosen with, up for those that get less than
            the mean and down for the others (Wang et al., loss-free balancing, 2024, arXiv:2408.15664); 0: no bias.

    The router computes in float32, whatever x is; so is the bias. Raises ValueError for numbers that do not fit. In a
    loop of one's own:

        y, routing = moe(x)
        loss = task_loss(y) + routing.loss  # in training, where balance_loss or z_loss is set; else None
        ...
        moe.balance(routing.load)  # once a step, where bias_rate is set: the loads of all its passes and ranks, summed

    `load` (E,) is a place for whoever adds up the loads of several passes, as Decoder does; `balance` empties it.
    """

    bias: Tensor | None
    load: Tensor

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        num_shared_experts: int = 0,
        *,
        scoring: str = "softmax",
        normalize: bool = True,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        jitter: float = 0.0,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
        bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("hidden_size", hidden_size, 1), ("intermediate_size", intermediate_size, 1),
            ("num_experts", num_experts, 1), ("num_shared_experts", num_shared_experts, 0),
        ):  # fmt: skip
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"MoE: {name} is {number!r}; allowed: whole numbers from {least}.")
        for name, rate, limit, words in (
            ("jitter", jitter, 1, "from 0 to below 1"), ("balance_loss", balance_loss, math.inf, "from 0"),
            ("z_loss", z_loss, math.inf, "from 0"), ("bias_rate", bias_rate, math.inf, "from 0"),
        ):  # fmt: skip
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < limit:
                raise ValueError(f"MoE: {name} is {rate!r}; allowed: numbers {words}.")
        require_choice("MoE", num_experts, top_k, scoring, num_groups, top_groups, scale)
        self.num_experts, self.top_k, self.scoring, self.normalize = num_experts, top_k, scoring, normalize
        self.num_groups, self.top_groups, self.scale = num_groups, top_groups, scale
        self.jitter, self.balance_loss, self.z_loss, self.bias_rate = jitter, balance_loss, z_loss, bias_rate
        self.gate = Router(hidden_size, num_experts)
        self.experts: nn.Module = Experts(num_experts, hidden_size, intermediate_size)
        self.shared_experts = (
            SwiGLU(hidden_size, num_shared_experts * intermediate_size) if num_shared_experts else None
        )
        self.register_buffer("bias", torch.zeros(num_experts) if bias_rate else None)
        # Each rank's own until `balance`: were it a buffer, DDP would overwrite it with the first rank's.
        self.load = torch.zeros(num_experts)

    def reset_buffers(self, device: torch.device | None = None) -> None:
        """After the module was built on the meta device: a bias that has no numbers yet, and the load, become zeros on
        `device`."""
        if self.bias is not None and self.bias.is_meta:
            self.bias = torch.zeros(self.num_experts, device=device)
        self.load = torch.zeros(self.num_experts, device=device)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "MoE":
        """Bias and load follow the module to another device, but stay float32."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias is not None and self.bias.dtype != torch.float32:
            self.bias = bias.to(self.bias.device)
        device = self.gate.weight.device
        self.load = torch.zeros(self.num_experts, device=device) if self.load.is_meta else self.load.to(device)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """A bias of another dtype, which `assign` would take as it is, becomes float32."""
        super()._load_from_state_dict(*args, **options)
        if self.bias is not None:
            self.bias = self.bias.float()

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x: (..., C) -> (..., C), and what the routing did. Raises ValueError for an x of another width."""
        if x.dim() == 0 or x.shape[-1] != self.gate.in_features:
            raise ValueError(f"MoE: x must be (..., {self.gate.in_features}), but its shape is {tuple(x.shape)}.")
        tokens = x.reshape(-1, x.shape[-1])
        logits = self._logits(tokens)
        needs_scores = self.training and self.balance_loss > 0
        routed = ops.moe_route(
            logits, self.top_k, scoring=self.scoring, bias=self.bias, normalize=self.normalize,
            num_groups=self.num_groups, top_groups=self.top_groups, scale=self.scale, return_scores=needs_scores,
        )  # fmt: skip
        weights, indices = routed[:2]
        y = self.experts(tokens, weights, indices)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        if not self.training:
            return y.view(x.shape), Routing(None, None)
        load = logits.new_zeros(self.num_experts).scatter_add_(0, indices.flatten(), torch.ones_like(weights).flatten())
        scores = routed[2] if len(routed) == 3 else None
        return y.view(x.shape), Routing(self._loss(logits, scores, load), load)

    def _logits(self, tokens: Tensor) -> Tensor:
        if self.training and self.jitter:
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
        return self.gate(tokens)

    def _loss(self, logits: Tensor, scores: Tensor | None, load: Tensor) -> Tensor | None:
        if not (self.balance_loss or self.z_loss):
            return None
        loss = logits.new_zeros(())
        if logits.shape[0] == 0:
            return loss
        if scores is not None:
            shares = scores if self.scoring == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)
            frequency = load / load.sum().clamp(min=1)
            loss = loss + self.balance_loss * self.num_experts * (frequency * shares.mean(0)).sum()
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().mean()
        return loss

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Moves the bias after a step: load (E,) is what each expert got in it, of all ranks. Forgets its own load.
        Raises ValueError for a load that is not (E,) of floating-point numbers."""
        if not isinstance(load, Tensor) or load.shape != (self.num_experts,) or not load.is_floating_point():
            given = f"{tuple(load.shape)} of {load.dtype}" if isinstance(load, Tensor) else f"a {type(load).__name__}"
            raise ValueError(
                f"MoE: balance takes a load (E,) = ({self.num_experts},) of floating-point numbers, but it is {given}."
            )
        if self.bias is not None:
            self.bias += self.bias_rate * (load.mean() - load).sign()
        self.load.zero_()
