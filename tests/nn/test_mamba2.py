"""Mamba-2's mixer and its norm against their own formulas in plain PyTorch, its initialisation, and its state."""

import pytest
import torch
import torch.nn.functional as F

from llmcore import ops
from llmcore.nn import GatedRMSNorm, Mamba2

OPTIONS = [
    {"head_dim": 8, "state_size": 6},
    {"head_dim": 4, "state_size": 5, "conv_width": 3, "expand": 3, "num_groups": 3, "step_limit": (0.01, 0.9)},
    {"head_dim": 8, "state_size": 3, "num_groups": 2},
]


def plain_norm(x, weight, groups, eps=1e-5):
    parts = x.unflatten(-1, (groups, -1))
    return (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight


def plain(mamba: Mamba2, x: torch.Tensor) -> torch.Tensor:
    """The paper's block by torch.nn.functional and the reference scan."""
    inner, filtered, heads = mamba.widths
    z, xBC, dt = mamba.in_proj(x).split([inner, filtered, heads], -1)
    weight, bias = mamba.conv1d.weight, mamba.conv1d.bias
    xBC = F.silu(F.conv1d(F.pad(xBC.transpose(1, 2), (weight.shape[2] - 1, 0)), weight, bias, groups=filtered))
    u, B, C = xBC.transpose(1, 2).split([inner, (filtered - inner) // 2, (filtered - inner) // 2], -1)
    u, B, C = u.unflatten(-1, (heads, -1)), *(t.unflatten(-1, (mamba.num_groups, -1)) for t in (B, C))
    dt = F.softplus(dt + mamba.dt_bias).clamp(*mamba.step_limit)
    y = ops.ssd.reference(u, dt, -torch.exp(mamba.A_log), B, C, D=mamba.D).flatten(-2)
    return mamba.out_proj(plain_norm(y * F.silu(z), mamba.norm.weight, mamba.norm.groups))


@pytest.mark.parametrize(("options", "T"), list(zip(OPTIONS, (9, 70, 20), strict=True)))
def test_against_the_formula(options, T):
    torch.manual_seed(0)
    mamba = Mamba2(24, **options)
    x = torch.randn(2, T, 24, requires_grad=True)
    leaves = [x, *mamba.parameters()]
    seed = torch.randn(2, T, 24)
    y, expected = mamba(x), plain(mamba, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad((o * seed).sum(), leaves) for o in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("cuts", [(9,), (1, 2, 3, 9), range(1, 10)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_state_continues_where_it_was(cuts, options):
    torch.manual_seed(0)
    mamba = Mamba2(24, **options)
    x = torch.randn(2, 9, 24)
    state, parts, begin = mamba.new_state(2), [], 0
    with torch.no_grad():
        for end in cuts:
            parts.append(mamba(x[:, begin:end], state))
            begin = end
        torch.testing.assert_close(torch.cat(parts, 1), mamba(x), rtol=1e-5, atol=1e-5)


def test_a_state_takes_no_gradient():
    mamba = Mamba2(32)
    with pytest.raises(RuntimeError, match="a state cannot be differentiated; call the model under torch.no_grad"):
        mamba(torch.randn(2, 3, 32), mamba.new_state(2))


def test_initialisation():
    torch.manual_seed(0)
    mamba = Mamba2(128, head_dim=2)
    mamba.reset_parameters(4)
    A, step = torch.exp(mamba.A_log), F.softplus(mamba.dt_bias)
    assert 1 <= A.min() < 1.8 and 15 < A.max() <= 16 and abs(A.mean().item() - 8.5) < 1
    assert 1e-3 <= step.min() < 1.3e-3 and 0.08 < step.max() <= 0.1001
    assert bool((mamba.D == 1).all()) and bool((mamba.norm.weight == 1).all())
    assert mamba.out_proj.weight.abs().max() <= 256**-0.5 / 2


def test_names_and_shapes_are_those_of_the_paper_s_code():
    shapes = {name: tuple(p.shape) for name, p in Mamba2(32, 4, head_dim=16, num_groups=2).named_parameters()}
    assert shapes == {
        "A_log": (4,), "D": (4,), "dt_bias": (4,), "in_proj.weight": (64 + 80 + 4, 32), "conv1d.weight": (80, 1, 4),
        "conv1d.bias": (80,), "norm.weight": (64,), "out_proj.weight": (32, 64),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    mamba, x = Mamba2(32, 8, head_dim=8), torch.randn(2, 20, 32)
    exact = mamba(x)
    with torch.autocast("cpu", dtype):
        y = mamba(x)
        y.float().sum().backward()
    assert y.dtype == dtype and (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mamba.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 48}, "head_dim is 48; allowed: a divisor of the 64 channels inside."),
        ({"head_dim": 16, "num_groups": 3}, "num_groups is 3; allowed: a divisor of the 4 heads."),
    ],
)
def test_bad_sizes(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba2(32, **options)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_rms_norm(groups, norm_before_gate):
    torch.manual_seed(0)
    norm = GatedRMSNorm(12, groups=groups, norm_before_gate=norm_before_gate)
    torch.nn.init.normal_(norm.weight)
    x, z = torch.randn(2, 2, 5, 12).requires_grad_().unbind()
    if norm_before_gate:
        expected = plain_norm(x, norm.weight, groups) * F.silu(z)
    else:
        expected = plain_norm(x * F.silu(z), norm.weight, groups)
    y, leaves = norm(x, z), (x, z, norm.weight)
    torch.testing.assert_close(y, expected)
    for a, b in zip(*(torch.autograd.grad((o**2).sum(), leaves) for o in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm(x), plain_norm(x, norm.weight, groups))
    with pytest.raises(ValueError, match="groups is 5; allowed: a divisor of hidden_size = 12."):
        GatedRMSNorm(12, groups=5)
