"""selective_state_update against its float64 reference, and against the scan whose step it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn
from sessions import INTERPRETED
from torch.library import opcheck

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "selective_state_update"


def inputs(
    B=2, heads=None, D=5, N=4, G=None, *, dtype=torch.float32, state=None, device="cpu", every=True, softplus=True
):
    """Keyword arguments; `heads` (H, P) in place of D gives the form per head; `every` optional input or none."""
    channels = (D,) if heads is None else heads

    def tensor(*shape, seed, kind=dtype):
        return randn(*shape, dtype=kind, device=device, seed=seed, grad=False)

    groups = () if G is None else (G,)
    dt = tensor(B, *channels, seed=2)
    values = {
        "state": tensor(B, *channels, N, seed=0, kind=state or torch.float32),
        "x": tensor(B, *channels, seed=1),
        "dt": dt if softplus else dt.abs(),
        "A": -tensor(*channels, N, seed=3, kind=torch.float32).exp(),
        "B": tensor(B, *groups, N, seed=4),
        "C": tensor(B, *groups, N, seed=5),
        "dt_softplus": softplus,
    }
    if every:
        values["D"] = tensor(*channels, seed=6, kind=torch.float32)
        values["z"] = tensor(B, *channels, seed=7)
        values["dt_bias"] = tensor(*channels, seed=8, kind=torch.float32).abs()
    return values


def both(function):
    """The op as a function of its state, which it leaves alone: (y, the new state)."""

    def call(state, **others):
        state = state.clone()
        return function(state, **others), state

    return call


def check(backend, values):
    with llmcore.backend(backend):
        assert_accurate(
            both(ops.selective_state_update), both(ops.selective_state_update.reference), values, backward=False
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(N=16),
        dict(N=33),
        dict(N=1, D=1),
        dict(D=6, G=2),
        dict(heads=(4, 8), N=128, G=2),
        dict(heads=(3, 5), G=1),
        dict(heads=(2, 40), N=200, G=2),
    ],
    ids=str,
)
def test_shapes(backend, device, dtype, every, shape):
    check(backend, inputs(dtype=dtype, device=device, every=every, softplus=every, **shape))


@pytest.mark.parametrize("state", DTYPES)
def test_dtypes_of_the_state(backend, device, state):
    check(backend, inputs(dtype=torch.bfloat16, state=state, device=device, N=16))


@pytest.mark.parametrize("turn", range(3))
def test_a_dtype_for_every_argument(backend, device, turn):
    values = inputs(2, (2, 6), N=16, G=1, device=device)
    for i, (name, t) in enumerate(values.items()):
        if name != "dt_softplus":
            values[name] = t.to(DTYPES[(i + i // 3 + turn) % 3])
    check(backend, values)


@given(
    B=st.integers(0, 3), H=st.integers(1, 4), P=st.integers(1, 9), N=st.integers(1, 70), dtype=st.sampled_from(DTYPES)
)
def test_any_shape(backend, B, H, P, N, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(backend, inputs(B, (H, P), N=N, G=H, dtype=dtype, device=device))


def test_expanded_and_strided(backend, device):
    """Mamba-2's parameters are one number per head, expanded to its channels and states."""
    values = inputs(2, (4, 8), N=16, G=1, device=device)
    values["dt"] = values["dt"][:, :, :1].expand(2, 4, 8)
    values["D"], values["dt_bias"] = (values[n][:, :1].expand(4, 8) for n in ("D", "dt_bias"))
    of_each = values["A"]
    for A in (of_each[:, :1], of_each[:, :, :1], of_each[:, :1, :1]):
        values["A"] = A.expand(4, 8, 16)
        check(backend, values)
    wide = randn(2, 16, 8, 4, device=device, grad=False)
    values["state"], values["x"] = wide.permute(0, 3, 2, 1), wide[:, 0].transpose(1, 2)
    with llmcore.backend(backend):
        expected = values["state"].clone()
        y = ops.selective_state_update.reference(**{**values, "state": expected})
        torch.testing.assert_close(ops.selective_state_update(**values), y)
        torch.testing.assert_close(values["state"], expected)


@pytest.mark.parametrize("tied", [True, False])
def test_many_small_steps(backend, device, tied):
    """With decays near 1 the error of each lasts for all steps that follow."""
    values, count = inputs(1, (1, 6), N=5, G=1, device=device, every=False, softplus=False), 16 if INTERPRETED else 256
    values["dt"] = values["dt"] / 1024
    if tied:
        values["A"] = values["A"][:, :, :1].expand(1, 6, 5)

    def steps(update):
        return both(lambda state, **others: [update(state, **others) for _ in range(count)][-1])

    with llmcore.backend(backend):
        update = ops.selective_state_update
        assert_accurate(steps(update), steps(update.reference), values, backward=False)


