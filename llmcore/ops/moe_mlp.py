"""moe_mlp: the SwiGLU layers of the experts that each token has chosen, summed with the routing's weights. No token is
dropped and no group is padded (Gale et al., "MegaBlocks", 2022, arXiv:2211.15841).

    y[t] = sum over the k choices j of weights[t, j] * expert(indices[t, j], x[t])
    expert(e, x) = act @ w_down[e].T        act = silu(gate) * up        (gate, up) = h = x @ w_gate_up[e].T
Rows are pairs of a token and an expert, sorted by expert. Backward, for pair p of token t, with w its weight:
    da = dy[t] @ w_down[e]      dweights[p] = da . act      dh = swiglu's gradient for w * da
    dw_down[e] = sum of dy[t]^T (w act)      dw_gate_up[e] = sum of dh^T x[t]      dx[t] = sum of dh @ w_gate_up[e]
so that no expert's output is needed again (Guo et al., "SonicMoE", 2025, arXiv:2512.14080). Saved: the inputs, h and
the order of the pairs; act is computed again.

T tokens, E experts, k choices, P = T k pairs, C width, F expert width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.ops import _checks, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._experts import empty_plan, few_shapes, groups, plan, product_into, sum_pairs, zero_of_no_rows
from llmcore.ops._library import operator, public
from llmcore.ops.swiglu import _swiglu

OP = Op("moe_mlp", kernels=("triton", "cpu"))

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, (gate_up, down) in enumerate(zip(w_gate_up.unbind(), w_down.unbind(), strict=True)):
        token, choice = torch.where(indices == e)
        gate, up = (x[token] @ gate_up.T).chunk(2, -1)
        out = (F.silu(gate) * up) @ down.T
        y = y.index_add(0, token, (out * weights[token, choice, None]).to(y.dtype))
    return y


@public(reference)
def moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The chosen experts' SwiGLU layers, weighted and summed for each token. Sums are taken in float32.

    Args:
        x: (T, C), float32, bfloat16 or float16 (float64 on the torch backend).
        w_gate_up: (E, 2F, C), x's dtype; the gate's rows first.
        w_down: (E, C, F), x's dtype.
        weights: (T, k), any floating dtype, used in float32.
        indices: (T, k) int64, the experts of each token.

    Under autocast x, w_gate_up and w_down are cast to its dtype. The result is the same bits every time.

    Returns:
        (T, C) in x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, 2**31 pairs or more, or an index that is no expert (on CUDA only
            with LLMCORE_CHECK=1; that token is NaN there). TypeError: a dtype that is not allowed.
    """
    for name, tensor, dims, rank in (
        ("x", x, "(T, C)", 2),
        ("w_gate_up", w_gate_up, "(E, 2F, C)", 3),
        ("w_down", w_down, "(E, C, F)", 3),
        ("weights", weights, "(T, k)", 2),
    ):
        _checks.floating("moe_mlp", name, tensor)
        _checks.rank("moe_mlp", name, tensor, dims, rank)
    x, w_gate_up, w_down = _checks.autocast(x, w_gate_up, w_down)
    tokens, width = x.shape
    experts, inner = w_down.shape[0], w_down.shape[2]
    for name, tensor, dims, shape in (
        ("w_down", w_down, "(E, C, F) with x's C", (experts, width, inner)),
        ("w_gate_up", w_gate_up, "(E, 2F, C) beside x and w_down", (experts, 2 * inner, width)),
    ):
        _checks.shape("moe_mlp", name, tensor, dims, shape)
        _checks.like("moe_mlp", name, tensor, "x", x)
    _checks.shape("moe_mlp", "weights", weights, "(T, k) with x's T", (tokens, weights.shape[1]))
    _checks.is_tensor("moe_mlp", "indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"moe_mlp: indices has dtype {_checks.name_of(indices.dtype)}; allowed: int64.")
    _checks.shape("moe_mlp", "indices", indices, "weights' shape, (T, k)", tuple(weights.shape))
    for name, tensor in (("weights", weights), ("indices", indices)):
        _checks.like("moe_mlp", name, tensor, "x", x, dtype=False)
    if experts == 0 or inner == 0 or width == 0 or weights.shape[1] == 0:
        raise ValueError(
            f"moe_mlp: there are {experts} experts of width {inner}, {weights.shape[1]} choices and {width} elements "
            "in a token; allowed: from 1 of each."
        )
    if indices.numel() >= 2**31:
        raise ValueError(
            f"moe_mlp: indices {tuple(indices.shape)} holds {indices.numel()} pairs of a token and an expert; allowed: "
            "fewer than 2**31."
        )
    weights = weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    inputs = (x, w_gate_up, w_down, weights)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _moe_mlp(*inputs, indices, keep, resolve("moe_mlp", x))[0]


def _outputs(x: Tensor, w_down: Tensor, indices: Tensor, keep: bool) -> Results:
    """y, h (P, 2F) or nothing, the plan"""
    h = x.new_empty((indices.numel(), 2 * w_down.shape[2]) if keep else (0,))
    return _native.empty_like(x), h, *empty_plan(indices, w_down.shape[0])


def _forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, indices: Tensor, keep: bool, backend: str
) -> Results:
    order, place, offsets = sorted_pairs = plan("moe_mlp", indices, w_down.shape[0], backend)
    x = _native.unit_stride(x)
    y, h, *_ = _outputs(x, w_down, indices, keep)
    weights = weights.contiguous()
    if backend == "triton":
        from llmcore.kernels import moe_mlp as kernel

        kernel.moe_mlp_fwd(x, w_gate_up, w_down, weights, *sorted_pairs, h if keep else None, y)
        return y, h, *sorted_pairs
    top_k, inner = indices.shape[1], w_down.shape[2]
    out = x.new_empty(indices.numel(), x.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        for e, begin, end in groups(offsets):
            x_e = _gather(x, order, begin, end, top_k, backend)
            fits = keep and begin + len(x_e) <= len(h)
            h_e = h[begin : begin + len(x_e)] if fits else x.new_empty(len(x_e), 2 * inner)
            torch.mm(x_e, w_gate_up[e].T, out=h_e)
            if keep and not fits:
                h[begin:end] = h_e[: end - begin]
            product_into(out, begin, _swiglu(h_e[:, :inner], h_e[:, inner:], backend), w_down[e].T)
    _combine(out, place, weights, top_k, y, backend)
    return y, h, *sorted_pairs


def _gather(x: Tensor, order: Tensor, begin: int, end: int, top_k: int, backend: str) -> Tensor:
    """x of the tokens of the pairs at the places from begin to end, and perhaps zeros after them."""
    count = end - begin
    rows = x.new_empty(few_shapes(count, x.dtype), x.shape[1])
    if count < len(rows):
        rows[count:] = 0
    if backend == "torch":
        rows[:count] = x.index_select(0, order[begin:end] // top_k)
    else:
        _native.module(backend).moe_gather(
            x.data_ptr(), order.data_ptr(), rows.data_ptr(), begin, count, x.shape[1], top_k, x.stride(0),
            _native.code(x),
        )  # fmt: skip
    return rows


def _combine(out: Tensor, place: Tensor, weights: Tensor | None, top_k: int, y: Tensor, backend: str) -> None:
    """y[t] = the sum of out (P, C) over t's pairs, times their weights; NaN where a pair has no place."""
    if backend == "torch":
        rows = out.index_select(0, place.clamp(min=0)).masked_fill_((place < 0)[:, None], torch.nan)
        y.copy_(sum_pairs(rows, weights, top_k))
        return
    _native.module(backend).moe_combine(
        out.data_ptr(), place.data_ptr(), _native.ptr(weights), y.data_ptr(), *y.shape, top_k, _native.code(y)
    )


def _fake(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, indices: Tensor, keep: bool, backend: str
) -> Results:
    return _outputs(x, w_down, indices, keep)


def _backward(
    dy: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    h: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    results = dx, dw_gate_up, dw_down, dweights = _backward_fake(
        dy, x, w_gate_up, w_down, weights, h, order, place, offsets, needed, backend
    )
    need_dx, need_dw_gate_up, need_dw_down = needed
    x, dy, weights = _native.unit_stride(x), _native.unit_stride(dy), weights.contiguous()
    if backend == "triton":
        from llmcore.kernels import moe_mlp as kernel

        kernel.moe_mlp_bwd(
            dy, x, w_gate_up, w_down, weights, h, order, place, offsets, dweights, *_native.only(needed, results[:3])
        )
        return results
    top_k = weights.shape[1]
    if backend == "torch":
        dweights.fill_(torch.nan)  # where an index is no expert
    zero_of_no_rows(offsets, *(dw for dw, need in ((dw_gate_up, need_dw_gate_up), (dw_down, need_dw_down)) if need))
    dx_pairs = x.new_empty(order.shape[0] if need_dx else 0, x.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        for e, begin, end in groups(offsets):
            dy_e = _gather(dy, order, begin, end, top_k, backend)
            act, dh = _activation_backward(
                dy_e @ w_down[e], h[begin:end], order, begin, end, weights, dweights, backend
            )
            if need_dw_down:
                torch.mm(dy_e.T, act, out=dw_down[e])
            if need_dx:
                product_into(dx_pairs, begin, dh, w_gate_up[e])
            if need_dw_gate_up:
                torch.mm(dh.T, _gather(x, order, begin, end, top_k, backend), out=dw_gate_up[e])
    if need_dx:
        _combine(dx_pairs, place, None, top_k, dx, backend)
    return results


def _activation_backward(
    da: Tensor, h: Tensor, order: Tensor, begin: int, end: int, weights: Tensor, dweights: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """(weights * act, in da's place, dh) of the rows from begin to end, whose dweights are filled in; zeros in the rows
    beyond, which may hold NaN where w_down is not finite."""
    dh = h.new_empty(len(da), h.shape[1])
    if end - begin < len(da):
        da[end - begin :] = 0
        dh[end - begin :] = 0
    if backend == "torch":
        pairs = order[begin:end]
        w = weights.flatten()[pairs, None]
        gate, up = h.to(w.dtype).chunk(2, -1)
        da_w, p = da[: end - begin].to(w.dtype), torch.sigmoid(gate)
        silu = gate * p
        dweights.view(-1)[pairs] = (da_w * silu * up).sum(-1)
        dh[: end - begin] = torch.cat([w * da_w * up * (p + silu * torch.sigmoid(-gate)), w * da_w * silu], -1)
        da[: end - begin] = w * silu * up
        return da, dh
    _native.module(backend).moe_swiglu_bwd(
        da.data_ptr(), h.data_ptr(), order.data_ptr(), weights.data_ptr(), da.data_ptr(), dh.data_ptr(),
        dweights.data_ptr(), begin, end - begin, da.shape[1], _native.code(h),
    )  # fmt: skip
    return da, dh


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    h: Tensor,
    order: Tensor,
    place: Tensor,
    offsets: Tensor,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    return *_native.gradients(needed, x, w_gate_up, w_down), _native.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: Results) -> None:
    x, w_gate_up, w_down, weights, _, keep, ctx.backend = inputs
    if not keep:
        raise RuntimeError("moe_mlp: a gradient is asked for, but keep is false; call llmcore.ops.moe_mlp.")
    _, *saved = outputs
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(x, w_gate_up, w_down, weights, *saved)


def _differentiate(ctx: Any, dy: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 3
    if dy is None:
        return None, None, None, None, *nothing
    needed = ctx.needs_input_grad[:4]
    gradients = _moe_mlp_backward(dy, *ctx.saved_tensors, needed[:3], ctx.backend)
    return *_native.only(needed, gradients), *nothing


_moe_mlp = operator(
    "moe_mlp(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor indices, bool keep, str backend) -> "
    "(Tensor y, Tensor h, Tensor order, Tensor place, Tensor offsets)",
    _forward,
    _fake,
    _save,
    _differentiate,
)
_moe_mlp_backward = operator(
    "moe_mlp_backward(Tensor dy, Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor h, Tensor order, "
    "Tensor place, Tensor offsets, bool[3] needed, str backend) -> "
    "(Tensor dx, Tensor dw_gate_up, Tensor dw_down, Tensor dweights)",
    _backward,
    _backward_fake,
)
