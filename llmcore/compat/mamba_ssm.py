"""The functions of mamba-ssm 2.3 that its Mamba-1 is made of: `ops.selective_scan_interface`,
`ops.triton.selective_state_update`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore import ops


def selective_scan_fn(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """See `ops.selective_scan`. B and C may also be (D, N), the same for every token. The gradient of the last state
    flows, which upstream's does not. A must be real."""
    _require_real(A)
    B, C = (_for_every_token(t, u) for t in (B, C))
    if B.dim() != C.dim() or B.shape[1] != C.shape[1]:
        B, C = (_for_every_channel(t, u) for t in (B, C))
    return ops.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Mamba's block between its first projection and its output: xz (B, 2 D, L) -> (B, L, C).

    Args:
        B, C: None where they come out of x_proj_weight (R + N + N, D), as Mamba's do.
        checkpoint_lvl: upstream's choice of what to compute again; here autograd keeps what each op saves.
        b_rms_weight, c_rms_weight, dt_rms_weight: where B, C and dt are normalised, as in Falcon-Mamba.
    """
    _require_real(A)
    x, z = xz.chunk(2, 1)
    u = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    assert isinstance(u, Tensor)
    projected = F.linear(u.transpose(1, 2), x_proj_weight)
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    dt = _normed(projected[..., :rank], dt_rms_weight, b_c_dt_rms_eps)
    delta = F.linear(dt, delta_proj_weight).transpose(1, 2)
    if B is None:
        B = _projected(projected[..., rank : rank + states], B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    if C is None:
        C = _projected(projected[..., -states:], C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(y, Tensor)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


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
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """See `ops.selective_state_update`; state_batch_indices (B,) names the row of `state` for each row of x."""
    if state_batch_indices is None:
        return ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    rows = state[state_batch_indices]
    y = ops.selective_state_update(rows, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    state[state_batch_indices] = rows
    return y


def _require_real(A: Tensor) -> None:
    if torch.is_complex(A):
        raise TypeError("selective_scan: A is complex; allowed: a real A, as every Mamba has.")


def _for_every_token(t: Tensor, u: Tensor) -> Tensor:
    """A constant (D, N) as (B, D, N, L), a group for every channel."""
    return t[None, :, None, :].expand(u.shape[0], -1, u.shape[2], -1).transpose(2, 3) if t.dim() == 2 else t


def _for_every_channel(t: Tensor, u: Tensor) -> Tensor:
    """(B, N, L) or (B, G, N, L) as (B, D, N, L), where B and C have different groups."""
    grouped = t if t.dim() == 4 else t.unsqueeze(1)
    return grouped.repeat_interleave(u.shape[1] // grouped.shape[1], 1)


def _normed(t: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return t
    y = ops.rms_norm(t, weight, eps)
    assert isinstance(y, Tensor)
    return y


def _projected(t: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """(B, L, N) as the (B, N, L) of a scan."""
    return _normed(t if bias is None else t + bias, weight, eps).transpose(1, 2)
