"""causal_conv1d: the short convolution over time in front of a state-space model, each channel by itself.

Gu and Dao, "Mamba", 2023 (arXiv:2312.00752), section 3.4. For each sequence and channel, with W taps:
    pre_t = bias + sum_k weight_k x_t-(W-1)+k      y_t = pre_t, or silu(pre_t)
where x before the first step is the state: the W - 1 inputs that came before, oldest first.
Backward, from g_t = dy_t act'(pre_t), which is 0 outside the sequence:
    dx_t = sum_k weight_k g_t+(W-1)-k      dweight_k = sum_B,t g_t x_t-(W-1)+k      dbias = sum_B,t g_t
and the state's gradient is dx before the first step. Saved: the inputs; pre is computed again.

B batch, D channels, L time, W width, S documents; T new steps and N remembered ones of an update.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.ops import _checks, _documents, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public

OP = Op("causal_conv1d", kernels=("triton", "cpu"))
ACTIVATIONS = {None: False, "silu": True, "swish": True}
WIDTHS = (2, 3, 4)

Result = Tensor | tuple[Tensor, Tensor]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Result:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    before = weight.shape[1] - 1

    def convolve(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = x.new_zeros(*x.shape[:2], before) if state is None else state.to(wide)
        joined, length = torch.cat([state, x], -1), x.shape[2]
        y = sum((weight[:, k, None].to(wide) * joined[..., k : k + length] for k in range(before + 1)), x.new_zeros(()))
        y = y if bias is None else y + bias.to(wide)[:, None]
        return (F.silu(y) if ACTIVATIONS[activation] else y), joined[..., length:]

    if seq_idx is not None:
        rows = []
        for row, numbers in zip(x.to(wide).split(1), seq_idx, strict=True):
            lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist() or [0]
            rows.append(torch.cat([convolve(piece, None)[0] for piece in row.split(lengths, -1)], -1))
        return (torch.cat(rows) if rows else x).to(x.dtype)
    if cu_seqlens is None:
        y, final = convolve(x.to(wide), initial_state)
    else:
        pieces = x.to(wide).split(cu_seqlens.diff().tolist(), -1)
        states = [None] * len(pieces) if initial_state is None else initial_state.split(1)
        both = [convolve(piece, state) for piece, state in zip(pieces, states, strict=True)]
        y, final = torch.cat([y for y, _ in both], -1), torch.cat([state for _, state in both])
    return (y.to(x.dtype), final.to(x.dtype)) if return_final_state else y.to(x.dtype)


@public(reference)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Result:
    """The causal convolution over time, one filter of 2 to 4 taps a channel, computed in float32.

    Args:
        x: (B, D, L), float32, bfloat16 or float16 (float64 on the torch backend); any strides, so that a view of
            (B, L, D) is read in place.
        weight: (D, W), W from 2 to 4; the last tap is the step's own input. bias: (D,). Any float dtype.
        activation: None, or "silu" (which "swish" also names).
        initial_state: (B, D, W - 1), the inputs before the first step, oldest first; zeros when None.
        return_final_state: also return the last W - 1 inputs, the initial state's among them where L < W - 1.
        cu_seqlens: (S + 1,) int32, where documents packed into one sequence begin, from 0, and L at last; B must be 1.
            Each starts from its own state; initial and final states are (S, D, W - 1).
        seq_idx: (B, L) int32, the number of the document that a step belongs to: a step reads back as far as the number
            stays the same. Such documents have no states.

    Returns:
        y (B, D, L) in x's dtype and, where x is dense, its strides; or (y, final_state), the latter (B, D, W - 1) in
        x's dtype.

    Raises:
        ValueError: shapes, devices, an activation or combinations that do not fit; on the CPU also offsets that are
            none (on CUDA only with LLMCORE_CHECK=1). TypeError: a dtype that is not allowed.
    """
    _checks.floating("causal_conv1d", "x", x)
    _checks.rank("causal_conv1d", "x", x, "(B, D, L)", 3)
    silu = _check_filter("causal_conv1d", x, weight, bias, activation)
    batch, channels, length = x.shape
    before = weight.shape[1] - 1
    rows = batch if cu_seqlens is None else _documents.count("causal_conv1d", cu_seqlens, x, batch)
    if initial_state is not None:
        _checks.floating("causal_conv1d", "initial_state", initial_state)
        dims = "(B, D, W - 1)" if cu_seqlens is None else "(S, D, W - 1)"
        _checks.shape("causal_conv1d", "initial_state", initial_state, dims, (rows, channels, before))
        _checks.like("causal_conv1d", "initial_state", initial_state, "x", x, dtype=False)
    if seq_idx is not None:
        _check_seq_idx(seq_idx, x, initial_state, return_final_state, cu_seqlens)
    bias, initial_state = (None if t is None else _checks.at_most_as_wide(t, x) for t in (bias, initial_state))
    y, final_state = _causal_conv1d(
        x, _checks.at_most_as_wide(weight, x), bias, initial_state, cu_seqlens, seq_idx, silu, bool(return_final_state),
        resolve("causal_conv1d", x),
    )  # fmt: skip
    return (y, final_state) if return_final_state else y


def _check_filter(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Whether the activation is silu; x is (B, D, ...). The classic mistake is a transposed tensor, which is named."""
    channels = x.shape[1]
    _checks.floating(op, "weight", weight)
    _checks.rank(op, "weight", weight, "(D, W)", 2)
    if weight.shape[0] != channels:
        given = f"{op}: weight must be (D, W) with x's D = {channels} channels, but its shape is {tuple(weight.shape)}"
        hint = ""
        if weight.shape[1] == channels:
            hint = "; it looks transposed, with the taps before the channels"
        elif x.dim() == 3 and x.shape[2] == weight.shape[0]:
            hint = f" and x's is {tuple(x.shape)}; x looks transposed, with time before the channels"
        raise ValueError(f"{given}{hint}.")
    if weight.shape[1] not in WIDTHS:
        raise ValueError(f"{op}: weight has width {weight.shape[1]}; allowed: {WIDTHS[0]} to {WIDTHS[-1]}.")
    _checks.like(op, "weight", weight, "x", x, dtype=False)
    if bias is not None:
        _checks.floating(op, "bias", bias)
        _checks.shape(op, "bias", bias, "(D,)", (channels,))
        _checks.like(op, "bias", bias, "x", x, dtype=False)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; allowed: None, 'silu' or 'swish', which is the same.")
    return ACTIVATIONS[activation]


