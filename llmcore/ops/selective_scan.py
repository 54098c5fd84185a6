"""selective_scan: the recurrence of a state-space model whose step, input and output depend on the token.

Gu and Dao, "Mamba", 2023 (arXiv:2312.00752), algorithm 2. For each sequence and channel, over the N states:
    dt = delta + delta_bias, or softplus of it
    h_t = exp(dt_t A) h_t-1 + dt_t u_t B_t      y_t = sum_N C_t h_t + D u_t      out = y * silu(z)
Backward, from dy = dout * silu(z), with dh_t = C_t dy_t + exp(dt_t+1 A) dh_t+1 and a_t = exp(dt_t A):
    dC_t = sum_D dy_t h_t        dB_t = sum_D dh_t dt_t u_t        du_t = dt_t sum_N dh_t B_t + D dy_t
    ddt_t = sum_N dh_t (A a_t h_t-1 + u_t B_t)        dA = sum_t dh_t dt_t a_t h_t-1
Saved: the inputs, and the state before every CHUNK-th step, from which the backward computes the others again.

B batch, D channels, L time, N states, G groups of channels that share B and C, K = ceil(L / CHUNK), S documents.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.ops import _checks, _documents, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public

OP = Op("selective_scan", kernels=("triton", "cpu"))
CHUNK = 64

Result = Tensor | tuple[Tensor, Tensor]


def reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Result:
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    channels, length = u.shape[1:]
    dt = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    B, C = (t.to(wide).view(t.shape[0], -1, *t.shape[-2:]) for t in (B, C))
    B, C = (t.repeat_interleave(channels // t.shape[1], 1) for t in (B, C))
    # For each step (B, D, N). An indexed step would have a gradient of the size of all.
    decays = torch.exp(dt.permute(2, 0, 1)[..., None] * A.to(wide)).unbind()
    gains = ((dt * u.to(wide)).permute(2, 0, 1)[..., None] * B.permute(3, 0, 1, 2)).unbind()
    outputs = C.permute(3, 0, 1, 2).contiguous().unbind()
    ends = [length] if cu_seqlens is None else cu_seqlens.tolist()[1:]
    ys, states, t = [], [], 0
    for document, end in enumerate(ends):
        of_document = slice(None) if cu_seqlens is None else slice(document, document + 1)
        h = dt.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(wide)[of_document]
        for step in range(t, end):
            h = decays[step] * h + gains[step]
            ys.append((h * outputs[step]).sum(-1))
        t = end
        states.append(h)
    y = torch.stack(ys, -1) if ys else u.to(wide)
    y = y if D is None else y + D.to(wide)[:, None] * u.to(wide)
    y = (y if z is None else y * F.silu(z.to(wide))).to(u.dtype)
    return (y, torch.cat(states)) if return_last_state else y


@public(reference)
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """The selective scan of Mamba (Gu and Dao, 2023), its state in float32.

    Args:
        u: (B, D, L), float32, bfloat16 or float16 (float64 on the torch backend); any strides, so that a view of
            (B, L, D) is read in place.
        delta: (B, D, L), the step; at least 0 unless delta_softplus, after delta_bias is added.
        A: (D, N), N from 1 to 256; real, as a rule negative.
        B, C: (B, N, L), or (B, G, N, L) with D a multiple of G: channel d reads group d // (D // G).
        D: (D,), a skip connection. z: (B, D, L), a gate: the output is multiplied by silu(z).
        delta_bias: (D,), added to delta; delta_softplus: then softplus is taken.
        return_last_state: also return the state after the last step.
        initial_state: (B, D, N), the state before the first step; zeros when None.
        cu_seqlens: (S + 1,) int32, where documents packed into one sequence begin, from 0, and L at last; B must be 1.
            Each starts from its own state; initial and last states are (S, D, N).

    Returns:
        y (B, D, L) in u's dtype and, where u is dense, its strides; or (y, last_state), the latter (B, D, N), float32.

    Raises:
        ValueError: shapes or devices that do not fit; on the CPU also a delta that is negative or no number without
            delta_softplus, and offsets that are none (on CUDA only with LLMCORE_CHECK=1). TypeError: a dtype that is
            not allowed.
    """
    _checks.floating("selective_scan", "u", u)
    _checks.rank("selective_scan", "u", u, "(B, D, L)", 3)
    batch, channels, length = u.shape
    _checks.floating("selective_scan", "A", A)
    _checks.rank("selective_scan", "A", A, "(D, N)", 2)
    states = A.shape[1]
    _checks.shape("selective_scan", "A", A, "(D, N)", (channels, states))
    if not 1 <= states <= 256:
        raise ValueError(f"selective_scan: A has {states} states; allowed: 1 to 256.")
    B = _grouped("B", B, u, states)
    C = _grouped("C", C, u, states)
    _checks.shape("selective_scan", "C", C, "B's shape, as (B, G, N, L)", tuple(B.shape))
    rows = batch if cu_seqlens is None else _documents.count("selective_scan", cu_seqlens, u, batch)
    for name, tensor, dims, shape in (
        ("delta", delta, "(B, D, L)", u.shape),
        ("D", D, "(D,)", (channels,)),
        ("z", z, "(B, D, L)", u.shape),
        ("delta_bias", delta_bias, "(D,)", (channels,)),
        ("initial_state", initial_state, "(B, D, N)" if cu_seqlens is None else "(S, D, N)", (rows, channels, states)),
    ):
        if tensor is not None:
            _checks.floating("selective_scan", name, tensor)
            _checks.shape("selective_scan", name, tensor, dims, tuple(shape))
            _checks.like("selective_scan", name, tensor, "u", u, dtype=False)
    _checks.like("selective_scan", "A", A, "u", u, dtype=False)
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    small = (None if t is None else t.to(wide).contiguous() for t in (D, delta_bias, initial_state))
    D, delta_bias, initial_state = small
    delta, B, C = (_checks.at_most_as_wide(t, u) for t in (delta, B, C))
    z = None if z is None else _checks.at_most_as_wide(z, u)
    inputs = (u, delta, A.to(wide).contiguous(), B, C, D, z, delta_bias, initial_state)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, last_state, _ = _selective_scan(*inputs, cu_seqlens, bool(delta_softplus), keep, resolve("selective_scan", u))
    return (y, last_state) if return_last_state else y


def _grouped(name: str, t: Tensor, u: Tensor, states: int) -> Tensor:
    """B or C as (B, G, N, L). The classic mistake is a transposed one, so that the axis is named."""
    _checks.floating("selective_scan", name, t)
    _checks.like("selective_scan", name, t, "u", u, dtype=False)
    batch, channels, length = u.shape
    if t.dim() not in (3, 4):
        raise ValueError(
            f"selective_scan: {name} must be (B, N, L) or (B, G, N, L), but its shape is {tuple(t.shape)}."
        )
    grouped = t if t.dim() == 4 else t.unsqueeze(1)
    sizes = {"B": (grouped.shape[0], batch), "N": (grouped.shape[2], states), "L": (grouped.shape[3], length)}
    wrong = [
        f"axis {axis} is {given}, not {expected}" for axis, (given, expected) in sizes.items() if given != expected
    ]
    if wrong:
        hint = ""
        if grouped.shape[2:] == (length, states) or (t.dim() == 4 and t.shape[1:] == (length, t.shape[2], states)):
            hint = "; it looks transposed, with time before the states"
        dims = "(B, N, L)" if t.dim() == 3 else "(B, G, N, L)"
        raise ValueError(
            f"selective_scan: {name} must be {dims}, but its shape is {tuple(t.shape)}: {', '.join(wrong)}{hint}."
        )
    if grouped.shape[1] == 0 or channels % grouped.shape[1]:
        raise ValueError(
            f"selective_scan: {name} has {grouped.shape[1]} groups; allowed: a divisor of u's {channels} channels."
        )
    return grouped


def _chunks(length: int) -> int:
    return -(-length // CHUNK)


def _require_steps(bad: bool) -> None:
    if bad:
        raise ValueError(
            "selective_scan: delta (with delta_bias) has an element that is negative or no number; allowed: at least "
            "0, or delta_softplus=True."
        )


def _outputs(
    u: Tensor, A: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last states as they are where a document has no step, and the states before each chunk (B, K, N, D)."""
    (batch, channels, length), states = u.shape, A.shape[1]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = A.new_zeros(rows, channels, states) if initial_state is None else initial_state.clone()
    saved = A.new_empty((batch, _chunks(length), states, channels) if keep else (0,))
    return torch.empty_like(u), last, saved


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _documents.check_values("selective_scan", cu_seqlens, u.shape[2])
    y, last, saved = outputs = _outputs(u, A, initial_state, cu_seqlens, keep)
    if y.numel() == 0:
        return outputs
    if backend == "torch":
        _forward_torch(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, *outputs)
        return outputs
    if backend == "triton":
        from llmcore.kernels import selective_scan as kernel

        if not delta_softplus and _documents.values_are_checked(u):
            _require_steps(not bool((_step(delta, delta_bias, False, A.dtype)[0] >= 0).all()))
        kept = saved if keep else None
        kernel.selective_scan_fwd(
            u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, y, last, kept
        )
        return outputs
    view = _native.view
    bad = _native.module(backend).selective_scan_fwd(
        view(u), view(delta), view(A), view(B), view(C), view(D), view(z), view(delta_bias), view(initial_state),
        view(cu_seqlens), view(y), view(last), view(saved if keep else None), *u.shape, A.shape[1], B.shape[1],
        _documents.number(cu_seqlens), delta_softplus,
    )  # fmt: skip
    _require_steps(bad)
    return outputs


