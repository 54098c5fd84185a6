"""selective_state_update: one step of the selective scan, for decoding; the state changes in place.

Gu and Dao, "Mamba", 2023 (arXiv:2312.00752); per head: Dao and Gu, "Transformers are SSMs", 2024 (arXiv:2405.21060).
    dt = dt + dt_bias, or softplus of it
    state <- exp(dt A) state + dt x B      y = sum_N C state + D x      out = y * silu(z)

B batch, H heads, P channels of a head (D channels in all), N states, G groups of heads that share B and C.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.ops import _checks, _documents, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public

OP = Op("selective_state_update", kernels=("triton", "cpu"))


def _computed(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """(y, the new state) of the form per head, in the computing dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    step = F.softplus(step) if dt_softplus else step
    B, C = (t.to(wide).repeat_interleave(x.shape[1] // t.shape[1], 1)[:, :, None] for t in (B, C))
    new = torch.exp(step[..., None] * A.to(wide)) * state.to(wide) + (step * x.to(wide))[..., None] * B
    y = (new * C).sum(-1)
    y = y if D is None else y + D.to(wide) * x.to(wide)
    return (y if z is None else y * F.silu(z.to(wide))), new


def _per_head(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Views of the form per head; a flat call has a head for each group."""
    if state.dim() == 4:
        return state, x, dt, A, B, C, D, z, dt_bias
    B, C = (t.unsqueeze(1) if t.dim() == 2 else t for t in (B, C))
    groups = B.shape[1]

    def split(t: Tensor, dim: int) -> Tensor:
        return t.unsqueeze(dim) if groups == 1 else t.unflatten(dim, (groups, -1))

    D, dt_bias = (t if t is None else split(t, 0) for t in (D, dt_bias))
    z = z if z is None else split(z, 1)
    return split(state, 1), split(x, 1), split(dt, 1), split(A, 0), B, C, D, z, dt_bias


def reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    y, new = _computed(*_per_head(state, x, dt, A, B, C, D, z, dt_bias), dt_softplus)
    state.copy_(new.view(state.shape))
    return y.reshape(x.shape).to(x.dtype)


@public(reference)
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step of the selective scan; `state` becomes the new one. No gradient.

    Args:
        state: (B, D, N), or (B, H, P, N) per head; N from 1 to 256.
        x: (B, D), or (B, H, P); float32, bfloat16 or float16 (float64 on the torch backend). dt, z: x's shape.
        A: (D, N), or (H, P, N). D, dt_bias: (D,), or (H, P). Expanded views, with which heads share values, are read
            as they are.
        B, C: (B, N) or (B, G, N), D a multiple of G; per head (B, G, N), H a multiple of G.
        dt: at least 0 unless dt_softplus, after dt_bias is added.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: shapes or devices that do not fit; on the CPU also a dt that is negative or no number without
            dt_softplus, before the state is changed (on CUDA only with LLMCORE_CHECK=1). TypeError: a dtype that is not
            allowed.
    """
    op = "selective_state_update"
    _checks.floating(op, "state", state)
    if state.dim() not in (3, 4):
        raise ValueError(f"{op}: state must be (B, D, N) or (B, H, P, N), but its shape is {tuple(state.shape)}.")
    flat = state.dim() == 3
    batch, *channels, states = state.shape
    names = "D" if flat else "H, P"
    if not 1 <= states <= 256:
        raise ValueError(f"{op}: state has {states} states; allowed: 1 to 256.")
    for name, tensor, dims, shape in (
        ("x", x, f"(B, {names})", (batch, *channels)),
        ("dt", dt, f"(B, {names})", (batch, *channels)),
        ("A", A, f"({names}, N)", (*channels, states)),
        ("D", D, f"({names},)" if flat else f"({names})", tuple(channels)),
        ("z", z, f"(B, {names})", (batch, *channels)),
        ("dt_bias", dt_bias, f"({names},)" if flat else f"({names})", tuple(channels)),
    ):
        if tensor is None:
            continue
        _checks.floating(op, name, tensor)
        _checks.shape(op, name, tensor, dims, shape)
        _checks.like(op, name, tensor, "state", state, dtype=False)
    _check_groups(op, "B", B, batch, channels[0], states, flat)
    _check_groups(op, "C", C, batch, channels[0], states, flat)
    _checks.shape(op, "C", C, "B's shape", tuple(B.shape))
    if state.dtype == torch.float64 and x.dtype != torch.float64:
        raise TypeError(
            f"{op}: state has dtype float64, but x has {_checks.name_of(x.dtype)}; allowed beside such an x: a state "
            "that is no wider than float32."
        )
    dt, A, B, C = (_checks.at_most_as_wide(t, x) for t in (dt, A, B, C))
    D, z, dt_bias = (None if t is None else _checks.at_most_as_wide(t, x) for t in (D, z, dt_bias))
    tensors = _per_head(state, x, dt, A, B, C, D, z, dt_bias)
    return _selective_state_update(*tensors, bool(dt_softplus), resolve(op, x)).view(x.shape)


def _check_groups(op: str, name: str, t: Tensor, batch: int, heads: int, states: int, flat: bool) -> None:
    _checks.floating(op, name, t)
    dims = "(B, N) or (B, G, N)" if flat else "(B, G, N)"
    if t.dim() not in ((2, 3) if flat else (3,)) or t.shape[0] != batch or t.shape[-1] != states:
        raise ValueError(
            f"{op}: {name} must be {dims} with B = {batch} and N = {states}, but its shape is {tuple(t.shape)}."
        )
    if t.dim() == 3 and (t.shape[1] == 0 or heads % t.shape[1]):
        unit = "channels" if flat else "heads"
        raise ValueError(f"{op}: {name} has {t.shape[1]} groups; allowed: a divisor of the {heads} {unit}.")


def _forward(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    backend: str,
) -> Tensor:
    if not dt_softplus and _documents.values_are_checked(dt):
        if not bool(((dt if dt_bias is None else dt + dt_bias) >= 0).all()):
            raise ValueError(
                "selective_state_update: dt (with dt_bias) has an element that is negative or no number; allowed: at "
                "least 0, or dt_softplus=True."
            )
    # The dispatcher does not do this for operators in Python, and the short way does not meet it.
    torch.autograd.graph.increment_version(state)
    y = _native.empty_like(x)
    if y.numel() == 0:
        return y
    if backend == "torch":
        computed, new = _computed(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        state.copy_(new)
        return y.copy_(computed)
    if backend == "triton":
        from llmcore.kernels import selective_state_update as kernel

        kernel.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, y)
        return y
    A = A if A.stride(-1) == 0 else _native.unit_stride(A)
    B, C = _native.unit_stride(B), _native.unit_stride(C)
    in_place, view = _native.unit_stride(state), _native.view
    _native.module(backend).selective_state_update(
        view(in_place), view(x), view(dt), view(A), view(B), view(C), view(D), view(z), view(dt_bias), view(y),
        *state.shape, B.shape[1], dt_softplus,
    )  # fmt: skip
    if in_place is not state:
        state.copy_(in_place)
    return y


def _fake(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    backend: str,
) -> Tensor:
    return _native.empty_like(x)


_selective_state_update = operator(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? dt_bias, bool dt_softplus, str backend) -> Tensor",
    _forward,
    _fake,
)
