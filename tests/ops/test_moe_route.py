import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "moe_route"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits_on_a_grid(tokens, experts, dtype=torch.float32, seed=0, step=2**-4):
    """Multiples of `step`: two scores are equal in every dtype, or far enough apart for any."""
    generator = torch.Generator().manual_seed(seed + 31 * tokens + experts)
    logits = (torch.randn(tokens, experts, generator=generator) / step).round() * step
    return logits.to(DEVICE, dtype).requires_grad_()


def bias_on_a_grid(experts, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, (experts,), generator=generator) / 16).to(DEVICE)


def check(backend, logits, top_k, **options):
    def route(function):
        return lambda logits: function(logits, top_k, **options)

    with llmcore.backend(backend):
        assert_accurate(route(ops.moe_route), route(ops.moe_route.reference), {"logits": logits})


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scorings(backend, dtype, normalize, scoring):
    check(backend, logits_on_a_grid(37, 24, dtype), 5, scoring=scoring, normalize=normalize, scale=2.5)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (8, 2), (17, 3), (64, 6), (128, 8), (256, 8), (300, 1)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_sizes(backend, tokens, experts, top_k):
    check(backend, logits_on_a_grid(tokens, experts), top_k)


@pytest.mark.parametrize("experts", [5, 16, 33])
def test_all_experts_are_chosen(backend, experts):
    check(backend, logits_on_a_grid(3, experts), experts, normalize=False)
    check(backend, logits_on_a_grid(3, experts), experts, scoring="sigmoid")


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [2**-4, 1.0], ids=["few ties", "many ties"])
@pytest.mark.parametrize(
    ("experts", "top_k"),
    [(e, k) for e in (1, 2, 3, 7, 16, 33, 64, 129, 256) for k in sorted({1, 2, e // 2, e} & set(range(1, e + 1)))],
)
def test_every_number_of_experts(backend, experts, top_k, step, dtype, biased, scoring):
    bias = bias_on_a_grid(experts) if biased else None
    check(backend, logits_on_a_grid(13, experts, dtype, step=step), top_k, scoring=scoring, bias=bias)


def test_no_token(backend):
    check(backend, logits_on_a_grid(0, 8), 2, return_scores=True)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_scores_and_bias(backend, scoring):
    logits = logits_on_a_grid(19, 24)
    check(backend, logits, 4, scoring=scoring, return_scores=True)
    check(backend, logits, 4, scoring=scoring, bias=bias_on_a_grid(24), return_scores=True)


@pytest.mark.parametrize(
    ("experts", "num_groups", "top_groups", "top_k"),
    [(16, 4, 2, 3), (24, 3, 1, 8), (20, 5, 3, 12), (12, 12, 5, 5), (64, 8, 4, 6), (256, 8, 4, 8), (7, 1, 1, 7)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_groups(backend, biased, experts, num_groups, top_groups, top_k):
    check(
        backend, logits_on_a_grid(21, experts), top_k, scoring="sigmoid", num_groups=num_groups, top_groups=top_groups,
        bias=bias_on_a_grid(experts) if biased else None,
    )  # fmt: skip


@pytest.mark.parametrize("num_groups", [1, 4])
def test_ties_go_to_the_lower_index(backend, num_groups):
    logits = torch.zeros(3, 40, device=DEVICE)
    logits[1, 7::4] = 1.0
    logits[2, :] = torch.tensor([0.0, -0.0] * 20)
    options = {"num_groups": num_groups, "top_groups": 1}
    with llmcore.backend(backend):
        _, indices = ops.moe_route(logits, 6, **options)
        _, biased = ops.moe_route(logits, 3, scoring="sigmoid", bias=torch.tensor([-0.5, 0.5] * 20, device=DEVICE))
    assert indices[0].tolist() == indices[2].tolist() == [0, 1, 2, 3, 4, 5]
    # of four groups of ten the second holds 11, 15, 19, and is as good as the third
    assert indices[1].tolist() == ([7, 11, 15, 19, 23, 27] if num_groups == 1 else [11, 15, 19, 10, 12, 13])
    assert biased[0].tolist() == [1, 3, 5]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("logit", [0.3125, -1.7])
def test_equal_logits_tie_wherever_they_stand(backend, scoring, logit):
    """11 fill no vector of a processor, whose exponentials may differ from those of single numbers."""
    with llmcore.backend(backend):
        _, indices = ops.moe_route(torch.full((3, 11), logit, device=DEVICE), 2, scoring=scoring)
    assert indices.tolist() == [[0, 1]] * 3


def test_the_reference_breaks_ties_alike_in_float64():
    _, indices = ops.moe_route.reference(torch.full((3, 11), 0.3125).double(), 2, scoring="sigmoid")
    assert indices.tolist() == [[0, 1]] * 3


def test_the_slope_of_the_reference_at_zero():
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    weights, _ = ops.moe_route.reference(logits, 3, scoring="sigmoid", normalize=False)
    assert torch.autograd.grad(weights.sum(), logits)[0].tolist() == [[0.25] * 3]


def test_compiles_for_any_scale(backend):
    torch._dynamo.reset()

    def route(logits, scale):
        return ops.moe_route(logits, 2, scale=scale)

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    logits = torch.randn(5, 8, device=DEVICE)
    with llmcore.backend(backend):
        for scale in (1.0, 2.0, 2.5):
            torch.testing.assert_close(compiled(logits, scale), route(logits, scale), rtol=0, atol=0)


def test_an_expert_of_a_shut_group_is_never_chosen(backend):
    """Not even before an open one whose bias shuts it."""
    logits, bias = torch.zeros(1, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    bias[4:] = torch.tensor([1.0, 1.0, -torch.inf, -torch.inf])
    with llmcore.backend(backend):
        _, indices = ops.moe_route(logits, 4, bias=bias, num_groups=2, top_groups=1)
    assert indices.tolist() == [[4, 5, 6, 7]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_nan_stays_with_its_token(backend, num_groups, scoring):
    logits = logits_on_a_grid(9, 12).detach()
    logits[4, 7] = torch.nan
    spoiled = logits.clone().requires_grad_()
    logits[4, 7] = 0.0
    clean = logits.clone().requires_grad_()
    others = torch.arange(9) != 4
    results = []
    for leaf in (spoiled, clean):
        with llmcore.backend(backend):
            weights, indices = ops.moe_route(leaf, 2, scoring=scoring, num_groups=num_groups)
        (slope,) = torch.autograd.grad(weights.square().sum(), leaf)
        results.append((weights[others], indices[others], slope[others]))
        if leaf is spoiled:
            assert bool(weights[4].isnan().all()) and bool(((indices >= 0) & (indices < 12)).all())
            assert indices[4].unique().numel() == 2
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_extreme_logits(backend, scoring):
    rows = [[80.0, -80.0, 0.0, 1.0], [-3e38, 80.0, 0.0, 1.0], [-torch.inf, 0.0, -1.0, -torch.inf], [-200.0] * 4]
    logits = torch.tensor(rows, device=DEVICE, requires_grad=True)
    with llmcore.backend(backend):
        weights, indices = ops.moe_route(logits, 2, scoring=scoring)
        (slope,) = torch.autograd.grad(weights.sum() + weights.square().sum(), logits)
    assert indices.tolist() == [[0, 3], [1, 3], [1, 2], [0, 1]]
    assert bool(weights.isfinite().all()) and bool(slope.isfinite().all())
    _, expected = ops.moe_route.reference(logits.detach().double(), 2, scoring=scoring)
    if scoring == "softmax":
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, device=DEVICE))
    assert torch.equal(expected, indices)


def test_any_layout(backend):
    logits = logits_on_a_grid(12, 40).detach()
    for view in (logits[:, ::2], logits.T, logits[::3, 3:20], logits[:1].expand(6, 40)):
        check(backend, view.detach().requires_grad_(), 3, return_scores=True)


@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 70),
    data=st.data(),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_routing(backend, tokens, experts, data, scoring, normalize, dtype):
    num_groups = data.draw(st.sampled_from([g for g in range(1, experts + 1) if experts % g == 0]))
    top_groups = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, experts // num_groups * top_groups if num_groups > 1 else experts))
    options = {
        "scoring": scoring, "normalize": normalize, "num_groups": num_groups, "top_groups": top_groups,
        "bias": data.draw(st.sampled_from([None, bias_on_a_grid(experts)])),
        "return_scores": data.draw(st.booleans()), "scale": data.draw(st.sampled_from([1.0, 0.5, -16.0])),
    }  # fmt: skip
    check(backend, logits_on_a_grid(tokens, experts, dtype), top_k, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.randn(2, 4), 5), {}, ValueError, "top_k is 5; allowed: 1 to the 4 experts to choose from"),
        ((torch.randn(2, 4), 0), {}, ValueError, "top_k is 0; allowed: whole numbers from 1"),
        ((torch.randn(2, 4), 2.0), {}, ValueError, "top_k is 2.0"),
        (
            (torch.randn(2, 8), 5),
            {"num_groups": 4, "top_groups": 2},
            ValueError,
            "top_k is 5; allowed: 1 to the 4 experts to choose from",
        ),
        ((torch.randn(2, 8), 2), {"num_groups": 3}, ValueError, "num_groups is 3; allowed: a divisor of the 8 experts"),
        ((torch.randn(2, 8), 2), {"top_groups": 2}, ValueError, "top_groups is 2; allowed: 1 to num_groups = 1"),
        ((torch.randn(8), 2), {}, ValueError, "logits must be (T, E), but its shape is (8,)"),
        ((torch.ones(2, 8).long(), 2), {}, TypeError, "logits has dtype int64"),
        ((torch.randn(2, 8), 2), {"scoring": "relu"}, ValueError, "scoring is 'relu'; allowed: 'softmax', 'sigmoid'"),
        ((torch.randn(2, 8), 2), {"bias": torch.zeros(7)}, ValueError, "bias must be (E,) = (8,)"),
        ((torch.randn(2, 8), 2), {"scale": float("nan")}, ValueError, "scale is nan; allowed: finite numbers"),
        ((torch.randn(2, 8), 2), {"scale": 1e39}, ValueError, "scale is 1e+39; allowed: finite numbers of float32"),
        ((torch.randn(2, 8), 2), {"scale": 10**400}, ValueError, "allowed: finite numbers of float32"),
        ((torch.randn(2, 8), 2), {"scale": "1"}, TypeError, "scale is '1'; allowed: a number"),
    ],
)
def test_bad_arguments(arguments, options, error, words):
    with pytest.raises(error) as caught:
        ops.moe_route(*arguments, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
