"""ssd: the recurrence of Mamba-2, whose states decay by one number per head, so that a chunk of it is matrix products.

Dao and Gu, "Transformers are SSMs", 2024 (arXiv:2405.21060). For each sequence and head, with l_t = dt_t A:
    h_t = exp(l_t) h_t-1 + dt_t x_t B_t^T      y_t = h_t C_t + D x_t      out = y * silu(z)
where dt is first biased, then taken softplus of, then clamped. In a chunk, with L_ts = exp(l_s+1 + ... + l_t) for
s <= t, with b the step before it and e its last, this is
    y_t = sum_s<=t L_ts (C_t B_s) dt_s x_s + L_tb h_b C_t + D x_t      h_e = L_eb h_b + sum_s L_es dt_s x_s B_s^T
Backward, from dy = dout * silu(z) and the gradient dh_e of the chunk's last state:
    v_s = sum_t L_ts (C_t B_s) dy_t + L_es dh_e B_s                   dx_s = dt_s v_s + D dy_s
    dB_s = dt_s (sum_t L_ts (dy_t x_s) C_t + L_es dh_e^T x_s)         dh_b = L_eb dh_e + sum_t L_tb dy_t C_t^T
    dC_t = sum_s L_ts (dy_t x_s) dt_s B_s + L_tb h_b^T dy_t           ddt_s = x_s v_s + A dl_s      dA = sum_s dt_s dl_s
    dl_j = L_eb (dh_e, h_b) + sum over s < j <= t of L_ts (C_t B_s) (dy_t x_s) dt_s
           + sum_t>=j L_tb dy_t h_b C_t + sum_s<j L_es dt_s x_s dh_e B_s
dl is summed as it stands here: a running sum of what goes in and out would be shorter, and wrong where all has decayed.
Saved: the inputs; the states are computed again.

B batch, L time, H heads, P head size, N states, G groups of heads that share B and C, S documents.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.ops import _checks, _documents, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public

OP = Op("ssd", kernels=("triton", "cpu"))

Result = Tensor | tuple[Tensor, Tensor]


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Result:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, heads, _ = x.shape
    x_wide = x.to(wide)
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    B, C = (t.to(wide).repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    # [row][t], (H, P, N) each. An indexed step would have a gradient of the size of all.
    decays = [row.unbind() for row in torch.exp(step * A.to(wide))[..., None, None].unbind()]
    gains = [row.unbind() for row in (step[..., None] * x_wide)[..., None].unbind()]
    Bs, Cs = ([row.unbind() for row in t[:, :, :, None].unbind()] for t in (B, C))
    ys = torch.zeros_like(x_wide) if D is None else D.to(wide).reshape(heads, -1) * x_wide
    if initial_states is None:
        finals = list(x_wide.new_zeros(batch if cu_seqlens is None else len(cu_seqlens) - 1, *x.shape[2:], B.shape[3]))
    else:
        finals = list(initial_states.to(wide))
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    for row, first, end, initial, final in _documents.table(x, cu_seqlens, seq_idx).tolist():
        h = torch.zeros_like(finals[0]) if initial < 0 else finals[initial]
        for t in range(first, end):
            h = decays[row][t] * h + gains[row][t] * Bs[row][t]
            rows[row].append((h * Cs[row][t]).sum(-1))
        if final >= 0:
            finals[final] = h
    y = ys + torch.stack([torch.stack(row) for row in rows]) if length and batch else ys
    y = (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)
    if not return_final_states:
        return y
    return y, torch.stack(finals) if finals else x_wide.new_zeros(0, *x.shape[2:], B.shape[3])


@public(reference)
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Result:
    """Mamba-2's scan by state-space duality (Dao and Gu, 2024), its states in float32.

    Args:
        x: (B, L, H, P), float32, bfloat16 or float16 (float64 on the torch backend); P from 1 to 256.
        dt: (B, L, H), the step, before bias, softplus and limits.
        A: (H,), real, as a rule negative.
        B, C: (B, L, G, N), N from 1 to 256, H a multiple of G: head h reads group h // (H // G).
        chunk_size: steps that the torch backend turns into one matrix product; the kernels have sizes of their own.
            The result does not depend on it but for rounding.
        D: (H,) or (H, P), a skip connection. z: (B, L, H, P), a gate: the output is multiplied by silu(z).
        dt_bias: (H,), added to dt; dt_softplus: then softplus is taken; dt_limit: then it is clamped, from at least 0.
        initial_states: (B, H, P, N), the states before the first step; zeros when None.
        return_final_states: also return the states after the last step.
        cu_seqlens: (S + 1,) int32, where documents packed into one sequence begin, from 0, and L at last; B must be 1.
            Each starts from its own state; initial and final states are (S, H, P, N).
        seq_idx: (B, L) int32, the number of the document that a step belongs to: where it changes the states start from
            zero. Initial states are those of each row's first document, final ones those of its last. On CUDA the host
            waits for it: cu_seqlens is the faster form.

    Returns:
        y (B, L, H, P) in x's dtype; or (y, final_states), the latter (B, H, P, N), float32.

    Raises:
        ValueError: shapes, devices, limits or combinations that do not fit; on the CPU also a step that is no number,
            without dt_softplus, and offsets that are none (on CUDA only with LLMCORE_CHECK=1). TypeError: a dtype that
            is not allowed.
    """
    _checks.floating("ssd", "x", x)
    _checks.rank("ssd", "x", x, "(B, L, H, P)", 4)
    batch, length, heads, head_dim = x.shape
    _checks.floating("ssd", "A", A)
    _checks.shape("ssd", "A", A, "(H,)", (heads,))
    _checks.floating("ssd", "B", B)
    _checks.rank("ssd", "B", B, "(B, L, G, N)", 4)
    groups, states = B.shape[2:]
    if B.shape[:2] != (batch, length):
        raise ValueError(
            f"ssd: B must be (B, L, G, N) with x's B, L = {(batch, length)}, but its shape is {tuple(B.shape)}."
        )
    if groups == 0 or heads % groups:
        raise ValueError(f"ssd: B has {groups} groups; allowed: a divisor of x's {heads} heads.")
    for name, size, meaning in (("x", head_dim, "a head size"), ("B", states, "a number of states")):
        if not 1 <= size <= 256:
            raise ValueError(f"ssd: {name} has {meaning} of {size}; allowed: 1 to 256.")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size!r}; allowed: whole numbers from 1.")
    low, high = _limits(dt_limit)
    if cu_seqlens is not None and seq_idx is not None:
        raise ValueError("ssd: cu_seqlens and seq_idx are both given; allowed: one of them.")
    rows = batch if cu_seqlens is None else _documents.count("ssd", cu_seqlens, x, batch)
    D_is_wide = isinstance(D, Tensor) and D.dim() == 2
    for name, tensor, dims, shape in (
        ("dt", dt, "(B, L, H)", (batch, length, heads)),
        ("C", C, "B's shape, (B, L, G, N)", tuple(B.shape)),
        ("D", D, "(H, P)" if D_is_wide else "(H,)", (heads, head_dim) if D_is_wide else (heads,)),
        ("z", z, "(B, L, H, P)", tuple(x.shape)),
        ("dt_bias", dt_bias, "(H,)", (heads,)),
        (
            "initial_states", initial_states, "(B, H, P, N)" if cu_seqlens is None else "(S, H, P, N)",
            (rows, heads, head_dim, states),
        ),
    ):  # fmt: skip
        if tensor is not None:
            _checks.floating("ssd", name, tensor)
            _checks.shape("ssd", name, tensor, dims, shape)
            _checks.like("ssd", name, tensor, "x", x, dtype=False)
    for name, tensor in (("A", A), ("B", B)):
        _checks.like("ssd", name, tensor, "x", x, dtype=False)
    if seq_idx is not None:
        _documents.check_numbers("ssd", seq_idx, x, (batch, length))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    A = A.to(wide).contiguous()
    dt, B, C = (_checks.at_most_as_wide(t, x) for t in (dt, B, C))
    z = None if z is None else _checks.at_most_as_wide(z, x)
    D, dt_bias, initial_states = (None if t is None else t.to(wide).contiguous() for t in (D, dt_bias, initial_states))
    cu_seqlens, seq_idx = (None if t is None else t.contiguous() for t in (cu_seqlens, seq_idx))
    y, final_states = _ssd(
        x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, chunk_size, bool(dt_softplus), low, high,
        resolve("ssd", x),
    )  # fmt: skip
    return (y, final_states) if return_final_states else y


def _limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(limit) for limit in dt_limit)
    except (TypeError, ValueError):
        raise ValueError(f"ssd: dt_limit is {dt_limit!r}; allowed: two numbers, the first at least 0.") from None
    if not 0 <= low <= high:
        raise ValueError(f"ssd: dt_limit is ({low}, {high}); allowed: from at least 0 to no less.")
    return low, high


def _require_steps(bad: bool) -> None:
    if bad:
        raise ValueError("ssd: dt (with dt_bias) has an element that is no number; allowed: numbers.")


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _outputs(
    x: Tensor, A: Tensor, B: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and the final states as they are where a document has no step."""
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = A.new_zeros(rows, *x.shape[2:], B.shape[3]) if initial is None else _copy(initial)
    return _native.empty_like(x), final


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _documents.check_values("ssd", cu_seqlens, x.shape[1])
    y, final = _outputs(x, A, B, initial_states, cu_seqlens)
    if y.numel() == 0:
        return y, final
    if backend == "torch":
        _forward_torch(
            x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, chunk_size, dt_softplus, dt_min, dt_max,
            y, final,
        )  # fmt: skip
        return y, final
    if backend == "triton":
        from llmcore.kernels import ssd as kernel

        if not dt_softplus and _documents.values_are_checked(x):
            _require_steps(bool(_step(dt, dt_bias, False, dt_min, dt_max, A.dtype)[0].isnan().any()))
        kernel.ssd_fwd(
            *_readable(x, dt, A, B, C, D, z), dt_bias, initial_states, _rows(x, cu_seqlens, seq_idx), dt_softplus,
            dt_min, dt_max, y, final,
        )  # fmt: skip
        return y, final
    bad = _forward_cpu(
        x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, dt_softplus, dt_min, dt_max, y, final
    )
    _require_steps(bad)
    return y, final


