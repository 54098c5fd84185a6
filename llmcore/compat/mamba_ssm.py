"""The functions of mamba-ssm 2.3 that its Mamba-1 and Mamba-2 are made of: `ops.selective_scan_interface`, and of
`ops.triton` selective_state_update, ssd_combined and layernorm_gated's rmsnorm_fn."""

import math

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


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """See `ops.ssd`. The gradient of the final states flows.

    Args:
        cu_seqlens: (S + 1,), the documents whose last states, (S, H, P, N), return_varlen_states adds to what is
            returned, which seq_idx marks too; unused without it, as upstream. B must then be 1.
        state_dtype: None or float32, in which the states always are.
    """
    _require_float_states(state_dtype)
    documents = None
    if return_varlen_states:
        if cu_seqlens is None:
            raise ValueError("mamba_chunk_scan_combined: return_varlen_states asks for cu_seqlens, which is None.")
        seq_idx, documents = None, cu_seqlens
        if initial_states is not None:
            others = initial_states.new_zeros(cu_seqlens.shape[0] - 2, *initial_states.shape[1:])
            initial_states = torch.cat([initial_states, others])
    y, states = ops.ssd(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, dt_softplus, dt_limit, True,
        cu_seqlens=_int32(documents), seq_idx=_int32(seq_idx),
    )  # fmt: skip
    if not return_varlen_states:
        return (y, states) if return_final_states else y
    return (y, states[-1:], states) if return_final_states else (y, states)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's block after its first projection: zxbcdt (B, L, 2 D + 2 G N + H) -> (B, L, D), or (B, L, C) with
    outproj_weight (C, D). D, in the argument of that name, is (H,) with headdim, or (H, P)."""
    _require_float_states(state_dtype)
    head_dim = D.shape[1] if D.dim() == 2 else headdim
    if head_dim is None:
        raise ValueError("mamba_split_conv1d_scan_combined: D of shape (H,) asks for headdim, which is None.")
    heads, filtered = D.shape[0], conv1d_weight.shape[0]
    inner = heads * head_dim
    z, xBC, dt = zxbcdt.split([inner, filtered, heads], -1)
    xBC = ops.causal_conv1d(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation, seq_idx=_int32(seq_idx))
    assert isinstance(xBC, Tensor)
    shared = (filtered - inner) // 2
    x, B, C = xBC.transpose(1, 2).split([inner, shared, shared], -1)
    x, gate = (t.unflatten(-1, (heads, head_dim)) for t in (x, z))
    B, C = (t.unflatten(-1, (ngroups, -1)) for t in (B, C))
    y, final = ops.ssd(
        x, dt, A, B, C, chunk_size, D, None if rmsnorm_weight is not None and norm_before_gate else gate, dt_bias,
        initial_states, True, dt_limit, True, seq_idx=_int32(seq_idx),
    )  # fmt: skip
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        before = z if norm_before_gate else None
        y = rmsnorm_fn(y, rmsnorm_weight, None, before, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm of x (..., C) in groups of group_size, and the gate silu(z) after it, or before it."""
    if z is not None and not norm_before_gate:
        x = ops.swiglu(z, x)
    if group_size is None or group_size == x.shape[-1]:
        y = _normed(x, weight, eps)
    else:
        grouped = ops.rms_norm(x.unflatten(-1, (-1, group_size)), None, eps)
        assert isinstance(grouped, Tensor)
        y = grouped.flatten(-2) * weight.to(x.dtype)
    y = y if bias is None else y + bias.to(y.dtype)
    return ops.swiglu(z, y) if z is not None and norm_before_gate else y


def _require_float_states(state_dtype: torch.dtype | None) -> None:
    if state_dtype not in (None, torch.float32):
        raise TypeError(f"mamba_chunk_scan_combined: state_dtype is {state_dtype}; allowed: None, torch.float32.")


def _int32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.int()


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