def test_an_infinite_input_stays_where_it_is(backend, device):
    values = {n: t if n == "dt_softplus" else t.abs() for n, t in inputs(N=5, device=device).items()}
    values["x"][0, 1], values["x"][1, 0], values["A"] = float("inf"), float("nan"), -values["A"]
    check(backend, values)


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_one_of_float64(backend, device, name):
    values = inputs(2, (4, 8), N=5, G=2, device=device)
    check(backend, values | {name: values[name].double()})


def test_a_state_of_float64(backend, device):
    values = inputs(device=device)
    with llmcore.backend(backend), pytest.raises(TypeError, match="state has dtype float64, but x has float32"):
        ops.selective_state_update(**values | {"state": values["state"].double()})


@pytest.mark.parametrize("bad", [-1e-3, float("nan")])
def test_a_bad_step_leaves_the_state_alone(backend, device, bad, monkeypatch):
    monkeypatch.setattr("llmcore.ops._documents._CHECK_VALUES_ON_CUDA", True)
    values = inputs(2, (4, 8), N=16, G=1, device=device, softplus=False)
    values["dt"][1, 2, 3] = bad - values["dt_bias"][2, 3]
    before = values["state"].clone()
    with llmcore.backend(backend), pytest.raises(ValueError, match="negative or no number"):
        ops.selective_state_update(**values)
    assert torch.equal(values["state"], before)


def test_steps_equal_the_scan(backend, device):
    B, D, L, N = 2, 5, 7, 4
    u, delta, z = (randn(B, D, L, device=device, seed=s, grad=False) for s in range(3))
    b, c = (randn(B, N, L, device=device, seed=s, grad=False) for s in (3, 4))
    A, skip, bias = -randn(D, N, device=device, grad=False).exp(), randn(D, device=device, grad=False), None
    y, last = ops.selective_scan(u, delta, A, b, c, skip, z, bias, True, True)
    state = torch.zeros(B, D, N, device=device)
    with llmcore.backend(backend):
        for t in range(L):
            now = [x[..., t] for x in (u, delta)] + [A] + [x[..., t] for x in (b, c)]
            out = ops.selective_state_update(state, *now, skip, z[..., t], bias, True)
            torch.testing.assert_close(out, y[..., t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_a_state_that_autograd_needs_is_not_changed_unseen(backend, device):
    values = inputs(device=device)
    weight = torch.ones_like(values["state"], requires_grad=True)
    loss = (weight * values["state"]).sum()
    with llmcore.backend(backend):
        ops.selective_state_update(**values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck(backend, device):
    values = inputs(2, (4, 8), N=16, G=2, device=device)
    softplus = values.pop("dt_softplus")
    opcheck(torch.ops.llmcore.selective_state_update.default, (*values.values(), softplus, backend))


@pytest.mark.skipif(INTERPRETED, reason="inductor would compile what the interpreter runs")
def test_compiles_to_one_graph(backend, device):
    values = inputs(2, D=6, N=16, G=2, device=device)
    expected = {n: t.clone() if n == "state" else t for n, t in values.items()}

    def steps(state, **others):
        return sum(ops.selective_state_update(state, **others) for _ in range(2)) + state.sum()

    with llmcore.backend(backend):
        torch._dynamo.reset()
        actual = torch.compile(steps, fullgraph=True)(**values)
        torch.testing.assert_close(actual, steps(**expected))
    torch.testing.assert_close(values["state"], expected["state"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"state": torch.zeros(2, 5)}, ValueError, "state must be (B, D, N) or (B, H, P, N), but its shape is (2, 5)."),
        ({"state": torch.zeros(2, 5, 300)}, ValueError, "state has 300 states; allowed: 1 to 256."),
        ({"x": torch.zeros(2, 4)}, ValueError, "x must be (B, D) = (2, 5), but its shape is (2, 4)."),
        ({"A": torch.zeros(4, 5)}, ValueError, "A must be (D, N) = (5, 4), but its shape is (4, 5)."),
        (
            {"B": torch.zeros(4, 2)},
            ValueError,
            "B must be (B, N) or (B, G, N) with B = 2 and N = 4, but its shape is (4, 2).",
        ),
        ({"C": torch.zeros(2, 5, 4)}, ValueError, "C must be B's shape = (2, 4), but its shape is (2, 5, 4)."),
        ({"B": torch.zeros(2, 3, 4)}, ValueError, "B has 3 groups; allowed: a divisor of the 5 channels."),
        ({"x": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "x has dtype int64"),
        (
            {"dt": -torch.ones(2, 5), "dt_softplus": False, "dt_bias": None},
            ValueError,
            "dt (with dt_bias) has an element that is negative or no number",
        ),
        ({"z": torch.zeros(2, 5, device="meta")}, ValueError, "z is on meta, but state is on cpu"),
    ],
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error) as caught:
        ops.selective_state_update(**{**inputs(), **changes})
    assert words in str(caught.value) and "\n" not in str(caught.value)
