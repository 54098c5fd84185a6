"""Mamba, the selective state-space mixer: projections, a short convolution and `ops.selective_scan`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore import ops
from llmcore.nn.mamba_inner import MambaInner, worthwhile


class MambaState:
    """What a Mamba layer keeps of the tokens so far: the convolution's last inputs (B, D, W - 1), and the state of the
    recurrence, (B, D, N) or Mamba-2's (B, H, P, N), float32. Its size does not grow with the sequence."""

    def __init__(self, conv: Tensor, ssm: Tensor) -> None:
        self.conv, self.ssm = conv, ssm


class CausalConv1d(nn.Module):
    """One filter per channel, then silu, over `ops.causal_conv1d`. Parameters have nn.Conv1d's names and shapes.

    Args:
        channels: D. width: W, 2 to 4.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Conv1d's: uniform up to 1 / sqrt(W)."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """x: (B, D, T) -> the same. A state (B, D, W - 1) holds the inputs before x, and then the last ones."""
        weight = self.weight[:, 0]
        if state is None:
            y = ops.causal_conv1d(x, weight, self.bias, "silu")
            assert isinstance(y, Tensor)
            return y
        if x.shape[2] == 1:
            return ops.causal_conv1d_update(x, state, weight, self.bias, "silu")
        y, last = ops.causal_conv1d(
            x, weight, self.bias, "silu", initial_state=state.to(x.dtype), return_final_state=True
        )
        state.copy_(last)
        return y


class StepProjection(nn.Linear):
    """The steps before softplus without the bias, and the bias, which is added in float32: rounded to 16 bits it would
    change small steps by percents."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.linear(x, self.weight), self.bias


def initial_step_bias(bias: Tensor) -> None:
    """Makes softplus(bias) log-uniform in [0.001, 0.1]."""
    with torch.no_grad():
        step = torch.exp(torch.empty_like(bias).uniform_(math.log(1e-3), math.log(0.1)))
        bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus's inverse


class Mamba(nn.Module):
    """Mamba's mixer (Gu and Dao, 2023, arXiv:2312.00752), with the parameter names of the state-spaces package.

        x, z = in_proj(input)       x = silu(conv1d(x))       dt, B, C = x_proj(x)
        y = selective_scan(x, softplus(dt_proj(dt)), A, B, C, D) * silu(z)       output = out_proj(y)

    Args:
        hidden_size: C. state_size: N. conv_width: W. expand: D = expand * C channels inside.
        dt_rank: R, the steps' inner width; ceil(C / 16) when None.
    """

    no_weight_decay = ("A_log", "D")

    def __init__(
        self, hidden_size: int, state_size: int = 16, conv_width: int = 4, expand: int = 2, dt_rank: int | None = None
    ) -> None:
        super().__init__()
        D = expand * hidden_size
        self.state_size, self.dt_rank = state_size, -(-hidden_size // 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(hidden_size, 2 * D, bias=False)
        self.conv1d = CausalConv1d(D, conv_width)
        self.x_proj = nn.Linear(D, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = StepProjection(self.dt_rank, D)
        self.A_log = nn.Parameter(torch.empty(D, state_size))
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = nn.Linear(D, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self, residual_layers: int = 1) -> None:
        """A = -1 .. -N; steps log-uniform in [0.001, 0.1]; out_proj smaller by the square root of how many layers add
        to the residual stream."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(residual_layers)
            bound = self.dt_rank**-0.5
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
            initial_step_bias(self.dt_proj.bias)
            states = torch.arange(1, self.state_size + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(torch.log(states).expand_as(self.A_log))
            self.D.fill_(1.0)

    def forward(self, x: Tensor, state: MambaState | None = None) -> Tensor:
        """x: (B, T, C) -> (B, T, C). With a state, x are the tokens after those it has seen."""
        u, z = (t.transpose(1, 2) for t in self.in_proj(x).chunk(2, -1))
        if state is not None and u.requires_grad:
            raise RuntimeError("Mamba: a state cannot be differentiated; call the model under torch.no_grad().")
        if state is None and worthwhile(u):
            inner = (self.conv1d.weight[:, 0], self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight)
            A = -torch.exp(self.A_log.float())
            y = MambaInner.apply(u, z, *inner, self.dt_proj.bias, A, self.D)
            return self.out_proj(y.transpose(1, 2))
        u = self.conv1d(u, None if state is None else state.conv)
        steps, B, C = self.x_proj(u.transpose(1, 2)).split([self.dt_rank, self.state_size, self.state_size], -1)
        steps, bias = self.dt_proj(steps)
        delta, A = steps.transpose(1, 2), -torch.exp(self.A_log.float())
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        if state is None:
            y = ops.selective_scan(u, delta, A, B, C, self.D, z, bias, True)
        elif x.shape[1] == 1:
            now = (t[..., 0] for t in (u, delta, B, C, z))
            u, delta, B, C, z = now
            y = ops.selective_state_update(state.ssm, u, delta, A, B, C, self.D, z, bias, True).unsqueeze(-1)
        else:
            y, last = ops.selective_scan(u, delta, A, B, C, self.D, z, bias, True, True, initial_state=state.ssm)
            state.ssm.copy_(last)
        assert isinstance(y, Tensor)
        return self.out_proj(y.transpose(1, 2))

    def new_state(self, batch_size: int, dtype: torch.dtype | None = None) -> MambaState:
        """The state before the first token; dtype is that of the convolution's inputs, the weights' when None."""
        D, _, width = self.conv1d.weight.shape
        weight = self.in_proj.weight
        return MambaState(
            torch.zeros(batch_size, D, width - 1, dtype=dtype or weight.dtype, device=weight.device),
            torch.zeros(batch_size, D, self.state_size, device=weight.device),
        )
