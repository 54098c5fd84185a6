import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "moe_mlp"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs_of(indices, experts, width=24, inner=20, dtype=torch.float32):
    tokens, top_k = indices.shape
    return {
        "x": randn(tokens, width, dtype=dtype, device=DEVICE),
        "w_gate_up": (randn(experts, 2 * inner, width, dtype=dtype, device=DEVICE, seed=1, grad=False) * width**-0.5)
        .requires_grad_(),
        "w_down": (randn(experts, width, inner, dtype=dtype, device=DEVICE, seed=2, grad=False) * inner**-0.5)
        .requires_grad_(),
        "weights": randn(tokens, top_k, device=DEVICE, seed=3),
        "indices": indices.to(DEVICE),
    }  # fmt: skip


def routed(tokens, experts, top_k, kind="random", seed=0):
    """(T, k) indices, each token's experts different."""
    generator = torch.Generator().manual_seed(seed)
    merit = torch.rand(tokens, experts, generator=generator)
    if kind == "skewed":  # all to the last ones
        merit += torch.arange(experts)
    if kind == "few":  # most get nothing
        merit[:, : experts - max(top_k, 2)] -= 1
    return merit.topk(top_k).indices


def weighted_before_the_last_product(x, w_gate_up, w_down, weights, indices):
    """The same in plain PyTorch, where the weights' gradient is found as llmcore finds it."""
    y = torch.zeros_like(x)
    for e in range(w_down.shape[0]):
        token, choice = torch.where(indices == e)
        gate, up = (x[token] @ w_gate_up[e].T).chunk(2, -1)
        act = F.silu(gate) * up * weights[token, choice, None]
        y = y.index_add(0, token, act.to(y.dtype) @ w_down[e].T)
    return y


def check(backend, inputs):
    with llmcore.backend(backend):
        assert_accurate(ops.moe_mlp, ops.moe_mlp.reference, inputs, plain_torch=[weighted_before_the_last_product])


@pytest.mark.parametrize("kind", ["random", "skewed", "few"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loads(backend, dtype, kind):
    check(backend, inputs_of(routed(45, 6, 2, kind), 6, dtype=dtype))


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (8, 1), (8, 8), (64, 6), (256, 8)])
@pytest.mark.parametrize("tokens", [1, 17])
def test_sizes(backend, tokens, experts, top_k):
    check(backend, inputs_of(routed(tokens, experts, top_k), experts, width=16, inner=8))


@pytest.mark.parametrize(("width", "inner"), [(1, 1), (3, 70), (70, 3), (64, 64), (130, 33)])
def test_widths(backend, width, inner):
    check(backend, inputs_of(routed(40, 4, 2), 4, width, inner))