def _readable(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As kernels read them: what has a head or a group of numbers for each step has them side by side."""
    near = _native.unit_stride
    return near(x), dt, A, near(B), near(C), D, None if z is None else near(z)


def _rows(x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None and seq_idx is None else _documents.table(x, cu_seqlens, seq_idx)


def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, A, B, initial_states, cu_seqlens)


def _step(
    dt: Tensor, dt_bias: Tensor | None, softplus: bool, low: float, high: float, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dt as the recurrence takes it, its derivative by what was given)"""
    raw = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    step = F.softplus(raw) if softplus else raw
    slope = torch.sigmoid(raw) if softplus else torch.ones_like(raw)
    return step.clamp(low, high), slope.masked_fill((step < low) | (step > high), 0)


class _Chunks:
    """The documents of one span of steps, all of one length, in chunks: (R, K, Q, ...) of R rows, K chunks, Q steps.

    Padding has steps of no size, which change nothing.
    """

    def __init__(self, step: Tensor, A: Tensor, B: Tensor, C: Tensor, size: int, heads: int) -> None:
        length = step.shape[1]
        self.size, self.length, self.heads = min(size, length), length, heads
        self.step = self.split(step)
        self.B, self.C = (self.split(t).repeat_interleave(heads // t.shape[2], 3) for t in (B, C))
        logs = (self.step * A).transpose(2, 3)  # (R, K, H, Q)
        steps = torch.ones(self.size, self.size, dtype=torch.bool, device=A.device)
        between = logs[..., None].expand(*logs.shape, self.size).masked_fill(~steps.tril(-1), 0).cumsum(-2)
        self.decay = torch.exp(between.masked_fill(~steps.tril(), -math.inf))  # L_ts, (R, K, H, Q, Q)
        self.from_start = torch.exp(logs.cumsum(-1)).transpose(2, 3)  # L_tb, (R, K, Q, H)
        self.to_end = self.decay[..., -1, :].transpose(2, 3)  # L_es
        self.whole = self.from_start[:, :, -1]  # L_eb, (R, K, H)
        self.products = torch.einsum("rkthn,rkshn->rkhts", self.C, self.B)

    def split(self, t: Tensor) -> Tensor:
        count = -(-self.length // self.size)
        padding = count * self.size - self.length
        if padding:
            t = torch.cat([t, t.new_zeros(t.shape[0], padding, *t.shape[2:])], 1)
        return t.unflatten(1, (count, self.size))

    def join(self, t: Tensor) -> Tensor:
        return t.flatten(1, 2)[:, : self.length]

    def states(self, x: Tensor, h: Tensor) -> tuple[list[Tensor], Tensor]:
        """The states before each chunk, and after the last; h before the first."""
        gains = torch.einsum("rkshp,rkshn,rksh->rkhpn", x, self.B, self.to_end * self.step)
        before = []
        for k in range(x.shape[1]):
            before.append(h)
            h = self.whole[:, k, :, None, None] * h + gains[:, k]
        return before, h

    def outputs(self, x: Tensor, h: Tensor) -> Tensor:
        """y without D and the gate; h: the states before each chunk, (R, K, H, P, N)."""
        inside = torch.einsum("rkhts,rkshp->rkthp", self.decay * self.products, x * self.step[..., None])
        return inside + torch.einsum("rkthn,rkhpn,rkth->rkthp", self.C, h, self.from_start)


def _forward_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    y: Tensor,
    final: Tensor,
) -> None:
    wide, heads = A.dtype, x.shape[2]
    step, _ = _step(dt, dt_bias, dt_softplus, dt_min, dt_max, wide)
    if not dt_softplus and _documents.values_are_checked(x):
        _require_steps(bool(step.isnan().any()))
    for at, initial, last in _documents.spans(x, cu_seqlens, seq_idx):
        chunks = _Chunks(step[at], A, B[at].to(wide), C[at].to(wide), chunk_size, heads)
        inputs = chunks.split(x[at].to(wide))
        h = torch.zeros_like(final[:1]) if initial is None or initial_states is None else initial_states[initial]
        before, h = chunks.states(inputs, h.expand(inputs.shape[0], *h.shape[1:]))
        y[at] = _gated(x[at], chunks.join(chunks.outputs(inputs, torch.stack(before, 1))), D, z, at)
        if last is not None:
            final[last] = h


def _forward_cpu(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    y: Tensor,
    final: Tensor,
) -> bool:
    """Whether a step is no number."""
    view = _native.view
    documents = _documents.table(x, cu_seqlens, seq_idx)
    x, dt, A, B, C, D, z = _readable(x, dt, A, B, C, _per_element(D, x), z)
    return bool(
        _native.module("cpu").ssd_fwd(
            view(x), view(dt), view(A), view(B), view(C), view(D), view(z), view(dt_bias), view(initial_states),
            view(documents), view(y), view(final), len(documents), *x.shape[2:], B.shape[3], B.shape[2], dt_softplus,
            dt_min, dt_max,
        )
    )  # fmt: skip


def _per_element(D: Tensor | None, x: Tensor) -> Tensor | None:
    """D as the C++ kernels read it, (H, P)."""
    return D if D is None or D.dim() == 2 else D[:, None].expand(x.shape[2:]).contiguous()


def _gated(x: Tensor, y: Tensor, D: Tensor | None, z: Tensor | None, at: Any) -> Tensor:
    y = y if D is None else y + D.reshape(x.shape[2], -1) * x.to(D.dtype)
    return y if z is None else y * F.silu(z[at].to(y.dtype))


def _backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> tuple[Tensor, ...]:
    if dy is None:
        dy = torch.zeros_like(x)
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Until its document is reached, a row holds the gradient of the final state.
    dinitial = A.new_zeros(rows, *x.shape[2:], B.shape[3]) if dfinal is None else _copy(dfinal)
    if dy.numel() == 0:
        zeros = (torch.zeros_like(t) if t is not None else A.new_empty(0) for t in (x, dt, A, B, C, D, z, dt_bias))
        return (*zeros, dinitial)
    if backend == "torch":
        return _backward_torch(
            dy, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, chunk_size, dt_softplus, dt_min,
            dt_max, dinitial,
        )  # fmt: skip
    if backend == "triton":
        from llmcore.kernels import ssd as kernel

        gradients = kernel.ssd_bwd(
            _native.unit_stride(dy), None if dfinal is None else dfinal.contiguous(),
            *_readable(x, dt, A, B, C, D, z), dt_bias, initial_states, _rows(x, cu_seqlens, seq_idx), dt_softplus,
            dt_min, dt_max, dinitial,
        )  # fmt: skip
        absent = A.new_empty(0)
        return (*(absent if gradient is None else gradient for gradient in gradients), dinitial)
    return _backward_cpu(
        dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx, dt_softplus, dt_min, dt_max,
        dinitial,
    )  # fmt: skip


def _backward_torch(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    dinitial: Tensor,
) -> tuple[Tensor, ...]:
    """dinitial holds dfinal, and gets the gradient of the initial states."""
    wide, heads, groups = A.dtype, x.shape[2], B.shape[2]
    step, slope = _step(dt, dt_bias, dt_softplus, dt_min, dt_max, wide)
    dx, dB, dC = (_native.empty_like(t) for t in (x, B, C))
    dz = None if z is None else _native.empty_like(z)
    ddt, dA = torch.empty_like(step), torch.zeros_like(A)
    dD = None if D is None else torch.zeros_like(D)
    for at, initial, last in reversed(list(_documents.spans(x, cu_seqlens, seq_idx))):
        c = _Chunks(step[at], A, B[at].to(wide), C[at].to(wide), chunk_size, heads)
        xs, dout = x[at].to(wide), dy[at].to(wide)
        dys = dout if z is None else dout * F.silu(z[at].to(wide))
        skip = 0 if D is None else D.reshape(heads, -1) * dys
        if dD is not None:
            along = (dys * xs).sum((0, 1))
            dD += along if dD.dim() == 2 else along.sum(1)
        inputs, dys = c.split(xs), c.split(dys)
        none = torch.zeros_like(dinitial[:1]).expand(inputs.shape[0], *dinitial.shape[1:])
        h = none if initial is None or initial_states is None else initial_states[initial]
        h_before = torch.stack(c.states(inputs, h)[0], 1)
        if z is not None and dz is not None:
            gate = z[at].to(wide)
            p = torch.sigmoid(gate)
            dz[at] = dout * _gated(x[at], c.join(c.outputs(inputs, h_before)), D, None, at) * p * (1 + gate * (1 - p))

        through = torch.einsum("rkthp,rkthn,rkth->rkhpn", dys, c.C, c.from_start)
        dh = none if last is None else dinitial[last]
        dh_after = []
        for k in reversed(range(inputs.shape[1])):
            dh_after.append(dh)
            dh = c.whole[:, k, :, None, None] * dh + through[:, k]
        dh_before, dh = dh, torch.stack(dh_after[::-1], 1)
        if initial is not None:
            dinitial[initial] = dh_before

        weights = c.decay * c.products
        crossed = torch.einsum("rkthp,rkshp->rkhts", dys, inputs)
        from_end = torch.einsum("rkhpn,rkshn->rkshp", dh, c.B) * c.to_end[..., None]
        v = torch.einsum("rkhts,rkthp->rkshp", weights, dys) + from_end
        dx[at] = c.join(c.step[..., None] * v) + skip
        spread = c.decay * crossed
        later = torch.einsum("rkhpn,rkshp->rkshn", dh, inputs) * c.to_end[..., None]
        dB[at] = c.join(
            _per_group(c.step[..., None] * (torch.einsum("rkhts,rkthn->rkshn", spread, c.C) + later), groups)
        )
        earlier = torch.einsum("rkhpn,rkthp->rkthn", h_before, dys)
        inside = torch.einsum("rkhts,rkshn->rkthn", spread, c.B * c.step[..., None])
        dC[at] = c.join(_per_group(inside + earlier * c.from_start[..., None], groups))

        pairs = weights * crossed * c.step.transpose(2, 3)[..., None, :]
        dl = F.pad(pairs.cumsum(-1)[..., :-1], (1, 0)).tril().sum(-2).transpose(2, 3)
        into = (earlier * c.C).sum(-1) * c.from_start
        out = (from_end * inputs).sum(-1) * c.step
        dl = dl + into.flip(2).cumsum(2).flip(2) + F.pad(out.cumsum(2)[:, :, :-1], (0, 0, 1, 0))
        dl = dl + ((dh * h_before).sum((-1, -2)) * c.whole)[:, :, None]
        dA += (dl * c.step).sum((0, 1, 2))
        ddt[at] = c.join((inputs * v).sum(-1) + A * dl)
    draw = ddt * slope
    absent = A.new_empty(0)
    gradients = (dx, draw.to(dt.dtype), dA, dB, dC, dD, dz, None if dt_bias is None else draw.sum((0, 1)))
    return (*(absent if gradient is None else gradient for gradient in gradients), dinitial)


def _backward_cpu(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    dinitial: Tensor,
) -> tuple[Tensor, ...]:
    """dinitial holds dfinal where a document has no step, and gets the gradient of the initial states."""
    view = _native.view
    documents = _documents.table(x, cu_seqlens, seq_idx)
    D_is_wide = D is not None and D.dim() == 2
    x, dt, A, B, C, D, z = _readable(x, dt, A, B, C, _per_element(D, x), z)
    dy, dfinal = _native.unit_stride(dy), None if dfinal is None else dfinal.contiguous()
    heads, head_dim, groups, states = *x.shape[2:], *B.shape[2:]
    # Sums over the documents, or over the threads' shares of a group's heads, are left to PyTorch.
    threads = torch.get_num_threads()
    items = len(documents) * groups
    shares = max(1, min(threads // items, heads // groups))
    parts = min(threads, items * shares)
    dx, ddt = _native.empty_like(x), _native.empty_like(dt)
    dz = None if z is None else _native.empty_like(z)
    dA, dB, dC = A.new_empty(parts, heads), A.new_empty(shares, *B.shape), A.new_empty(shares, *C.shape)
    dD = None if D is None else A.new_empty(parts, heads, head_dim)
    dbias = None if dt_bias is None else A.new_empty(parts, heads)
    _native.module("cpu").ssd_bwd(
        view(dy), view(dfinal), view(x), view(dt), view(A), view(B), view(C), view(D), view(z), view(dt_bias),
        view(initial_states), view(documents), view(dx), view(ddt), view(dA), view(dB), view(dC), view(dD), view(dz),
        view(dbias), view(dinitial), len(documents), heads, head_dim, states, groups, shares, parts, dt_softplus,
        dt_min, dt_max,
    )  # fmt: skip
    dB, dC = ((d[0] if shares == 1 else d.sum(0)).to(t.dtype) for d, t in ((dB, B), (dC, C)))
    absent = A.new_empty(0)
    if dD is not None:
        dD = dD.sum(0) if D_is_wide else dD.sum((0, 2))
    return (
        dx, ddt, dA.sum(0), dB, dC, absent if dD is None else dD, absent if dz is None else dz,
        absent if dbias is None else dbias.sum(0), dinitial,
    )  # fmt: skip


def _per_group(t: Tensor, groups: int) -> Tensor:
    return t.unflatten(3, (groups, -1)).sum(4)


def _backward_fake(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    backend: str,
) -> tuple[Tensor, ...]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gradients = (A.new_empty(0) if t is None else _native.empty_like(t) for t in (x, dt, A, B, C, D, z, dt_bias))
    return (*gradients, A.new_empty(rows, *x.shape[2:], B.shape[3]))


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    *tensors, chunk_size, dt_softplus, dt_min, dt_max, backend = inputs
    ctx.options = (chunk_size, dt_softplus, dt_min, dt_max, backend)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None and dfinal is None:
        return (None,) * 16
    grads = _ssd_backward(dy, dfinal, *ctx.saved_tensors, *ctx.options)
    grads = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*grads, *(None,) * 7)


_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states,"
    " Tensor? cu_seqlens, Tensor? seq_idx, int chunk_size, bool dt_softplus, float dt_min, float dt_max, str backend"
)
_ssd = operator(f"ssd({_ARGUMENTS}) -> (Tensor y, Tensor final_states)", _forward, _fake, _save, _differentiate)
_ssd_backward = operator(
    f"ssd_backward(Tensor? dy, Tensor? dfinal, {_ARGUMENTS})"
    " -> (Tensor dx, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddt_bias,"
    " Tensor dinitial_states)",
    _backward,
    _backward_fake,
)
