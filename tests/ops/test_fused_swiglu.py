import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "fused_swiglu"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs_of(shape, inner, dtype=torch.float32):
    width = shape[-1]
    weights = (randn(inner, width, dtype=dtype, device=DEVICE, grad=False, seed=seed) * width**-0.5 for seed in (1, 2))
    w_gate, w_up = (w.requires_grad_() for w in weights)
    return {"x": randn(*shape, dtype=dtype, device=DEVICE), "w_gate": w_gate, "w_up": w_up}


def check(backend, inputs):
    with llmcore.backend(backend):
        assert_accurate(ops.fused_swiglu, ops.fused_swiglu.reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "inner"), [((40, 64), 96), ((2, 3, 20), 7), ((5,), 3), ((1, 1), 1), ((300, 33), 70), ((0, 8), 5)]
)
def test_shapes(backend, dtype, shape, inner):
    check(backend, inputs_of(shape, inner, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(backend, dtype):
    inputs = inputs_of((2, 6, 32), 24, dtype)
    x, w_gate, w_up = (t.detach() for t in inputs.values())
    for change in (
        {"x": x.transpose(0, 1)},
        {"x": torch.cat([x, x], -1)[..., ::2]},
        {"x": x[:, :1].expand(2, 6, 32)},
        {"w_gate": w_gate.T.contiguous().T},
        {"w_up": torch.cat([w_up, w_up], 1)[:, 1:33], "w_gate": w_gate[:1].expand(24, 32)},
    ):
        check(backend, {n: t.detach().requires_grad_() for n, t in {**inputs, **change}.items()})


@given(
    rows=st.integers(0, 70),
    widths=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(backend, rows, widths, dtype):
    check(backend, inputs_of((rows, widths[0]), widths[1], dtype))


def test_what_is_kept_for_the_backward(backend):
    """Besides the inputs: the two products, and not what is made of them."""
    inputs, kept = inputs_of((20, 32), 24, torch.bfloat16), {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with llmcore.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.fused_swiglu(**inputs)
    mine = {t.data_ptr() for t in inputs.values()}
    assert sum(t.nbytes for p, t in kept.items() if p not in mine) == 20 * 2 * 24 * 2
    with llmcore.backend(backend), torch.no_grad():
        torch.testing.assert_close(ops.fused_swiglu(**inputs), y.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"w_gate": torch.ones(5, 7)},
            ValueError,
            "w_gate must be (F, C) with x's C = (5, 8), but its shape is (5, 7)",
        ),
        (
            {"w_up": torch.ones(6, 8)},
            ValueError,
            "w_up must be w_gate's shape, (F, C) = (5, 8), but its shape is (6, 8)",
        ),
        ({"w_gate": torch.ones(8)}, ValueError, "w_gate must be (F, C), but its shape is (8,)"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must be (..., C), but its shape is ()"),
        ({"w_up": torch.ones(5, 8).half()}, TypeError, "w_up has dtype float16, but x has float32"),
        ({"x": torch.ones(3, 8).long()}, TypeError, "x has dtype int64"),
    ],
)
def test_bad_arguments(change, error, words):
    with pytest.raises(error) as caught:
        ops.fused_swiglu(**{"x": torch.ones(3, 8), "w_gate": torch.ones(5, 8), "w_up": torch.ones(5, 8), **change})
    assert words in str(caught.value) and "\n" not in str(caught.value)
