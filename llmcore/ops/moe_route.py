"""moe_route: which experts a token goes to, and with what weight.

Shazeer et al., "Outrageously Large Neural Networks", 2017 (arXiv:1701.06538); groups, sigmoid scores and the bias as in
DeepSeek-V3, 2024 (arXiv:2412.19437). For each token, over the E experts:
    score = softmax(logit) or sigmoid(logit)      chosen: the k largest of score + bias, ties to the lower index
    weight = scale * score / (the chosen scores' sum + 1e-20), or scale * score without normalize
With groups only the experts of the best ones are looked at; a group is as good as its two best experts are together.
Backward, with p the score, c the chosen and s their sum + 1e-20:
    dp_c = scale * (dw_c - sum over the chosen of dw p / s) / s, or scale * dw_c without normalize; dscores is added
    dlogit = p (dp - sum over all of dp p) for softmax, dp p (1 - p) for sigmoid
The choice has no gradient, and the bias none. Saved: the logits and the indices.

T tokens, E experts, k chosen ones.
"""

from typing import Any

import torch
from torch import Tensor

from llmcore.ops import _checks, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public

OP = Op("moe_route", kernels=("triton", "cpu"))
SCORINGS = ("softmax", "sigmoid")
TINY = 1e-20
LARGEST = torch.finfo(torch.float32).max

Result = tuple[Tensor, ...]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _scores(logits: Tensor, scoring: str) -> Tensor:
    wide = logits.to(_wide(logits))
    if scoring == "softmax":
        return torch.softmax(wide, -1)
    # not torch.sigmoid, which gives equal logits other bits where a vector of the processor does not fill up
    below, above = torch.exp(wide.clamp(max=0)), torch.exp(-wide.clamp(min=0))
    return torch.where(wide < 0, below / (1 + below), 1 / (1 + above))


def _chosen(scores: Tensor, top_k: int, bias: Tensor | None, num_groups: int, top_groups: int) -> Tensor:
    """(T, k) indices, the best first."""
    ranked = scores if bias is None else scores + bias.to(scores.dtype)
    if num_groups > 1:
        groups = ranked.unflatten(-1, (num_groups, -1))
        best = groups.sort(-1, descending=True)[0][..., :2].sum(-1)
        kept = best.argsort(dim=-1, descending=True, stable=True)[..., :top_groups]
        is_open = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, kept, True)
        is_open = is_open[..., None].expand(groups.shape).flatten(-2)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    if num_groups > 1:
        order = order.gather(-1, is_open.gather(-1, order).byte().argsort(dim=-1, descending=True, stable=True))
    return order[..., :top_k]


def reference(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    normalize: bool = True,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    return_scores: bool = False,
) -> Result:
    scores = _scores(logits, scoring)
    indices = _chosen(scores.detach(), top_k, bias, num_groups, top_groups)
    weights = scores.gather(-1, indices)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return (weights * scale, indices, scores) if return_scores else (weights * scale, indices)


def require_choice(
    op: str, experts: int, top_k: int, scoring: str, num_groups: int, top_groups: int, scale: float
) -> None:
    """Raises ValueError or TypeError for a choice that cannot be made among so many experts."""
    if scoring not in SCORINGS:
        raise ValueError(f"{op}: scoring is {scoring!r}; allowed: {', '.join(map(repr, SCORINGS))}.")
    for name, value in (("top_k", top_k), ("num_groups", num_groups), ("top_groups", top_groups)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{op}: {name} is {value!r}; allowed: whole numbers from 1.")
    if experts % num_groups:
        raise ValueError(f"{op}: num_groups is {num_groups}; allowed: a divisor of the {experts} experts.")
    if top_groups > num_groups:
        raise ValueError(f"{op}: top_groups is {top_groups}; allowed: 1 to num_groups = {num_groups}.")
    open_experts = experts if num_groups == 1 else experts // num_groups * top_groups
    if top_k > open_experts:
        raise ValueError(f"{op}: top_k is {top_k}; allowed: 1 to the {open_experts} experts to choose from.")
    _checks.number(op, "scale", scale)
    if not -LARGEST <= scale <= LARGEST:  # not math.isfinite, which torch.compile cannot trace
        raise ValueError(f"{op}: scale is {scale}; allowed: finite numbers of float32.")


@public(reference)
def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    normalize: bool = True,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    return_scores: bool = False,
) -> Result:
    """The experts of each token and their weights, in float32.

    Args:
        logits: (T, E), float32, bfloat16 or float16 (float64 on the torch backend). A NaN is chosen
            first; with softmax or normalize all of its token's weights are NaN. No other token is touched by it.
        top_k: k, from 1 to E, or to the experts of the groups that are looked at.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        bias: (E,), added to the scores for the choice alone (Wang et al., 2024, arXiv:2408.15664); no gradient.
        normalize: divide the chosen scores by their sum.
        num_groups, top_groups: choose among the experts of the top_groups best of num_groups groups of equal size.
        scale: factor of the weights.
        return_scores: also return the scores of all experts, for a loss that balances them.

    Returns:
        weights (T, k) float32 and indices (T, k) int64, the best first; with return_scores also scores (T, E) float32.

    Raises:
        ValueError: shapes, devices or numbers that do not fit. TypeError: a dtype that is not allowed.
    """
    _checks.floating("moe_route", "logits", logits)
    _checks.rank("moe_route", "logits", logits, "(T, E)", 2)
    experts = logits.shape[1]
    require_choice("moe_route", experts, top_k, scoring, num_groups, top_groups, scale)
    if bias is not None:
        _checks.floating("moe_route", "bias", bias)
        _checks.shape("moe_route", "bias", bias, "(E,)", (experts,))
        _checks.like("moe_route", "bias", bias, "logits", logits, dtype=False)
        bias = bias.detach().to(_wide(logits)).contiguous()
    weights, indices, scores = _moe_route(
        logits, bias, top_k, scoring == "sigmoid", bool(normalize), num_groups, top_groups, float(scale),
        bool(return_scores), resolve("moe_route", logits),
    )  # fmt: skip
    return (weights, indices, scores) if return_scores else (weights, indices)


