"""Mamba-2, the state-space mixer in heads: one projection, a short convolution and `ops.ssd`."""

import math

import torch
from torch import Tensor, nn

from llmcore import ops
from llmcore.nn.gated_rms_norm import GatedRMSNorm
from llmcore.nn.mamba import CausalConv1d, MambaState, initial_step_bias
from llmcore.nn.mamba_inner import Mamba2Inner, heads_of, worthwhile


class Mamba2(nn.Module):
    """Mamba-2's mixer (Dao and Gu, 2024, arXiv:2405.21060), with the parameter names of the state-spaces package.

        z, xBC, dt = in_proj(input)      x, B, C = silu(conv1d(xBC))
        y = ssd(x, softplus(dt + dt_bias), A, B, C, D)      output = out_proj(rms_norm(y * silu(z)))

    Args:
        hidden_size: C. state_size: N. conv_width: W. expand: D = expand * C channels inside, a multiple of head_dim.
        head_dim: P, so that there are H = D // P heads. num_groups: G groups of heads share B and C; divides H.
        step_limit: what the steps are clamped to. eps: the norm's, which takes groups apart.
    """

    no_weight_decay = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        hidden_size: int,
        state_size: int = 128,
        conv_width: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        step_limit: tuple[float, float] = (0.0, math.inf),
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        D = expand * hidden_size
        if D % head_dim:
            raise ValueError(f"Mamba2: head_dim is {head_dim}; allowed: a divisor of the {D} channels inside.")
        H = D // head_dim
        if H % num_groups:
            raise ValueError(f"Mamba2: num_groups is {num_groups}; allowed: a divisor of the {H} heads.")
        self.head_dim, self.state_size, self.num_groups, self.step_limit = head_dim, state_size, num_groups, step_limit
        shared = num_groups * state_size
        self.widths = (D, D + 2 * shared, H)
        self.in_proj = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.conv1d = CausalConv1d(D + 2 * shared, conv_width)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.norm = GatedRMSNorm(D, eps, num_groups)
        self.out_proj = nn.Linear(D, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self, residual_layers: int = 1) -> None:
        """-A uniform in [1, 16]; steps log-uniform in [0.001, 0.1]; out_proj smaller by the square root of how many
        layers add to the residual stream."""
        for module in (self.in_proj, self.conv1d, self.out_proj):
            module.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(residual_layers)
            self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
            self.D.fill_(1.0)
            self.norm.weight.fill_(1.0)
        initial_step_bias(self.dt_bias)

    def forward(self, x: Tensor, state: MambaState | None = None) -> Tensor:
        """x: (B, T, C) -> (B, T, C). With a state, x are the tokens after those it has seen."""
        z, xBC, dt = self.in_proj(x).split(self.widths, -1)
        if state is not None and xBC.requires_grad:
            raise RuntimeError("Mamba2: a state cannot be differentiated; call the model under torch.no_grad().")
        xBC, z = xBC.transpose(1, 2), z.unflatten(-1, (-1, self.head_dim))
        A = -torch.exp(self.A_log.float())
        if state is None and worthwhile(xBC):
            filters, bias = self.conv1d.weight[:, 0], self.conv1d.bias
            y = Mamba2Inner.apply(xBC, z, dt, filters, bias, self.dt_bias, A, self.D, self.num_groups, self.step_limit)
            return self.out_proj(self.norm(y.flatten(-2)))
        u, B, C = heads_of(self.conv1d(xBC, None if state is None else state.conv), z, self.num_groups)
        if state is not None and x.shape[1] == 1 and self.step_limit == (0.0, math.inf):
            y = self._step(state.ssm, u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], z[:, 0]).unsqueeze(1)
        else:
            result = ops.ssd(
                u, dt, A, B, C, D=self.D, z=z, dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.step_limit,
                initial_states=None if state is None else state.ssm, return_final_states=state is not None,
            )  # fmt: skip
            y = result if isinstance(result, Tensor) else result[0]
            if state is not None:
                state.ssm.copy_(result[1])
        return self.out_proj(self.norm(y.flatten(-2)))

    def _step(self, ssm: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        """One token; what a head shares is expanded over its channels and states."""
        H, P, N = ssm.shape[1:]
        D, bias = (t[:, None].expand(H, P) for t in (self.D, self.dt_bias))
        dt, A = dt[:, :, None].expand(-1, H, P), A[:, None, None].expand(H, P, N)
        return ops.selective_state_update(ssm, u, dt, A, B, C, D, z, bias, True)

    def new_state(self, batch_size: int, dtype: torch.dtype | None = None) -> MambaState:
        """The state before the first token; dtype is that of the convolution's inputs, the weights' when None."""
        channels, _, width = self.conv1d.weight.shape
        weight = self.in_proj.weight
        return MambaState(
            torch.zeros(batch_size, channels, width - 1, dtype=dtype or weight.dtype, device=weight.device),
            torch.zeros(batch_size, self.widths[2], self.head_dim, self.state_size, device=weight.device),
        )
