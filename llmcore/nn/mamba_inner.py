"""The inner paths of Mamba and Mamba-2 in training, from the first projection to the last, as one function of autograd.

Neither keeps what the convolution puts out, and Mamba's keeps no steps either: both are computed again in the backward
pass, at the price of a convolution and a projection from the steps' small inner width. Of the five tensors of D
channels that Mamba's operators keep, three are left; of Mamba-2's xBC one of two.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmcore import ops
from llmcore.ops._dispatch import resolve


def worthwhile(x: Tensor) -> bool:
    """Whether a backward pass can come, and nothing else decides what it computes again, as torch.compile does."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.dtype != torch.float64


def _autocast(device: str) -> Any:
    """What is in force now, to be entered again in the backward pass."""
    return torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = ops.causal_conv1d(x, weight, bias, "silu")
    assert isinstance(y, Tensor)
    return y


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


class MambaInner(torch.autograd.Function):
    """y (B, D, L) of x, z (B, D, L): u = silu(conv(x)) is projected to dt, B and C, dt to the steps, and u scanned.

    filters (D, W), bias (D,): the convolution's. x_proj (R + 2 N, D), dt_proj (D, R), dt_bias (D,), A (D, N), D (D,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        filters: Tensor,
        bias: Tensor,
        x_proj: Tensor,
        dt_proj: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
    ) -> Tensor:
        ctx.autocast, ctx.backend = _autocast(x.device.type), resolve("selective_scan", x)
        u = _convolved(x, filters, bias)
        projected = F.linear(u.transpose(1, 2), x_proj)
        delta, B, C = _steps_and_states(projected, dt_proj, A)
        small = D.float(), z, dt_bias.float()
        y, _, saved = torch.ops.llmcore.selective_scan(u, delta, A, B, C, *small, None, None, True, True, ctx.backend)
        ctx.save_for_backward(x, z, filters, bias, x_proj, dt_proj, dt_bias, A, D, projected, saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, z, filters, bias, x_proj, dt_proj, dt_bias, A, D, projected, saved = ctx.saved_tensors
        filtered, (projected, dt_proj) = _leaves(x, filters, bias), _leaves(projected, dt_proj)
        with torch.enable_grad(), ctx.autocast:
            u = _convolved(*filtered)
            scanned = _steps_and_states(projected, dt_proj, A)
        delta, B, C = (t.detach() for t in scanned)
        small = D.float(), z, dt_bias.float()
        du, ddelta, dA, dB, dC, dD, dz, dbias, _ = torch.ops.llmcore.selective_scan_backward(
            dy, None, u.detach(), delta, A, B, C, *small, None, None, saved, True, ctx.backend
        )
        dprojected, ddt_proj = torch.autograd.grad(scanned, (projected, dt_proj), (ddelta, dB, dC))
        du = du + (dprojected @ x_proj.to(dprojected.dtype)).transpose(1, 2)
        dx_proj = dprojected.flatten(0, 1).t() @ u.detach().transpose(1, 2).flatten(0, 1)
        dx, dfilters, dconv_bias = torch.autograd.grad(u, filtered, du)
        parameters = dfilters, dconv_bias, dx_proj.to(x_proj.dtype), ddt_proj, dbias.to(dt_bias.dtype)
        return dx, dz, *parameters, dA, dD.to(D.dtype)


def _steps_and_states(projected: Tensor, dt_proj: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """delta (B, D, L), and B and C (B, 1, N, L) of one group."""
    states = A.shape[1]
    dt, B, C = projected.split([dt_proj.shape[1], states, states], -1)
    return F.linear(dt, dt_proj).transpose(1, 2), B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1)


class Mamba2Inner(torch.autograd.Function):
    """y (B, L, H, P) of xBC (B, H P + 2 G N, L), which goes through the convolution, and of the gate z (B, L, H, P).

    dt (B, L, H). filters (channels, W), bias (channels,): the convolution's. dt_bias, A, D: (H,). groups: G.
    """

    @staticmethod
    def forward(
        ctx: Any,
        xBC: Tensor,
        z: Tensor,
        dt: Tensor,
        filters: Tensor,
        bias: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        groups: int,
        step_limit: tuple[float, float],
    ) -> Tensor:
        ctx.groups, ctx.options = groups, (256, True, *step_limit, resolve("ssd", xBC))
        x, B, C = heads_of(_convolved(xBC, filters, bias), z, groups)
        small = D.float(), z, dt_bias.float()
        y, _ = torch.ops.llmcore.ssd(x, dt, A, B, C, *small, None, None, None, *ctx.options)
        ctx.save_for_backward(xBC, z, dt, filters, bias, dt_bias, A, D)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xBC, z, dt, filters, bias, dt_bias, A, D = ctx.saved_tensors
        filtered = _leaves(xBC, filters, bias)
        with torch.enable_grad():
            y = _convolved(*filtered)
        x, B, C = heads_of(y.detach(), z, ctx.groups)
        small = D.float(), z, dt_bias.float()
        dx, ddt, dA, dB, dC, dD, dz, dbias, _ = torch.ops.llmcore.ssd_backward(
            dy, None, x, dt, A, B, C, *small, None, None, None, *ctx.options
        )
        d = torch.cat([dx.flatten(2), dB.flatten(2), dC.flatten(2)], -1).transpose(1, 2)
        dxBC, dfilters, dconv_bias = torch.autograd.grad(y, filtered, d)
        return dxBC, dz, ddt, dfilters, dconv_bias, dbias.to(dt_bias.dtype), dA, dD.to(D.dtype), None, None


def heads_of(xBC: Tensor, z: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, H, P) as z is, and B and C (B, L, G, N), of what the convolution puts out, (B, H P + 2 G N, L)."""
    inner = z.shape[2] * z.shape[3]
    shared = (xBC.shape[1] - inner) // 2
    x, B, C = xBC.transpose(1, 2).split([inner, shared, shared], -1)
    return x.unflatten(-1, z.shape[2:]), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
