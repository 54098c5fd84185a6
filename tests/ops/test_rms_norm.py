import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "rms_norm"


def check(backend, **inputs):
    with llmcore.backend(backend):
        assert_accurate(ops.rms_norm, ops.rms_norm.reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(4, 64), (2, 3, 128), (1, 1), (7, 1), (1, 1000), (5, 33), (3, 4096), (2, 8200), (64,), (0, 16)]
)
@pytest.mark.parametrize("residual", [False, True])
def test_shapes(backend, device, dtype, shape, residual):
    check(
        backend,
        x=randn(*shape, dtype=dtype, device=device),
        weight=randn(shape[-1], dtype=dtype, device=device, seed=1),
        residual=randn(*shape, dtype=dtype, device=device, seed=2) if residual else None,
    )


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(backend, device, x_dtype, residual_dtype, weight_dtype):
    check(
        backend,
        x=randn(6, 96, dtype=x_dtype, device=device),
        weight=randn(96, dtype=weight_dtype, device=device, seed=1),
        residual=randn(6, 96, dtype=residual_dtype, device=device, seed=2),
        weight_offset=1.0,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weight_and_large_eps(backend, device, dtype):
    check(backend, x=randn(9, 40, dtype=dtype, device=device), weight=None, eps=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_broadcast(backend, device, dtype):
    wide = randn(6, 5, 64, dtype=dtype, device=device, grad=False)
    weight = randn(64, dtype=dtype, device=device, seed=1)
    views = {
        "rows apart": wide[:, ::2],
        "permuted": wide.transpose(0, 1),
        "columns apart": torch.cat([wide, wide], -1)[..., ::2],
        "broadcast rows": wide[:1, :1].expand(6, 5, 64),
        "broadcast column": wide[..., :1].expand(6, 5, 64),
        "offset": torch.cat([wide, wide], -1)[..., 3:67],
    }
    for view in views.values():
        check(backend, x=view.requires_grad_(), weight=weight, residual=view.flip(0).detach().requires_grad_())


def test_strided_cotangent(backend, device):
    x = randn(4, 6, 32, device=device)
    with llmcore.backend(backend):
        y = ops.rms_norm(x)
        expanded = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        dense = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
        permuted = torch.autograd.grad(y.transpose(0, 2), x, randn(32, 6, 4, device=device, grad=False))[0]
    torch.testing.assert_close(expanded, dense)
    assert permuted.shape == x.shape


@given(rows=st.integers(0, 9), cols=st.integers(1, 300), dtype=st.sampled_from(DTYPES), residual=st.booleans())
def test_any_shape(backend, rows, cols, dtype, residual):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(
        backend,
        x=randn(rows, cols, dtype=dtype, device=device),
        weight=randn(cols, dtype=dtype, device=device, seed=1),
        residual=randn(rows, cols, dtype=dtype, device=device, seed=2) if residual else None,
    )


def test_only_the_sum_is_used(backend, device):
    x, residual = randn(3, 16, dtype=torch.bfloat16, device=device), randn(3, 16, device=device, seed=2)
    with llmcore.backend(backend):
        _, s = ops.rms_norm(x, residual=residual)
    assert s.dtype == torch.float32
    dx, dresidual = torch.autograd.grad(s.sum(), (x, residual))
    assert dx.dtype == torch.bfloat16 and bool((dx == 1).all()) and bool((dresidual == 1).all())


def test_gradients_are_not_shared_memory(backend, device):
    x, residual = randn(3, 16, device=device), randn(3, 16, device=device, seed=2)
    with llmcore.backend(backend):
        y, s = ops.rms_norm(x, residual=residual)
    (y.sum() + s.sum()).backward()
    before = residual.grad.clone()
    x.grad.add_(1)
    assert torch.equal(residual.grad, before)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            dict(x=torch.randn(2, 4), weight=torch.randn(3)),
            ValueError,
            "weight must be (C,) = (4,), but its shape is (3,)",
        ),
        (dict(x=torch.tensor(1.0)), ValueError, "x must be (..., C)"),
        (dict(x=torch.arange(4)), TypeError, "x has dtype int64; allowed: float32"),
        (dict(x=[1.0]), TypeError, "x must be a tensor, but a list was given"),
        (dict(x=torch.randn(2, 4), residual=torch.randn(4)), ValueError, "residual must be x's shape = (2, 4)"),
        (
            dict(x=torch.randn(4), weight=torch.randn(4).double()),
            TypeError,
            "weight has dtype float64, but x has float32",
        ),
        (dict(x=torch.randn(4), residual=torch.randn(4).double()), TypeError, "residual has dtype float64"),
        (dict(x=torch.randn(4), eps=None), TypeError, "eps is None; allowed: a number"),
        (
            dict(x=torch.randn(4), weight=torch.randn(4, device="meta")),
            ValueError,
            "weight is on meta, but x is on cpu",
        ),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        ops.rms_norm(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
