"""The rule that judges kernels must itself be able to fail."""

import pytest
import torch

from llmcore import ops
from llmcore.testing import assert_accurate, compare, poisoned, verify


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        "gate": torch.randn(8, 128, generator=generator).to(dtype).requires_grad_(),
        "up": torch.randn(8, 128, generator=generator).to(dtype).requires_grad_(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_passes(dtype):
    assert_accurate(ops.swiglu.reference, ops.swiglu.reference, inputs(dtype))


def scaled(factor):
    return lambda gate, up: ops.swiglu.reference(gate, up) * factor


def one_element_off(gate, up):
    y = ops.swiglu.reference(gate, up)
    return y + torch.zeros_like(y).index_fill_(0, torch.tensor([3]), 1e-2).tril(-3).triu(-3)


def truncated(gate, up):
    y = ops.swiglu.reference(gate, up)
    return (y.view(torch.int16) & -4).view(torch.bfloat16) if y.dtype == torch.bfloat16 else y


def forgets_an_element(gate, up):
    y = torch.empty_like(gate)
    y[:-1] = ops.swiglu.reference(gate, up)[:-1].detach()
    return y


@pytest.mark.parametrize("wrong", [scaled(1 + 2e-6), one_element_off, forgets_an_element, lambda gate, up: gate * up])
def test_wrong_outputs_are_caught(wrong):
    with pytest.raises(AssertionError, match="WRONG"):
        assert_accurate(wrong, ops.swiglu.reference, inputs(), backward=False)


def test_lost_bits_are_caught():
    with pytest.raises(AssertionError, match="WRONG"):
        assert_accurate(truncated, ops.swiglu.reference, inputs(torch.bfloat16), backward=False)


def test_a_wrong_gradient_is_caught():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return ops.swiglu.reference(gate, up)

        @staticmethod
        def backward(ctx, dy):
            gate, up = ctx.saved_tensors
            return dy * up * torch.sigmoid(gate), dy * torch.nn.functional.silu(gate)

    verdicts = {c.name: c.ok for c in verify(lambda gate, up: Wrong.apply(gate, up), ops.swiglu.reference, inputs())}
    assert verdicts == {"output 0": True, "gradient of gate": False, "gradient of up": True}


def test_wrong_shape_and_dtype_are_caught():
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(
            lambda gate, up: ops.swiglu.reference(gate, up)[1:], ops.swiglu.reference, inputs(), backward=False
        )
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(
            lambda gate, up: ops.swiglu.reference(gate, up).double(), ops.swiglu.reference, inputs(), backward=False
        )


def test_poisoned_memory_is_nan():
    with poisoned():
        assert bool(torch.empty(3).isnan().all()) and bool(torch.ones(2).new_empty(3).isnan().all())
        assert bool(torch.empty_like(torch.ones(3)).isnan().all())
    assert torch.empty(3).fill_(1).sum() == 3


def test_overflow_of_plain_pytorch_excuses_nothing():
    exact = torch.tensor([60000.0, 1.0], dtype=torch.float64)
    plain = torch.tensor([float("inf"), 1.0], dtype=torch.float16)
    assert not compare("y", torch.tensor([float("nan"), 1.0]).half(), plain, exact, 1.0).ok
    assert compare("y", exact.half(), plain, exact, 1.0).ok


def test_a_large_gradient_does_not_excuse_a_wrong_output():
    generator = torch.Generator().manual_seed(0)
    many = {"x": torch.randn(4096, 64, generator=generator).requires_grad_(), "weight": torch.ones(64).requires_grad_()}
    off = lambda x, weight: ops.rms_norm.reference(x, weight) + 3e-5  # noqa: E731
    assert not verify(off, ops.rms_norm.reference, many)[0].ok