def _check_seq_idx(
    seq_idx: Tensor, x: Tensor, initial_state: Tensor | None, return_final_state: bool, cu_seqlens: Tensor | None
) -> None:
    _documents.check_numbers("causal_conv1d", seq_idx, x, (x.shape[0], x.shape[2]))
    for name, given in (
        ("initial_state", initial_state is not None),
        ("return_final_state", return_final_state),
        ("cu_seqlens", cu_seqlens is not None),
    ):
        if given:
            raise ValueError(
                f"causal_conv1d: seq_idx and {name} were given together; allowed: one of them, since documents marked "
                "by seq_idx have no states."
            )


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    before = weight.shape[1] - 1
    final = x.new_empty((_rows(x, cu_seqlens), x.shape[1], before) if return_final_state else (0,))
    return torch.empty_like(x), final


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _documents.check_values("causal_conv1d", cu_seqlens, x.shape[2])
    inputs = (x, weight, bias, initial_state, cu_seqlens, seq_idx)
    y, final = _fake(*inputs, silu, return_final_state, backend)
    if y.numel() + final.numel() == 0:
        return y, final
    if backend == "torch":
        _forward_torch(*inputs, silu, y, final if return_final_state else None)
        return y, final
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    if backend == "triton":
        from llmcore.kernels import causal_conv1d as kernel

        kernel.causal_conv1d_fwd(
            x, weight, bias, initial_state, offsets, seq_idx, silu, y, final if return_final_state else None
        )
        return y, final
    view = _native.view
    _native.module(backend).causal_conv1d_fwd(
        view(x), view(weight), view(bias), view(initial_state), view(offsets), view(seq_idx), view(y),
        view(final if return_final_state else None), *x.shape, weight.shape[1], _documents.number(cu_seqlens), silu,
    )  # fmt: skip
    return y, final


def _spans(cu_seqlens: Tensor | None, length: int) -> Iterator[tuple[int, int, slice]]:
    """The first step, the end and the rows of the states of each document, or of all sequences at once."""
    if cu_seqlens is None:
        yield 0, length, slice(None)
        return
    offsets = cu_seqlens.tolist()
    for i, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        yield begin, end, slice(i, i + 1)


def _own(seq_idx: Tensor | None, lags: int) -> list[Tensor | None]:
    """For each lag whether the input so many steps back is of the step's own document: (B, 1, L); None says all are."""
    if seq_idx is None:
        return [None] * lags
    length = seq_idx.shape[1]
    goes_on = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0))[:, :length]
    own = torch.ones_like(goes_on)
    all_: list[Tensor | None] = [None]
    for lag in range(1, lags):
        own = own & F.pad(goes_on, (lag - 1, 0))[:, :length]
        all_.append(own[:, None])
    return all_


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t.masked_fill(~mask, 0)


