import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "swiglu"


def check(backend, **inputs):
    with llmcore.backend(backend):
        assert_accurate(ops.swiglu, ops.swiglu.reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 64), (2, 3, 100), (1, 1), (13,), (), (0, 8), (3, 0), (5, 4099)])
def test_shapes(backend, device, dtype, shape):
    check(backend, gate=randn(*shape, dtype=dtype, device=device), up=randn(*shape, dtype=dtype, device=device, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_broadcast(backend, device, dtype):
    both = randn(6, 5, 128, dtype=dtype, device=device, grad=False)
    for gate, up in (
        both.chunk(2, -1),
        (both[..., ::2], both[..., 1::2]),
        (both.transpose(0, 1), both.transpose(0, 1)),
        (both[:1].expand(6, 5, 128), both),
        (both[..., :1].expand(6, 5, 128), both),
        (both[:, ::2], both[:, 1:4]),
    ):
        check(backend, gate=gate.requires_grad_(), up=up.detach().requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(backend, device, dtype):
    largest = torch.finfo(dtype).max
    gate = (
        torch.tensor([0.0, -0.0, 20, -20, 88, -88, 89, -89, 104, -104, 300, -300, largest, -largest])
        .to(dtype)
        .to(device)
    )
    with llmcore.backend(backend):
        gate.requires_grad_()
        y = ops.swiglu(gate, torch.ones_like(gate))
        (slope,) = torch.autograd.grad(y.sum(), gate)
    exact = gate.detach().double()
    torch.testing.assert_close(y.double(), torch.nn.functional.silu(exact), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert bool(slope.isfinite().all())
    assert bool((slope[[2, 4, 6, 8, 10, 12]] == 1).all()) and bool((slope[[9, 11, 13]] == 0).all())


@given(rows=st.integers(0, 9), cols=st.integers(1, 300), dtype=st.sampled_from(DTYPES))
def test_any_shape(backend, rows, cols, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(
        backend,
        gate=randn(rows, cols, dtype=dtype, device=device),
        up=randn(rows, cols, dtype=dtype, device=device, seed=1),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            (torch.randn(2, 4), torch.randn(2, 3)),
            ValueError,
            "up must be gate's shape = (2, 4), but its shape is (2, 3)",
        ),
        ((torch.randn(4), torch.randn(4).half()), TypeError, "up has dtype float16, but gate has float32"),
        ((torch.arange(4), torch.arange(4)), TypeError, "gate has dtype int64"),
        ((torch.randn(4), torch.randn(4, device="meta")), ValueError, "up is on meta, but gate is on cpu"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as caught:
        ops.swiglu(*arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
