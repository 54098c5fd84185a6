import pytest
import torch

from llmcore import nn, ops


def test_rms_norm():
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    norm = nn.RMSNorm(16, eps=1e-5)
    assert torch.equal(norm(x), ops.rms_norm(x, norm.weight, 1e-5))
    y, s = norm(x, residual)
    assert torch.equal(s, x + residual) and torch.equal(y, norm(s))
    gemma = nn.RMSNorm(16, weight_offset=1.0)
    assert bool((gemma.weight == 0).all())
    torch.testing.assert_close(gemma(x), nn.RMSNorm(16)(x))


def test_rotary_embedding_far_out():
    rotary = nn.RotaryEmbedding(64, 200_000, theta=500_000.0)
    exact = torch.tensor(199_999 * 500_000.0 ** (-2 / 64), dtype=torch.float64).cos()
    assert abs(rotary.cos[199_999, 1].double() - exact).item() < 1e-7
    assert rotary.state_dict() == {}


def test_rotary_embedding_is_relative():
    rotary = nn.RotaryEmbedding(32, 64)
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def score(i, j):
        return (rotary(q, k, torch.tensor([i]))[0] * rotary(q, k, torch.tensor([j]))[1]).sum()

    torch.testing.assert_close(score(5, 2), score(45, 42), rtol=1e-4, atol=1e-5)


def test_partial_and_bad_rotary():
    rotary = nn.RotaryEmbedding(32, 8, rotary_dim=8)
    q = torch.randn(1, 8, 1, 32)
    assert torch.equal(rotary(q, q)[0][..., 8:], q[..., 8:])
    with pytest.raises(ValueError, match="rotary_dim is 7; allowed: an even number from 2 to head_dim = 32"):
        nn.RotaryEmbedding(32, 8, rotary_dim=7)


def test_attention_heads_and_shapes():
    attention, rotary = nn.Attention(64, 4, 2, 32), nn.RotaryEmbedding(32, 16)
    assert attention.k_proj.weight.shape == (64, 64) and attention.o_proj.weight.shape == (64, 128)
    assert attention(torch.randn(2, 5, 64), rotary).shape == (2, 5, 64)


def test_swiglu():
    mlp, x = nn.SwiGLU(16, 40), torch.randn(2, 3, 16)
    expected = mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)


def test_casting_keeps_the_tables_exact():
    rotary = nn.RotaryEmbedding(32, 16)
    cos = rotary.cos.clone()
    assert rotary.to(torch.bfloat16).cos.dtype == torch.float32 and torch.equal(rotary.half().cos, cos)
    assert rotary.to("meta").cos.is_meta


@pytest.mark.parametrize("sizes", [(64, 0), (64, 4, 0), (64, 4, 3), (65, 4)])
def test_impossible_heads(sizes):
    with pytest.raises(ValueError, match="^Attention: .*(allowed|change)"):
        nn.Attention(*sizes)