def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(u, A, initial_state, cu_seqlens, keep)


def _step(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(dt, what softplus is taken of)"""
    raw = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias[:, None]
    return (F.softplus(raw) if delta_softplus else raw), raw


def _per_channel(t: Tensor, channels: int, wide: torch.dtype) -> Tensor:
    """(B, G, N, L) as (B, D, N, L)."""
    return t.to(wide).repeat_interleave(channels // t.shape[1], 1)


def _forward_torch(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    y: Tensor,
    last: Tensor,
    saved: Tensor,
) -> None:
    channels, length = u.shape[1:]
    dt, _ = _step(delta, delta_bias, delta_softplus, A.dtype)
    if not delta_softplus and _documents.values_are_checked(u):
        _require_steps(not bool((dt >= 0).all()))
    B, C, u_wide = _per_channel(B, channels, A.dtype), _per_channel(C, channels, A.dtype), u.to(A.dtype)
    spans = _documents.Spans(cu_seqlens, length)
    h = A.new_zeros(u.shape[0], *A.shape)
    for t in range(length):
        if t % CHUNK == 0 and saved.numel():
            saved[:, t // CHUNK] = h.transpose(1, 2)
        start, end, rows = spans.of(t)
        if t == start:
            h = last[rows]  # until the end it holds the initial state
        step = dt[..., t, None]
        h = torch.exp(step * A) * h + step * u_wide[..., t, None] * B[..., t]
        out = (h * C[..., t]).sum(-1)
        out = out if D is None else out + D * u_wide[..., t]
        y[..., t] = out if z is None else out * F.silu(z[..., t].to(A.dtype))
        if t + 1 == end:
            last[rows] = h


def _backward(
    dy: Tensor | None,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if dy is None:
        dy = torch.zeros_like(u)
    batch, channels, length = u.shape
    states, groups = A.shape[1], B.shape[1]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dlast = None if dlast is None else dlast.contiguous()
    dinitial = A.new_zeros(rows, channels, states) if dlast is None else dlast.clone()
    if dy.numel() == 0:
        zeros = (
            torch.zeros_like(t) if t is not None else A.new_empty(0) for t in (u, delta, A, B, C, D, z, delta_bias)
        )
        return (*zeros, dinitial)
    if backend == "torch":
        return _backward_torch(
            dy, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, saved, delta_softplus, dinitial
        )
    none = A.new_empty(0)
    if backend == "triton":
        from llmcore.kernels import selective_scan as kernel

        grads = kernel.selective_scan_bwd(
            dy, dlast, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, saved, delta_softplus, dinitial
        )
        return (*(none if grad is None else grad for grad in grads), dinitial)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = A.new_empty(0) if z is None else torch.empty_like(z)
    # Sums over the batch, or over the threads' shares of the channels, are left to PyTorch.
    shares = max(1, min(torch.get_num_threads() // max(1, batch * groups), channels // groups))
    dA, dB, dC = (
        A.new_empty(batch, channels, states),
        A.new_empty(shares, batch, groups, states, length),
        A.new_empty(shares, batch, groups, states, length),
    )
    dD = A.new_empty((batch, channels) if D is not None else (0,))
    dbias = A.new_empty((batch, channels) if delta_bias is not None else (0,))
    view = _native.view
    _native.module(backend).selective_scan_bwd(
        view(dy), view(u), view(delta), view(A), view(B), view(C), view(D), view(z), view(delta_bias),
        view(initial_state), view(cu_seqlens), view(saved), view(du), view(ddelta), view(dA), view(dB), view(dC),
        view(None if D is None else dD), view(None if z is None else dz), view(None if delta_bias is None else dbias),
        view(dinitial), *u.shape, states, groups, _documents.number(cu_seqlens), shares, delta_softplus,
    )  # fmt: skip
    dB, dC = (d[0] if shares == 1 else d.sum(0) for d in (dB, dC))
    sums = (d.sum(0) if d.numel() else d for d in (dD, dbias))
    dD, dbias = sums
    return du, ddelta, dA.sum(0), dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias, dinitial


def _backward_torch(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
    dinitial: Tensor,
) -> tuple[Tensor, ...]:
    """dinitial holds dlast, and gets the gradient of the initial state."""
    channels, length = u.shape[1:]
    dt, raw = _step(delta, delta_bias, delta_softplus, A.dtype)
    B_wide, C_wide = _per_channel(B, channels, A.dtype), _per_channel(C, channels, A.dtype)
    u_wide, dout = u.to(A.dtype), dy.to(A.dtype)
    gate = None if z is None else z.to(A.dtype)
    dy_wide = dout if gate is None else dout * F.silu(gate)
    du = torch.zeros_like(u_wide) if D is None else D[:, None] * dy_wide
    y = torch.zeros_like(u_wide) if D is None else D[:, None] * u_wide
    ddt, dA = torch.empty_like(dt), torch.zeros_like(A)
    dB, dC = torch.empty_like(B, dtype=A.dtype), torch.empty_like(C, dtype=A.dtype)
    dh = torch.zeros_like(dinitial[:1]) if cu_seqlens is not None else torch.zeros_like(dinitial)
    spans = _documents.Spans(cu_seqlens, length)

    def per_group(t: Tensor) -> Tensor:
        return t.unflatten(1, (B.shape[1], -1)).sum(2)

    for chunk in reversed(range(_chunks(length))):
        steps = range(chunk * CHUNK, min(length, (chunk + 1) * CHUNK))
        h, before, after = saved[:, chunk].transpose(1, 2), [], []
        for t in steps:
            start, _, rows = spans.of(t)
            if t == start:
                h = torch.zeros_like(h) if initial_state is None else initial_state[rows]
            before.append(h)
            h = torch.exp(dt[..., t, None] * A) * h + (dt * u_wide)[..., t, None] * B_wide[..., t]
            after.append(h)
        for t in reversed(steps):
            start, end, rows = spans.of(t)
            if t + 1 == end:
                dh = dinitial[rows]
            step, h_before, h_after = dt[..., t, None], before.pop(), after.pop()
            decay = torch.exp(step * A)
            dh = dh + C_wide[..., t] * dy_wide[..., t, None]
            y[..., t] += (h_after * C_wide[..., t]).sum(-1)
            dC[..., t] = per_group(h_after * dy_wide[..., t, None])
            dB[..., t] = per_group(dh * (step * u_wide[..., t, None]))
            through = dh * decay * h_before
            gain = (dh * B_wide[..., t]).sum(-1)
            ddt[..., t] = (through * A).sum(-1) + gain * u_wide[..., t]
            du[..., t] += gain * dt[..., t]
            dA += (through * step).sum(0)
            dh = dh * decay
            if t == start:
                dinitial[rows] = dh
    draw = ddt * torch.sigmoid(raw) if delta_softplus else ddt
    none = A.new_empty(0)
    dz = none
    if z is not None and gate is not None:
        p = torch.sigmoid(gate)
        dz = torch.empty_like(z).copy_(dout * y * p * (1 + gate * (1 - p)))
    return (
        torch.empty_like(u).copy_(du),
        torch.empty_like(delta).copy_(draw),
        dA,
        dB.to(B.dtype).contiguous(),
        dC.to(C.dtype).contiguous(),
        none if D is None else (dy_wide * u_wide).sum((0, 2)),
        dz,
        none if delta_bias is None else draw.sum((0, 2)),
        dinitial,
    )


def _backward_fake(
    dy: Tensor | None,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    none = A.new_empty(0)
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        _native.empty_like(A),
        _native.empty_like(B),
        _native.empty_like(C),
        none if D is None else _native.empty_like(D),
        none if z is None else torch.empty_like(z),
        none if delta_bias is None else _native.empty_like(delta_bias),
        A.new_empty(rows, *A.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, outputs[2])
    ctx.mark_non_differentiable(outputs[2])


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None and dlast is None:
        return (None,) * 13
    *tensors, saved = ctx.saved_tensors
    if saved.dim() == 1:
        raise RuntimeError("selective_scan was told to keep no states, without which there is no backward.")
    *grads, dinitial = _selective_scan_backward(dy, dlast, *tensors, saved, ctx.delta_softplus, ctx.backend)
    grads = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*grads, dinitial if ctx.needs_input_grad[8] else None, None, None, None, None)


_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    " Tensor? initial_state, Tensor? cu_seqlens"
)
_selective_scan = operator(
    f"selective_scan({_ARGUMENTS}, bool delta_softplus, bool keep, str backend)"
    " -> (Tensor y, Tensor last_state, Tensor saved)",
    _forward,
    _fake,
    _save,
    _differentiate,
)
_selective_scan_backward = operator(
    f"selective_scan_backward(Tensor? dy, Tensor? dlast, {_ARGUMENTS}, Tensor saved, bool delta_softplus, str backend)"
    " -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias,"
    " Tensor dinitial_state)",
    _backward,
    _backward_fake,
)