def _fake(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    sigmoid: bool,
    normalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
    keep_scores: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, shape = _wide(logits), (logits.shape[0], top_k)
    scores = logits.new_empty(tuple(logits.shape) if keep_scores else (0,), dtype=wide)
    return logits.new_empty(shape, dtype=wide), logits.new_empty(shape, dtype=torch.int64), scores


def _forward(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    sigmoid: bool,
    normalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
    keep_scores: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        result = reference(
            logits, top_k, scoring=SCORINGS[sigmoid], bias=bias, normalize=normalize, num_groups=num_groups,
            top_groups=top_groups, scale=scale, return_scores=True,
        )  # fmt: skip
        weights, indices, scores = result
        kept = scores.contiguous() if keep_scores else scores.new_empty(0)
        return weights.contiguous(), indices.contiguous(), kept
    outputs = weights, indices, scores = _fake(
        logits, bias, top_k, sigmoid, normalize, num_groups, top_groups, scale, keep_scores, backend
    )
    if logits.shape[0] == 0:
        return outputs
    logits = _native.unit_stride(logits)
    if backend == "triton":
        from llmcore.kernels import moe_route as kernel

        kernel.moe_route_fwd(
            logits, bias, weights, indices, scores if keep_scores else None, sigmoid, normalize, num_groups, top_groups,
            scale,
        )  # fmt: skip
        return outputs
    _native.module(backend).moe_route_fwd(
        logits.data_ptr(), _native.ptr(bias), weights.data_ptr(), indices.data_ptr(),
        _native.ptr(scores if keep_scores else None), *logits.shape, top_k, logits.stride(0), sigmoid, normalize,
        num_groups, top_groups, scale, _native.code(logits),
    )  # fmt: skip
    return outputs


def _backward(
    dweights: Tensor | None,
    dscores: Tensor | None,
    logits: Tensor,
    indices: Tensor,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    backend: str,
) -> Tensor:
    if backend == "torch":
        p = _scores(logits, SCORINGS[sigmoid])
        dp = torch.zeros_like(p) if dscores is None else dscores
        if dweights is not None:
            dw = dweights
            if normalize:
                chosen = p.gather(-1, indices)
                total = chosen.sum(-1, keepdim=True) + TINY
                dw = (dw - (dw * (chosen / total)).sum(-1, keepdim=True)) / total
            dp = dp.scatter_add(-1, indices, scale * dw)
        if sigmoid:
            dlogits = dp * p * torch.sigmoid(-logits.to(p.dtype))
        else:
            dlogits = p * (dp - (dp * p).sum(-1, keepdim=True))
        return dlogits.to(logits.dtype).contiguous()
    dlogits = _native.empty_like(logits)
    if dlogits.numel() == 0:
        return dlogits
    logits = _native.unit_stride(logits)
    dweights = None if dweights is None else dweights.contiguous()
    dscores = None if dscores is None else dscores.contiguous()
    if backend == "triton":
        from llmcore.kernels import moe_route as kernel

        kernel.moe_route_bwd(dweights, dscores, logits, indices, dlogits, sigmoid, normalize, scale)
        return dlogits
    _native.module(backend).moe_route_bwd(
        _native.ptr(dweights), _native.ptr(dscores), logits.data_ptr(), indices.data_ptr(), dlogits.data_ptr(),
        *logits.shape, indices.shape[1], logits.stride(0), sigmoid, normalize, scale, _native.code(logits),
    )  # fmt: skip
    return dlogits


def _backward_fake(
    dweights: Tensor | None,
    dscores: Tensor | None,
    logits: Tensor,
    indices: Tensor,
    sigmoid: bool,
    normalize: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return _native.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, _, ctx.sigmoid, ctx.normalize, _, _, ctx.scale, ctx.keep_scores, ctx.backend = inputs
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(logits, outputs[1])


def _differentiate(
    ctx: Any, dweights: Tensor | None, dindices: Tensor | None, dscores: Tensor | None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 9
    if not ctx.keep_scores:
        dscores = None
    if dweights is None and dscores is None:
        return None, *nothing
    dlogits = _moe_route_backward(
        dweights, dscores, *ctx.saved_tensors, ctx.sigmoid, ctx.normalize, ctx.scale, ctx.backend
    )
    return dlogits, *nothing


_moe_route = operator(
    "moe_route(Tensor logits, Tensor? bias, int top_k, bool sigmoid, bool normalize, int num_groups, int top_groups, "
    "float scale, bool keep_scores, str backend) -> (Tensor weights, Tensor indices, Tensor scores)",
    _forward,
    _fake,
    _save,
    _differentiate,
)
_moe_route_backward = operator(
    "moe_route_backward(Tensor? dweights, Tensor? dscores, Tensor logits, Tensor indices, bool sigmoid, "
    "bool normalize, float scale, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
