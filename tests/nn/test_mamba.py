"""Mamba's mixer against its own formula in plain PyTorch, its initialisation, and its state."""

import math

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops
from llmcore.nn import Mamba


def plain(mamba: Mamba, x: torch.Tensor) -> torch.Tensor:
    """The paper's block by torch.nn.functional and the reference scan."""
    u, z = mamba.in_proj(x).transpose(1, 2).chunk(2, 1)
    weight, bias = mamba.conv1d.weight, mamba.conv1d.bias
    u = F.silu(F.conv1d(F.pad(u, (weight.shape[2] - 1, 0)), weight, bias, groups=weight.shape[0]))
    dt, B, C = mamba.x_proj(u.transpose(1, 2)).split([mamba.dt_rank, mamba.state_size, mamba.state_size], -1)
    dt = F.softplus(F.linear(dt, mamba.dt_proj.weight, mamba.dt_proj.bias)).transpose(1, 2)
    A = -torch.exp(mamba.A_log)
    y = ops.selective_scan.reference(u, dt, A, B.transpose(1, 2), C.transpose(1, 2), mamba.D, z)
    return mamba.out_proj(y.transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "T"), [({}, 9), ({"state_size": 5, "conv_width": 3, "expand": 1, "dt_rank": 2}, 70)]
)
def test_against_the_formula(options, T):
    torch.manual_seed(0)
    mamba = Mamba(24, **options)
    x = torch.randn(2, T, 24, requires_grad=True)
    leaves = [x, *mamba.parameters()]
    seed = torch.randn(2, T, 24)
    y, expected = mamba(x), plain(mamba, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad((o * seed).sum(), leaves) for o in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(9,), (1, 2, 3, 9), range(1, 10)], ids=str)
@pytest.mark.parametrize("width", [2, 4])
def test_a_state_continues_where_it_was(cuts, width):
    torch.manual_seed(0)
    mamba = Mamba(16, conv_width=width)
    x = torch.randn(2, 9, 16)
    state, parts, begin = mamba.new_state(2), [], 0
    size = state.conv.numel() + state.ssm.numel()
    with torch.no_grad():
        for end in cuts:
            parts.append(mamba(x[:, begin:end], state))
            begin = end
        torch.testing.assert_close(torch.cat(parts, 1), mamba(x), rtol=1e-5, atol=1e-5)
    assert state.conv.numel() + state.ssm.numel() == size


def test_a_state_takes_no_gradient():
    mamba = Mamba(16)
    with pytest.raises(RuntimeError, match="a state cannot be differentiated; call the model under torch.no_grad"):
        mamba(torch.randn(2, 3, 16), mamba.new_state(2))


def test_initialisation():
    torch.manual_seed(0)
    mamba = Mamba(128, state_size=8)
    mamba.reset_parameters(4)
    torch.testing.assert_close(-torch.exp(mamba.A_log), -torch.arange(1.0, 9.0).expand(256, 8))
    assert bool((mamba.D == 1).all()) and mamba.dt_rank == 8
    step = F.softplus(mamba.dt_proj.bias)
    assert 1e-3 <= step.min() < 1.3e-3 and 0.08 < step.max() <= 0.1001
    assert abs(step.log().mean().item() - (math.log(1e-3) + math.log(0.1)) / 2) < 0.3
    assert mamba.dt_proj.weight.abs().max() <= 8**-0.5
    assert mamba.out_proj.weight.abs().max() <= 256**-0.5 / 2


def test_names_and_shapes_are_those_of_the_paper_s_code():
    shapes = {name: tuple(p.shape) for name, p in Mamba(32, state_size=4).named_parameters()}
    assert shapes == {
        "A_log": (64, 4), "D": (64,), "in_proj.weight": (128, 32), "conv1d.weight": (64, 1, 4), "conv1d.bias": (64,),
        "x_proj.weight": (10, 64), "dt_proj.weight": (64, 2), "dt_proj.bias": (64,), "out_proj.weight": (32, 64),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    mamba, x = Mamba(32), torch.randn(2, 20, 32)
    exact = mamba(x)
    with torch.autocast("cpu", dtype):
        y = mamba(x)
        y.float().sum().backward()
    assert y.dtype == dtype and (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mamba.parameters())
