"""The signatures of mamba-ssm and causal-conv1d, and that they mean what the ops mean."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from ops.cases import randn

from llmcore import ops
from llmcore.compat import causal_conv1d, mamba_ssm
from llmcore.nn import GatedRMSNorm, Mamba, Mamba2

SIGNATURES = {
    causal_conv1d.causal_conv1d_fn: "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    causal_conv1d.causal_conv1d_update: "x conv_state weight bias activation cache_seqlens conv_state_indices",
    mamba_ssm.selective_scan_fn: "u delta A B C D z delta_bias delta_softplus return_last_state",
    mamba_ssm.selective_state_update: "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    mamba_ssm.mamba_chunk_scan_combined: (
        "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit return_final_states "
        "return_varlen_states state_dtype"
    ),
    mamba_ssm.mamba_split_conv1d_scan_combined: (
        "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states seq_idx dt_limit return_final_states "
        "activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim ngroups norm_before_gate state_dtype"
    ),
    mamba_ssm.rmsnorm_fn: "x weight bias z eps group_size norm_before_gate",
    mamba_ssm.mamba_inner_fn: (
        "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D delta_bias "
        "B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight b_c_dt_rms_eps"
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_arguments_are_upstreams(function):
    assert list(inspect.signature(function).parameters) == SIGNATURES[function].split()


def test_convolution():
    x, weight, bias = randn(2, 5, 9, grad=False), randn(5, 4, grad=False), randn(5, grad=False)
    initial, out = randn(2, 5, 3, grad=False), torch.empty(2, 5, 3)
    y, last = causal_conv1d.causal_conv1d_fn(x, weight, bias, None, initial, True, out, "swish")
    expected = ops.causal_conv1d(x, weight, bias, "silu", initial_state=initial, return_final_state=True)
    assert torch.equal(y, expected[0]) and torch.equal(out, expected[1]) and last is out
    assert torch.equal(causal_conv1d.causal_conv1d_fn(x, weight), ops.causal_conv1d(x, weight))


@pytest.mark.parametrize("length", [3, 6])
def test_a_ring_of_inputs(length):
    """Token after token, two at a time, equals the whole."""
    x, weight = randn(2, 5, 12, grad=False), randn(5, 4, grad=False)
    ring, parts = torch.zeros(2, 5, length), []
    for t in range(0, 12, 2):
        seen = torch.full((2,), t, dtype=torch.int32)
        parts.append(causal_conv1d.causal_conv1d_update(x[..., t : t + 2], ring, weight, None, "silu", seen))
    torch.testing.assert_close(torch.cat(parts, -1), ops.causal_conv1d(x, weight, activation="silu"))


def test_rows_of_a_larger_state():
    x, weight, rows = randn(2, 5, grad=False), randn(5, 4, grad=False), torch.tensor([3, 1])
    states = randn(4, 5, 3, grad=False)
    before, chosen = states.clone(), states[rows]
    y = causal_conv1d.causal_conv1d_update(x, states, weight, conv_state_indices=rows)
    assert torch.equal(y, ops.causal_conv1d_update(x, chosen, weight)) and torch.equal(states[rows], chosen)
    assert torch.equal(states[[0, 2]], before[[0, 2]])
    ssm = randn(4, 5, 6, grad=False)
    before, chosen = ssm.clone(), ssm[rows]
    step = (x, x.abs(), -torch.rand(5, 6), randn(2, 6, grad=False), randn(2, 6, grad=False, seed=1))
    y = mamba_ssm.selective_state_update(ssm, *step, state_batch_indices=rows)
    assert torch.equal(y, ops.selective_state_update(chosen, *step)) and torch.equal(ssm[rows], chosen)
    assert torch.equal(ssm[[0, 2]], before[[0, 2]])


def test_constant_B_and_C():
    u, delta = randn(2, 6, 9, grad=False), randn(2, 6, 9, grad=False, seed=1)
    A, constant = -torch.rand(6, 4), randn(6, 4, seed=2)
    changing = randn(2, 2, 4, 9, seed=3)
    for B, C in ((constant, constant), (constant, changing), (changing, constant), (changing, changing)):
        y = mamba_ssm.selective_scan_fn(u, delta, A, B, C, delta_softplus=True)
        full = [t[None, :, :, None].expand(2, 6, 4, 9) if t.dim() == 2 else t.repeat_interleave(3, 1) for t in (B, C)]
        torch.testing.assert_close(y, ops.selective_scan.reference(u, delta, A, *full, delta_softplus=True))
    with pytest.raises(TypeError, match="A is complex; allowed: a real A"):
        mamba_ssm.selective_scan_fn(u, delta, A + 0j, changing, changing)


def test_inner_path_equals_the_module():
    torch.manual_seed(0)
    mamba, x = Mamba(24, state_size=4), torch.randn(2, 9, 24)
    weights = (mamba.conv1d.weight, mamba.conv1d.bias, mamba.x_proj.weight, mamba.dt_proj.weight, mamba.out_proj.weight)
    A = -torch.exp(mamba.A_log)
    xz = mamba.in_proj(x).transpose(1, 2)
    y = mamba_ssm.mamba_inner_fn(xz, *weights, None, A, None, None, mamba.D, mamba.dt_proj.bias)
    torch.testing.assert_close(y, mamba(x), rtol=1e-5, atol=1e-6)
    ones = {"b_rms_weight": torch.ones(4), "c_rms_weight": torch.ones(4), "dt_rms_weight": torch.ones(mamba.dt_rank)}
    normed = mamba_ssm.mamba_inner_fn(
        xz, *weights, None, A, D=mamba.D, delta_bias=mamba.dt_proj.bias, B_proj_bias=torch.ones(4), **ones
    )
    u = ops.causal_conv1d(xz[:, :48], mamba.conv1d.weight[:, 0], mamba.conv1d.bias, "silu")
    dt, B, C = mamba.x_proj(u.transpose(1, 2)).split([mamba.dt_rank, 4, 4], -1)
    dt, B, C = (F.rms_norm(t, t.shape[-1:], eps=1e-6).transpose(1, 2) for t in (dt, B + 1, C))
    expected = ops.selective_scan.reference(
        u, mamba.dt_proj.weight @ dt, A, B, C, mamba.D, xz[:, 48:], mamba.dt_proj.bias, True
    )
    torch.testing.assert_close(normed, mamba.out_proj(expected.transpose(1, 2)), rtol=1e-4, atol=1e-5)


def ssd_arguments():
    x, dt = randn(1, 20, 4, 5, grad=False), randn(1, 20, 4, grad=False)
    B, C = (randn(1, 20, 2, 3, grad=False, seed=seed) for seed in (1, 2))
    return x, dt, -torch.rand(4), B, C


def test_chunk_scan():
    tensors, D, z = ssd_arguments(), randn(4, 5, grad=False), randn(1, 20, 4, 5, grad=False, seed=3)
    start, numbers = randn(1, 4, 5, 3, grad=False), torch.tensor([[0] * 7 + [1] * 13])
    arguments = (*tensors, 8, D, z, None, start, numbers, None, True, (0.1, 1.0), True)
    y, last = mamba_ssm.mamba_chunk_scan_combined(*arguments)
    keywords = dict(D=D, z=z, initial_states=start, dt_softplus=True, dt_limit=(0.1, 1.0), return_final_states=True)
    expected = ops.ssd.reference(*tensors, **keywords, seq_idx=numbers.int())
    torch.testing.assert_close((y, last), expected)
    assert torch.equal(mamba_ssm.mamba_chunk_scan_combined(*arguments[:-1]), y)
    offsets = torch.tensor([0, 7, 20])
    y, last, states = mamba_ssm.mamba_chunk_scan_combined(*arguments[:11], offsets, *arguments[12:], True)
    torch.testing.assert_close((y, last), expected)
    torch.testing.assert_close(states[1:], last)
    early = tuple(t if t.dim() == 1 else t[:, :7] for t in tensors)
    torch.testing.assert_close(states[:1], ops.ssd.reference(*early, **keywords | {"z": z[:, :7]})[1])
    with pytest.raises(ValueError, match="return_varlen_states asks for cu_seqlens, which is None."):
        mamba_ssm.mamba_chunk_scan_combined(*tensors, 8, return_varlen_states=True)
    with pytest.raises(TypeError, match="state_dtype is torch.bfloat16; allowed: None, torch.float32."):
        mamba_ssm.mamba_chunk_scan_combined(*tensors, 8, state_dtype=torch.bfloat16)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_the_combined_path_equals_the_module(norm_before_gate):
    torch.manual_seed(0)
    mamba, x = Mamba2(24, state_size=4, head_dim=8, num_groups=2), torch.randn(2, 9, 24)
    mamba.norm.norm_before_gate = norm_before_gate
    weight, norm = mamba.conv1d.weight.squeeze(1), mamba.norm.weight
    y = mamba_ssm.mamba_split_conv1d_scan_combined(
        mamba.in_proj(x), weight, mamba.conv1d.bias, mamba.dt_bias, -mamba.A_log.exp(), mamba.D, 4, headdim=8, ngroups=2,
        rmsnorm_weight=norm, rmsnorm_eps=1e-5, outproj_weight=mamba.out_proj.weight, norm_before_gate=norm_before_gate,
    )  # fmt: skip
    if not norm_before_gate:
        torch.testing.assert_close(y, mamba(x))
    assert y.shape == x.shape
    with pytest.raises(ValueError, match="D of shape .* asks for headdim, which is None."):
        mamba_ssm.mamba_split_conv1d_scan_combined(
            mamba.in_proj(x), weight, None, mamba.dt_bias, -mamba.A_log.exp(), mamba.D, 4
        )


def test_rmsnorm():
    x, z, weight, bias = (randn(*shape, grad=False, seed=3) for shape in ((3, 12), (3, 12), (12,), (12,)))
    for groups, before in ((1, True), (3, False), (3, True)):
        norm = GatedRMSNorm(12, 1e-6, groups, before)
        norm.weight.data = weight
        y = mamba_ssm.rmsnorm_fn(x, weight, None, z, group_size=12 // groups, norm_before_gate=before)
        torch.testing.assert_close(y, norm(x, z))
    torch.testing.assert_close(mamba_ssm.rmsnorm_fn(x, weight, bias), ops.rms_norm(x, weight) + bias)