def numbers_of_choices(experts):
    return sorted({1, 2, experts // 2, experts} & set(range(1, experts + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "skewed", "few"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("experts", "top_k"), [(e, k) for e in (1, 2, 5, 16, 33, 128, 256) for k in numbers_of_choices(e)]
)
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_number_of_experts(backend, tokens, experts, top_k, dtype, kind):
    check(backend, inputs_of(routed(tokens, experts, top_k, kind), experts, width=12, inner=8, dtype=dtype))


def test_no_token(backend):
    check(backend, inputs_of(torch.zeros(0, 2, dtype=torch.int64), 3))


def test_a_token_may_name_an_expert_twice(backend):
    check(backend, inputs_of(torch.tensor([[1, 1], [0, 1], [1, 1]]), 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(backend, dtype):
    inputs = inputs_of(routed(12, 4, 2), 4, dtype=dtype)
    x, w_gate_up, w_down, weights, indices = (t.detach() for t in inputs.values())
    wide = torch.cat([x, x], 1)
    for change in (
        {"x": wide[:, ::2]},
        {"x": wide[:, 5:29]},
        {"x": x[:1].expand(12, 24)},
        {"w_gate_up": w_gate_up.transpose(1, 2).contiguous().transpose(1, 2)},
        {"w_down": w_down.transpose(1, 2).contiguous().transpose(1, 2)},
        {"w_down": w_down.repeat(1, 1, 2)[:, :, ::2], "w_gate_up": w_gate_up[:1].expand(w_gate_up.shape)},
        {"weights": weights.T.contiguous().T, "indices": indices.T.contiguous().T},
    ):
        leaves = {n: t.detach().requires_grad_() if n != "indices" else t for n, t in {**inputs, **change}.items()}
        check(backend, leaves)


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 12),
    data=st.data(),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    kind=st.sampled_from(["random", "skewed", "few"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_experts(backend, tokens, experts, data, widths, kind, dtype):
    top_k = data.draw(st.integers(1, experts))
    check(backend, inputs_of(routed(tokens, experts, top_k, kind), experts, *widths, dtype=dtype))


def test_the_same_bits_every_time(backend):
    inputs = inputs_of(routed(200, 8, 3), 8)
    leaves = list(inputs.values())[:4]
    runs = []
    with llmcore.backend(backend):
        for _ in range(3):
            y = ops.moe_mlp(**inputs)
            runs.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for again in runs[1:]:
        torch.testing.assert_close(again, runs[0], rtol=0, atol=0)


def test_with_and_without_gradients_are_the_same_bits(backend):
    inputs = inputs_of(routed(30, 5, 2), 5, dtype=torch.bfloat16)
    with llmcore.backend(backend):
        kept = ops.moe_mlp(**inputs)
        with torch.no_grad():
            torch.testing.assert_close(ops.moe_mlp(**inputs), kept.detach(), rtol=0, atol=0)


def test_a_nan_stays_with_its_token(backend):
    """Of what a token gives, only its experts' weights' gradients are touched."""
    inputs = inputs_of(routed(20, 6, 2), 6)
    spoiled = {**inputs, "x": inputs["x"].detach().clone()}
    spoiled["x"][7] = torch.nan
    with llmcore.backend(backend):
        clean, touched = ops.moe_mlp(**inputs), ops.moe_mlp(**spoiled)
        weighted = {**inputs, "weights": inputs["weights"].detach().clone()}
        weighted["weights"][7, 1] = torch.nan
        by_weight = ops.moe_mlp(**weighted)
    others = torch.arange(20) != 7
    for result in (touched, by_weight):
        assert bool(result[7].isnan().all())
        torch.testing.assert_close(result[others], clean[others], rtol=0, atol=0)


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_kept_for_the_backward(backend, keep):
    """Besides the inputs: 2 F elements of a pair, and two numbers of four bytes for its place."""
    inputs = inputs_of(routed(50, 8, 2), 8, dtype=torch.bfloat16)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with (
        llmcore.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.set_grad_enabled(keep),
    ):
        y = ops.moe_mlp(**inputs)
    mine = {t.data_ptr() for t in inputs.values()}
    extra = sum(t.numel() * t.element_size() for p, t in kept.items() if p not in mine)
    assert extra == (100 * 2 * 20 * 2 + 2 * 100 * 4 + 9 * 4 if keep else 0)
    assert y.requires_grad == keep


def test_under_autocast(backend):
    inputs = inputs_of(routed(10, 4, 2), 4)
    with llmcore.backend(backend), torch.autocast(DEVICE, torch.bfloat16):
        y = ops.moe_mlp(**inputs)
        gradients = torch.autograd.grad(y.float().sum(), list(inputs.values())[:4])
    narrow = {n: t.bfloat16() if n in ("x", "w_gate_up", "w_down") else t for n, t in inputs.items()}
    with llmcore.backend(backend):
        torch.testing.assert_close(ops.moe_mlp(**narrow), y, rtol=0, atol=0)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("wrong", [-1, 6, 2**40])
def test_a_token_of_no_expert_is_nan_where_indices_are_not_looked_at(backend, monkeypatch, wrong):
    """Its gradient too, and that of the pair's weight; the others are as if there were no such pair."""
    if backend == "cpu":
        pytest.skip("there indices are always looked at")
    monkeypatch.setattr("llmcore.ops._experts.values_are_checked", lambda _: False)
    inputs = inputs_of(routed(40, 6, 2), 6)
    inputs["indices"][7, 1] = inputs["indices"][39, 0] = wrong
    leaves, dy = list(inputs.values())[:4], randn(40, 24, device=DEVICE, grad=False, seed=4)
    with llmcore.backend(backend):
        y = ops.moe_mlp(**inputs)
    gradients = torch.autograd.grad(y, leaves, dy)
    expected = ops.moe_mlp.reference(**inputs)
    gradients_expected = list(torch.autograd.grad(expected, leaves, dy))
    expected = expected.detach()
    for t, j in ((7, 1), (39, 0)):
        expected[t] = gradients_expected[0][t] = gradients_expected[3][t, j] = torch.nan
    for actual, right in zip((y, *gradients), (expected, *gradients_expected), strict=True):
        torch.testing.assert_close(actual, right, equal_nan=True)


def test_no_token_has_an_expert_where_indices_are_not_looked_at(backend, monkeypatch):
    if backend == "cpu":
        pytest.skip("there indices are always looked at")
    monkeypatch.setattr("llmcore.ops._experts.values_are_checked", lambda _: False)
    inputs = inputs_of(torch.full((5, 2), -1), 3)
    with llmcore.backend(backend):
        y = ops.moe_mlp(**inputs)
    dx, dw_gate_up, dw_down, dweights = torch.autograd.grad(y.sum(), list(inputs.values())[:4])
    assert all(bool(t.isnan().all()) for t in (y, dx, dweights))
    assert not dw_gate_up.any() and not dw_down.any()


def test_weights_that_are_not_finite_spoil_no_gradient_of_their_own(backend):
    """w_down's gradient has no factor w_down, however many rows a group's product is padded to."""
    inputs = inputs_of(routed(40, 1, 1), 2, dtype=torch.bfloat16)
    inputs["indices"][33:] = 1
    with torch.no_grad():
        inputs["w_down"][0, 3, 5] = torch.inf
    with llmcore.backend(backend):
        y = ops.moe_mlp(**inputs)
    (dw_down,) = torch.autograd.grad(y, [inputs["w_down"]], torch.ones_like(y))
    assert bool(dw_down.isfinite().all())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"indices": torch.tensor([[0, 4]] * 3)}, ValueError, "indices holds 4; allowed: 0 to 3, the experts"),
        ({"indices": torch.tensor([[0, 1], [-1, 0], [0, 9]])}, ValueError, "indices holds -1; allowed: 0 to 3"),
        ({"indices": torch.zeros(3, 2)}, TypeError, "indices has dtype float32; allowed: int64"),
        (
            {"indices": torch.zeros(3, 1, dtype=torch.int64)},
            ValueError,
            "indices must be weights' shape, (T, k) = (3, 2)",
        ),
        ({"weights": torch.ones(2, 2)}, ValueError, "weights must be (T, k) with x's T = (3, 2)"),
        ({"weights": torch.ones(3, 0), "indices": torch.ones(3, 0).long()}, ValueError, "allowed: from 1 of each"),
        (
            {"w_gate_up": torch.ones(4, 6, 8)},
            ValueError,
            "w_gate_up must be (E, 2F, C) beside x and w_down = (4, 12, 8)",
        ),
        ({"w_gate_up": torch.ones(12, 8)}, ValueError, "w_gate_up must be (E, 2F, C), but its shape is (12, 8)"),
        (
            {"w_down": torch.ones(4, 6, 8)},
            ValueError,
            "w_down must be (E, C, F) with x's C = (4, 8, 8), but its shape is (4, 6, 8)",
        ),
        ({"w_down": torch.ones(4, 8, 6).half()}, TypeError, "w_down has dtype float16, but x has float32"),
        ({"x": torch.ones(3, 8, device="meta")}, ValueError, "w_down is on cpu, but x is on meta"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {
        "x": torch.ones(3, 8), "w_gate_up": torch.ones(4, 12, 8), "w_down": torch.ones(4, 8, 6),
        "weights": torch.ones(3, 2), "indices": torch.zeros(3, 2, dtype=torch.int64), **change,
    }  # fmt: skip
    with pytest.raises(error) as caught:
        ops.moe_mlp(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_more_pairs_than_their_numbers_reach():
    x, w_gate_up = torch.empty(2**30, 8, device="meta"), torch.empty(4, 12, 8, device="meta")
    weights, w_down = torch.empty(2**30, 2, device="meta"), torch.empty(4, 8, 6, device="meta")
    with pytest.raises(
        ValueError, match=r"indices \(1073741824, 2\) holds 2147483648 pairs .*; allowed: fewer than 2\*\*31"
    ):
        ops.moe_mlp(x, w_gate_up, w_down, weights, torch.empty(2**30, 2, dtype=torch.int64, device="meta"))
