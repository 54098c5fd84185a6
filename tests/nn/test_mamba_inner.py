"""The inner paths of Mamba and Mamba-2 give what the operators one after the other give, and keep less."""

import pytest
import torch

from llmcore.nn import Mamba, Mamba2, mamba, mamba2

KINDS = [
    pytest.param(lambda: Mamba(24, state_size=5), id="mamba"),
    pytest.param(lambda: Mamba2(24, state_size=6, head_dim=8, num_groups=2, step_limit=(0.01, 0.9)), id="mamba2"),
]


@pytest.fixture(params=[True, False], ids=["fused", "apart"])
def fused(request, monkeypatch):
    if not request.param:
        apart(monkeypatch)
    return request.param


def apart(monkeypatch):
    for module in (mamba, mamba2):
        monkeypatch.setattr(module, "worthwhile", lambda x: False)


def gradients(module, x, dtype=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = module(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], cotangent)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("make", KINDS)
def test_equal(make, dtype, monkeypatch):
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 70, 24)
    together = gradients(module, x, dtype)
    apart(monkeypatch)
    tolerance = 1e-6 if dtype is None else 1e-2
    for a, b in zip(together, gradients(module, x, dtype), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("make", KINDS)
def test_half_parameters(make, monkeypatch):
    torch.manual_seed(0)
    module, x = make().bfloat16(), torch.randn(2, 20, 24).bfloat16()
    together = gradients(module, x)
    apart(monkeypatch)
    for a, b in zip(together, gradients(module, x), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


def kept(module, x):
    """Bytes that autograd holds after a forward pass, parameters and input aside."""
    found = {}

    def keep(t):
        found[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = module(x)
    own = {t.untyped_storage()._cdata for t in (x, *module.parameters())}
    assert y.requires_grad
    return sum(storage.nbytes() for pointer, storage in found.items() if pointer not in own)


@pytest.mark.parametrize(("make", "channels"), [(KINDS[0].values[0], 2 * 48), (KINDS[1].values[0], 48 + 24)])
def test_what_is_not_kept(make, channels, monkeypatch):
    """Mamba: the convolution's output and the steps, D channels each. Mamba-2: the convolution's output."""
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 70, 24, requires_grad=True)
    fused = kept(module, x)
    apart(monkeypatch)
    assert kept(module, x) - fused == 4 * 2 * 70 * channels


@pytest.mark.parametrize("make", KINDS)
def test_parameters_that_are_not_trained(make, fused):
    torch.manual_seed(0)
    module = make().requires_grad_(False)
    module.A_log.requires_grad_()
    module(torch.randn(2, 9, 24)).sum().backward()
    assert module.A_log.grad.abs().sum() > 0 and module.in_proj.weight.grad is None


def test_no_second_derivative():
    x = torch.randn(1, 9, 24, requires_grad=True)
    gradient = torch.autograd.grad(KINDS[0].values[0]()(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
