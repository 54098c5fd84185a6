import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "attention"


def qkv(B, T_q, T_k, H, K, D, Dv, dtype, device="cpu"):
    return {
        "q": randn(B, T_q, H, D, dtype=dtype, device=device),
        "k": randn(B, T_k, K, D, dtype=dtype, device=device, seed=1),
        "v": randn(B, T_k, K, Dv, dtype=dtype, device=device, seed=2),
    }


def check(backend, **inputs):
    with llmcore.backend(backend):
        assert_accurate(ops.attention, ops.attention.reference, {"return_lse": True, **inputs})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "T_q", "T_k", "H", "K", "D", "Dv"),
    [
        (1, 64, 64, 2, 2, 64, 64),
        (2, 33, 33, 4, 2, 32, 32),
        (1, 130, 130, 3, 1, 16, 16),
        (1, 1, 77, 4, 2, 64, 64),
        (1, 5, 200, 2, 1, 128, 128),
        (1, 100, 30, 2, 2, 24, 24),
        (1, 17, 19, 2, 1, 40, 72),
        (1, 20, 20, 1, 1, 256, 256),
        (1, 30, 41, 2, 2, 104, 200),
        (1, 1, 1, 1, 1, 16, 16),
        (0, 4, 4, 2, 1, 16, 16),
        (1, 0, 4, 2, 1, 16, 16),
        (1, 4, 0, 2, 1, 16, 16),
    ],
)
def test_shapes(backend, device, dtype, causal, B, T_q, T_k, H, K, D, Dv):
    check(backend, **qkv(B, T_q, T_k, H, K, D, Dv, dtype, device), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long(backend, device, dtype):
    check(backend, **qkv(1, 300, 340, 2, 1, 64, 64, dtype, device), causal=True)


@pytest.mark.parametrize("D", range(16, 257, 8))
def test_every_head_size(backend, device, D):
    check(backend, **qkv(1, 18, 21, 2, 1, D, D, torch.float32, device), causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_scale_and_large_scores(backend, device, causal):
    check(backend, **qkv(1, 40, 40, 2, 2, 32, 32, torch.float32, device), causal=causal, softmax_scale=0.7)
    inputs = qkv(1, 40, 40, 2, 2, 32, 32, torch.float32, device)
    check(backend, **{n: (3 * t.detach()).requires_grad_() for n, t in inputs.items()}, causal=causal)
    # Forward only: where the softmax is one-hot, P recomputed from lse carries the rounding of lse, which plain softmax
    # does not; that is the price of never storing P.
    check(backend, **{n: 30 * t.detach() for n, t in inputs.items()}, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_broadcast(backend, device, dtype):
    fused = randn(2, 24, 6, 32, dtype=dtype, device=device, grad=False)
    by_head = randn(2, 4, 24, 32, dtype=dtype, device=device, grad=False)
    for q, k, v in (
        (fused[:, :, :4], fused[:, :, 4:5], fused[:, :, 5:]),
        (by_head.transpose(1, 2), by_head.transpose(1, 2), by_head.transpose(1, 2)),
        (fused[..., ::2], fused[..., ::2], fused[..., 1::2]),
        (fused[:1].expand(2, 24, 6, 32), fused, fused[:, :, :1].expand(2, 24, 6, 32)),
        (fused[:, ::2], fused[:, 1::3], fused[:, 1::3]),
    ):
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        check(backend, q=q, k=k, v=v, causal=True)


def test_rows_that_see_no_key(backend, device):
    inputs = qkv(1, 9, 4, 2, 1, 16, 16, torch.float32, device)
    with llmcore.backend(backend):
        out, lse = ops.attention(**inputs, causal=True, return_lse=True)
        dq, _, _ = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert bool((out[:, :5] == 0).all()) and bool(lse[:, :, :5].isneginf().all()) and bool((dq[:, :5] == 0).all())
    assert bool(lse[:, :, 5:].isfinite().all())


def test_gradient_through_lse_alone(backend, device):
    inputs = qkv(1, 6, 8, 2, 1, 16, 16, torch.float32, device)
    with llmcore.backend(backend):
        lse = ops.attention(**inputs, return_lse=True)[1]
        actual = torch.autograd.grad(lse.square().sum(), [inputs["q"], inputs["k"]])
    exact = ops.attention.reference(**inputs, return_lse=True)[1]
    for a, e in zip(actual, torch.autograd.grad(exact.square().sum(), [inputs["q"], inputs["k"]]), strict=True):
        torch.testing.assert_close(a, e)


def test_same_bits_twice(backend, device):
    inputs = qkv(1, 70, 70, 4, 2, 32, 32, torch.float32, device)
    with llmcore.backend(backend):
        first, second = (
            torch.autograd.grad(ops.attention(**inputs, causal=True).square().sum(), list(inputs.values()))
            for _ in "12"
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(B=st.integers(1, 2), T_q=st.integers(1, 70), T_k=st.integers(1, 70), K=st.integers(1, 2), group=st.integers(1, 3),
       D=st.sampled_from([16, 32, 48, 64]), Dv=st.sampled_from([16, 24, 64]), causal=st.booleans(), dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_any_shape(backend, B, T_q, T_k, K, group, D, Dv, causal, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(backend, **qkv(B, T_q, T_k, K * group, K, D, Dv, dtype, device), causal=causal)


def test_autocast_casts_its_operands(backend, device):
    inputs = qkv(1, 8, 8, 2, 2, 16, 16, torch.float32, device)
    with llmcore.backend(backend), torch.autocast(device, torch.bfloat16):
        out, lse = ops.attention(**inputs, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    out.float().sum().backward()
    assert inputs["q"].grad.dtype == torch.float32


GOOD = {"q": torch.randn(2, 5, 4, 16), "k": torch.randn(2, 6, 2, 16), "v": torch.randn(2, 6, 2, 24)}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(q=torch.randn(5, 4, 16)), ValueError, "q must be (B, T_q, H, D), but its shape is (5, 4, 16)"),
        (dict(k=torch.randn(2, 6, 3, 16), v=torch.randn(2, 6, 3, 16)), ValueError, "q has 4 heads and k has 3"),
        (dict(k=torch.randn(2, 6, 2, 24)), ValueError, "k must be (B, T_k, K, D) = (2, 6, 2, 16)"),
        (dict(v=torch.randn(2, 7, 2, 16)), ValueError, "v must be (B, T_k, K, Dv) = (2, 6, 2, 16)"),
        (dict(v=torch.randn(2, 6, 2, 20)), ValueError, "head size of v is 20; allowed: 16 to 256 in steps of 8"),
        (dict(q=torch.randn(2, 5, 4, 264), k=torch.randn(2, 6, 2, 264)), ValueError, "head size of q and k is 264"),
        (dict(v=GOOD["v"].half()), TypeError, "v has dtype float16, but q has float32"),
        (dict(q=GOOD["q"].long()), TypeError, "q has dtype int64"),
        (dict(v=torch.randn(2, 6, 2, 16, device="meta")), ValueError, "v is on meta, but q is on cpu"),
        (dict(window_size=(4, 0)), NotImplementedError, "window_size = (4, 0) is not supported yet; allowed: window_size = (-1, -1)"),
        (dict(window_size=5), NotImplementedError, "window_size = 5 is not supported yet"),
        (dict(softmax_scale="a"), TypeError, "softmax_scale is 'a'; allowed: a number"),
        (dict(softcap=30.0), NotImplementedError, "softcap = 30.0 is not supported yet"),
        (dict(sinks=torch.zeros(4)), NotImplementedError, "sinks = a tensor is not supported yet"),
        (dict(dropout_p=0.1), NotImplementedError, "dropout_p = 0.1 is not supported yet"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, words):
    with pytest.raises(error) as caught:
        ops.attention(**{**GOOD, **changes})
    assert words in str(caught.value) and "\n" not in str(caught.value)