def _joined(x: Tensor, initial_state: Tensor | None, rows: slice, before: int, wide: torch.dtype) -> Tensor:
    """One document's inputs after its state."""
    state = x.new_zeros(*x.shape[:2], before) if initial_state is None else initial_state[rows]
    return torch.cat([state.to(wide), x.to(wide)], -1)


def _pre(taps: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    pre = weight[:, :1] * taps[0]
    for k, tap in enumerate(taps[1:], 1):
        pre = pre + weight[:, k, None] * tap
    return pre if bias is None else pre + bias.to(weight.dtype)[:, None]


def _forward_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    y: Tensor,
    final: Tensor | None,
) -> None:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, width = weight.to(wide), weight.shape[1]
    own = _own(seq_idx, width)
    for begin, end, rows in _spans(cu_seqlens, x.shape[2]):
        length = end - begin
        joined = _joined(x[..., begin:end], initial_state, rows, width - 1, wide)
        taps = [_masked(joined[..., k : k + length], own[width - 1 - k]) for k in range(width)]
        pre = _pre(taps, weight, bias)
        y[..., begin:end] = F.silu(pre) if silu else pre
        if final is not None:
            final[rows] = joined[..., length:].to(final.dtype)


def _backward_fake(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = weight.new_empty(0)
    return (
        torch.empty_like(x),
        _native.empty_like(weight),
        none if bias is None else _native.empty_like(bias),
        none.clone() if initial_state is None else _native.empty_like(initial_state),
    )


def _backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if dy is None:
        dy = torch.zeros_like(x)
    inputs = (dy, dfinal, x, weight, bias, initial_state, cu_seqlens, seq_idx)
    grads = _backward_fake(*inputs, silu, backend)
    if backend == "torch":
        return _backward_torch(*inputs, silu, grads)
    batch, width = x.shape[0], weight.shape[1]
    if x.shape[1] == 0 or batch == 0:
        for grad in grads:
            grad.zero_()
        return grads
    dx, dweight, dbias, dinitial = grads
    inner = 2 if x.stride(2) == 1 else 1
    if x.stride(inner) == 1 and dy.stride(inner) != 1:
        dy = torch.empty_like(x).copy_(dy)
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    dstate = None if initial_state is None else dinitial
    if backend == "triton":
        from llmcore.kernels import causal_conv1d as kernel

        dfilter = kernel.causal_conv1d_bwd(
            dy, dfinal, x, weight, bias, initial_state, offsets, seq_idx, silu, dx, dstate
        )
    else:
        dfilter = weight.new_empty((batch, width + 1, x.shape[1]), dtype=torch.float32)
        view = _native.view
        _native.module(backend).causal_conv1d_bwd(
            view(dy), view(dfinal), view(x), view(weight), view(bias), view(initial_state), view(offsets),
            view(seq_idx), view(dx), view(dfilter), view(dstate), *x.shape, width, _documents.number(cu_seqlens), silu,
        )  # fmt: skip
    sums = dfilter[0] if dfilter.shape[0] == 1 else dfilter.sum(0)
    dweight.copy_(sums[:width].t())
    if bias is not None:
        dbias.copy_(sums[width])
    return grads


def _backward_torch(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps_weight, width = weight.to(wide), weight.shape[1]
    own = _own(seq_idx, width)
    dx, dweight, dbias, dinitial = grads
    dweight_wide = torch.zeros_like(taps_weight)
    dbias_wide = dweight_wide.new_zeros(x.shape[1])
    for begin, end, rows in _spans(cu_seqlens, x.shape[2]):
        length = end - begin
        joined = _joined(x[..., begin:end], initial_state, rows, width - 1, wide)
        taps = [_masked(joined[..., k : k + length], own[width - 1 - k]) for k in range(width)]
        g = dy[..., begin:end].to(wide)
        if silu:
            pre = _pre(taps, taps_weight, bias)
            p = torch.sigmoid(pre)
            g = g * p * (1 + pre * (1 - p))
        djoined = torch.zeros_like(joined)
        if dfinal is not None:
            djoined[..., length:] = dfinal[rows]
        for k, tap in enumerate(taps):
            djoined[..., k : k + length] += _masked(taps_weight[:, k, None] * g, own[width - 1 - k])
            dweight_wide[:, k] += (g * tap).sum((0, 2))
        dbias_wide += g.sum((0, 2))
        dx[..., begin:end] = djoined[..., width - 1 :]
        if initial_state is not None:
            dinitial[rows] = djoined[..., : width - 1].to(dinitial.dtype)
    dweight.copy_(dweight_wide)
    if bias is not None:
        dbias.copy_(dbias_wide)
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu, return_final_state, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    if not return_final_state:
        ctx.mark_non_differentiable(outputs[1])


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None and dfinal is None:
        return (None,) * 9
    grads = _causal_conv1d_backward(dy, dfinal, *ctx.saved_tensors, ctx.silu, ctx.backend)
    needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
    return (*needed, None, None, None, None, None)


def update_reference(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = x if x.dim() == 3 else x[..., None]
    joined = torch.cat([conv_state.to(wide), steps.to(wide)], -1)
    conv_state.copy_(joined[..., steps.shape[2] :])
    y = reference(joined, weight, bias, activation)
    assert isinstance(y, Tensor)
    return y[..., conv_state.shape[2] :].reshape(x.shape).to(x.dtype)


@public(update_reference)
def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """One or more further steps of causal_conv1d, from a state that is brought up to date in place; no gradient.

    Args:
        x: (B, D), or (B, D, T) for T steps; float32, bfloat16 or float16 (float64 on the torch backend), any strides.
        conv_state: (B, D, N), the last N >= W - 1 inputs, oldest first; shifted by T, with x at its end. Any strides,
            any float dtype.
        weight, bias, activation: as causal_conv1d takes them.

    Returns:
        y of x's shape and dtype.

    Raises:
        ValueError: shapes, devices or an activation that do not fit. TypeError: a dtype that is not allowed.
    """
    _checks.floating("causal_conv1d_update", "x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"causal_conv1d_update: x must be (B, D) or (B, D, T), but its shape is {tuple(x.shape)}.")
    silu = _check_filter("causal_conv1d_update", x, weight, bias, activation)
    _checks.floating("causal_conv1d_update", "conv_state", conv_state)
    _checks.rank("causal_conv1d_update", "conv_state", conv_state, "(B, D, N)", 3)
    least = weight.shape[1] - 1
    if conv_state.shape[:2] != x.shape[:2] or conv_state.shape[2] < least:
        raise ValueError(
            f"causal_conv1d_update: conv_state must be (B, D, N) = ({x.shape[0]}, {x.shape[1]}, at least {least}), but "
            f"its shape is {tuple(conv_state.shape)}."
        )
    _checks.like("causal_conv1d_update", "conv_state", conv_state, "x", x, dtype=False)
    if conv_state.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(
            f"causal_conv1d_update: conv_state has dtype float64, but x has {_checks.name_of(x.dtype)}; allowed: a "
            "state that is no wider than float32."
        )
    weight, bias = _checks.at_most_as_wide(weight, x), None if bias is None else _checks.at_most_as_wide(bias, x)
    return _causal_conv1d_update(x, conv_state, weight, bias, silu, resolve("causal_conv1d", x))


def _update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str) -> Tensor:
    # The dispatcher does not do this for operators in Python, and the short way does not meet it.
    torch.autograd.graph.increment_version(conv_state)
    y = torch.empty_like(x)
    if backend == "torch" or x.numel() == 0:
        return y.copy_(update_reference(x, conv_state, weight, bias, "silu" if silu else None))
    steps, y_steps = (t if t.dim() == 3 else t[..., None] for t in (x, y))
    if backend == "triton":
        from llmcore.kernels import causal_conv1d as kernel

        kernel.causal_conv1d_update(steps, conv_state, weight, bias, silu, y_steps)
        return y
    view = _native.view
    _native.module(backend).causal_conv1d_update(
        view(steps), view(conv_state), view(weight), view(bias), view(y_steps), *steps.shape, conv_state.shape[2],
        weight.shape[1], silu,
    )  # fmt: skip
    return y


def _update_fake(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str
) -> Tensor:
    return torch.empty_like(x)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor? seq_idx, bool silu"
)
_causal_conv1d = operator(
    f"causal_conv1d({_ARGUMENTS}, bool return_final_state, str backend) -> (Tensor y, Tensor final_state)",
    _forward,
    _fake,
    _save,
    _differentiate,
)
_causal_conv1d_backward = operator(
    f"causal_conv1d_backward(Tensor? dy, Tensor? dfinal_state, {_ARGUMENTS}, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    _backward,
    _backward_fake,
)
_causal_conv1d_update = operator(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, str backend)"
    " -> Tensor",
    _update,
    _update_fake,
)
