"""causal_conv1d and causal_conv1d_update against their float64 references, on every backend that runs here."""

import itertools

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

OP = "causal_conv1d"


def inputs(
    B=2, D=5, L=9, W=4, *, dtype=torch.float32, device="cpu", bias=True, silu=True, initial=False, final=False,
    documents=None, numbers=None, wide=None,
):  # fmt: skip
    """Keyword arguments of a call; `documents` are lengths that add up to L, `numbers` one row of seq_idx for each
    sequence; `wide` is the dtype of the weight and the bias."""
    rows = B if documents is None else len(documents)
    values = {
        "x": randn(B, D, L, dtype=dtype, device=device, seed=1),
        "weight": randn(D, W, dtype=wide or dtype, device=device, seed=2),
        "activation": "silu" if silu else None,
    }
    if bias:
        values["bias"] = randn(D, dtype=wide or dtype, device=device, seed=3)
    if initial:
        values["initial_state"] = randn(rows, D, W - 1, dtype=dtype, device=device, seed=4)
    if final:
        values["return_final_state"] = True
    if documents is not None:
        assert sum(documents) == L and B == 1
        values["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32, device=device)
    if numbers is not None:
        values["seq_idx"] = torch.tensor(numbers, dtype=torch.int32, device=device)
    return values


def transposed(t):
    """The same numbers as a view of (B, L, D)."""
    return t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(t.requires_grad)


def check(backend, values, **options):
    with llmcore.backend(backend):
        assert_accurate(ops.causal_conv1d, ops.causal_conv1d.reference, values, **options)


SHAPES = [(2, 5, 9), (1, 1, 1), (2, 3, 2), (1, 16, 64), (1, 40, 65), (3, 17, 130), (1, 8, 1100), (1, 150, 40)]


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D", "L"), SHAPES)
@pytest.mark.parametrize("layout", ["BDL", "BLD"])
def test_shapes(backend, device, dtype, B, D, L, W, layout):
    values = inputs(B, D, L, W, dtype=dtype, device=device)
    values["x"] = transposed(values["x"]) if layout == "BLD" else values["x"]
    check(backend, values)


FLAGS = ("bias", "silu", "initial", "packed", "final", "view", "short")


def flags(row: int) -> dict[str, bool]:
    """Over the 16 rows every pair of flags takes all four values."""
    a, b, c, d = (bool(row >> i & 1) for i in range(4))
    return dict(zip(FLAGS, (a, b, c, d, a ^ b, a ^ c, b ^ d), strict=True))


def of_flags(dtype, device, W, *, packed, view, short, **options):
    if packed:
        documents = [1, 0, 2] if short else [3, 0, 70, 1, 2, 8]
        values = inputs(1, 6, sum(documents), W, dtype=dtype, device=device, documents=documents, **options)
    else:
        values = inputs(2, 6, 2 if short else 70, W, dtype=dtype, device=device, **options)
    return values | {"x": transposed(values["x"])} if view else values


def test_flags_meet_in_pairs():
    rows = [tuple(flags(row).values()) for row in range(16)]
    for i, j in itertools.combinations(range(len(FLAGS)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product((False, True), repeat=2)), (i, j)


@pytest.mark.parametrize("row", range(16))
def test_flags_pairwise(backend, device, row):
    check(backend, of_flags(DTYPES[row % 3], device, 2 + row % 3, **flags(row)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("values", list(itertools.product((False, True), repeat=len(FLAGS))), ids=str)
def test_every_combination_of_flags(backend, device, dtype, W, values):
    check(backend, of_flags(dtype, device, W, **dict(zip(FLAGS, values, strict=True))))


@given(
    B=st.integers(1, 3), D=st.integers(1, 140), L=st.integers(1, 600), W=st.integers(2, 4),
    dtype=st.sampled_from(DTYPES), view=st.booleans(), initial=st.booleans(), final=st.booleans(), silu=st.booleans(),
)  # fmt: skip
def test_any_shape(backend, B, D, L, W, dtype, view, initial, final, silu):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = inputs(B, D, L, W, dtype=dtype, device=device, initial=initial, final=final, silu=silu)
    check(backend, values | {"x": transposed(values["x"])} if view else values)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12), D=st.integers(1, 20), W=st.integers(2, 4),
    view=st.booleans(), initial=st.booleans(), numbered=st.booleans(),
)  # fmt: skip
def test_any_documents(backend, lengths, D, W, view, initial, numbered):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if numbered:
        numbers = [[i % 2 for i, length in enumerate(lengths) for _ in range(length)]]
        values = inputs(1, D, sum(lengths), W, device=device, numbers=numbers)
    else:
        values = inputs(1, D, sum(lengths), W, device=device, documents=lengths, initial=initial, final=True)
    check(backend, values | {"x": transposed(values["x"])} if view else values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(backend, device, dtype):
    """Views of (B, L, D) are read in place and give such a view; so is every other layout."""
    values = inputs(2, 18, 70, dtype=dtype, device=device, initial=True, final=True)
    values["x"] = transposed(values["x"])
    with llmcore.backend(backend):
        y, _ = ops.causal_conv1d(**values)
    assert y.stride() == values["x"].stride()
    wide = randn(2, 36, 140, dtype=dtype, device=device, grad=False)
    values["weight"] = randn(4, 36, dtype=dtype, device=device, grad=False).t()[::2].requires_grad_()
    values["bias"] = randn(36, dtype=dtype, device=device, grad=False)[::2].requires_grad_()
    values["initial_state"] = transposed(values["initial_state"])
    for x in (
        wide[:, ::2, ::2],
        wide[:, :18, 70:],
        wide[:1, :18, :70].expand(2, 18, 70),
        wide[:, :1, :70].expand(2, 18, 70),
        wide[:, :18, :1].expand(2, 18, 70),
        wide.transpose(1, 2)[:, 3:21, :36],
        wide.permute(2, 1, 0)[: 5 if INTERPRETED else 140, :18],
    ):
        length = x.shape[2]
        for sliced in (x, x[..., : min(length, 3)]):
            check(backend, values | {"x": sliced.requires_grad_()} | (
                {"initial_state": values["initial_state"][:1].detach().expand(x.shape[0], 18, 3).requires_grad_()}
            ))  # fmt: skip


@pytest.mark.parametrize("view", [False, True])
def test_a_gradient_of_any_layout(backend, device, view):
    values = inputs(2, 18, 70, device=device)
    x = transposed(values["x"]) if view else values["x"]
    with llmcore.backend(backend):
        y = ops.causal_conv1d(**values | {"x": x})
    dy = randn(2, 18, 70, device=device, grad=False, seed=5)
    layouts = (dy, transposed(dy), dy.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    grads = [torch.autograd.grad(y, [x, values["weight"]], d, retain_graph=True) for d in layouts]
    for other in grads[1:]:
        torch.testing.assert_close(grads[0], other, rtol=1e-5, atol=1e-5)
    one = torch.autograd.grad(y, [x, values["weight"]], dy[:, :, :1].expand_as(dy), retain_graph=True)
    two = torch.autograd.grad(y, [x, values["weight"]], dy[:, :, :1].expand_as(dy).contiguous())
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.float64])
def test_dtypes_may_differ(backend, device, wide):
    check(backend, inputs(2, 5, 70, dtype=torch.bfloat16, device=device, wide=wide, initial=True, final=True))
    values = inputs(2, 5, 70, dtype=torch.bfloat16, device=device, initial=True)
    values["initial_state"] = randn(2, 5, 3, dtype=wide, device=device, seed=4)
    check(backend, values)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("split", [1, 2, 63, 64, 128])
def test_a_state_passed_on_equals_one_call(backend, device, split, view):
    values = inputs(2, 5, 130, device=device, initial=True, final=True)
    values["x"] = transposed(values["x"]) if view else values["x"]
    with llmcore.backend(backend):
        y, final = ops.causal_conv1d(**values)
        first, state = ops.causal_conv1d(**values | {"x": values["x"][..., :split]})
        second, last = ops.causal_conv1d(**values | {"x": values["x"][..., split:], "initial_state": state})
    joined = torch.cat([first, second], -1)
    torch.testing.assert_close(joined, y, rtol=1e-6, atol=1e-6)
    assert torch.equal(last, final)
    leaves = [t for t in values.values() if isinstance(t, torch.Tensor)]
    seed = randn(*y.shape, device=device, grad=False)
    one, two = (
        torch.autograd.grad((o * seed).sum() + s.square().sum(), leaves) for o, s in ((y, final), (joined, last))
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_packed_equals_separate(backend, device, initial, view):
    lengths = [5, 64, 0, 1, 2, 130]
    values = inputs(1, 6, sum(lengths), device=device, documents=lengths, initial=initial, final=True)
    values["x"] = transposed(values["x"]) if view else values["x"]
    offsets = values.pop("cu_seqlens")
    with llmcore.backend(backend):
        y, states = ops.causal_conv1d(**values, cu_seqlens=offsets)
        for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            one = values | {"x": values["x"][..., begin:end]}
            if initial:
                one["initial_state"] = values["initial_state"][i : i + 1]
            alone, state = ops.causal_conv1d(**one)
            torch.testing.assert_close(y[..., begin:end], alone, rtol=1e-6, atol=1e-6)
            assert torch.equal(states[i : i + 1], state)


@pytest.mark.parametrize("view", [False, True])
def test_numbered_equals_separate(backend, device, view):
    lengths = [[5, 64, 1, 2, 130], [1, 1, 1, 100, 99]]
    numbers = [[i % 3 for i, length in enumerate(row) for _ in range(length)] for row in lengths]
    values = inputs(2, 6, 202, device=device, numbers=numbers)
    values["x"] = transposed(values["x"]) if view else values["x"]
    check(backend, values)
    with llmcore.backend(backend):
        y = ops.causal_conv1d(**values)
        del values["seq_idx"]
        for row in range(2):
            begin = 0
            for length in lengths[row]:
                piece = values["x"][row : row + 1, :, begin : begin + length]
                alone = ops.causal_conv1d(**values | {"x": piece})
                torch.testing.assert_close(y[row : row + 1, :, begin : begin + length], alone, rtol=1e-6, atol=1e-6)
                begin += length


def test_seq_idx_of_any_strides(backend, device):
    values = inputs(2, 6, 20, device=device, numbers=[[t // 7 for t in range(20)]])
    values["seq_idx"] = values["seq_idx"].expand(2, 20)
    check(backend, values)
    values["seq_idx"] = values["seq_idx"].t().contiguous().t()
    check(backend, values)


def test_infinities_stay_in_their_windows(backend, device):
    for view in (False, True):
        values = inputs(1, 3, 70, W=2, device=device, silu=False, documents=[30, 40])
        with torch.no_grad():
            values["x"][0, 1, 5] = float("inf")
            values["x"][0, 2, 29] = float("nan")
        values["x"] = transposed(values["x"]) if view else values["x"]
        with llmcore.backend(backend):
            y = ops.causal_conv1d(**values)
            (dx,) = torch.autograd.grad(y, values["x"], torch.ones_like(y))
        bad = torch.zeros(1, 3, 70, dtype=torch.bool, device=device)
        bad[0, 1, 5:7], bad[0, 2, 29] = True, True
        assert torch.equal(~y.isfinite(), bad) and dx.isfinite().all()


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("view", [False, True])
def test_a_long_sequence(backend, device, view):
    values = inputs(1, 3, 40000, device=device)
    check(backend, values | {"x": transposed(values["x"])} if view else values)


@pytest.mark.parametrize("initial", [False, True])
def test_only_inputs_are_saved(backend, device, initial):
    values = inputs(2, 6, 70, device=device, initial=initial, final=True)
    saved = []
    with (
        llmcore.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ops.causal_conv1d(**values)
    given_ = {t.untyped_storage().data_ptr() for t in values.values() if isinstance(t, torch.Tensor)}
    assert {t.untyped_storage().data_ptr() for t in saved} == given_


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("empty", ["L", "B", "D"])
def test_empty(backend, device, empty, numbered):
    sizes = {"B": 2, "D": 4, "L": 3} | {empty: 0}
    values = inputs(**sizes, device=device, initial=not numbered, final=not numbered)
    if numbered:
        values["seq_idx"] = torch.zeros(sizes["B"], sizes["L"], dtype=torch.int32, device=device)
    with llmcore.backend(backend):
        result = ops.causal_conv1d(**values)
    y, final = (result, None) if numbered else result
    assert y.shape == values["x"].shape
    if empty == "L" and final is not None:
        assert torch.equal(final, values["initial_state"])
        (final * 2).sum().backward(retain_graph=True)
        assert (values["initial_state"].grad == 2).all()
    y.sum().backward()
    assert values["weight"].grad.shape == values["weight"].shape and not values["weight"].grad.any()


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat(backend, device, dtype, view):
    values = inputs(3, 40, 530, dtype=dtype, device=device, initial=True, final=True)
    values["x"] = transposed(values["x"]) if view else values["x"]
    leaves = [t for t in values.values() if isinstance(t, torch.Tensor)]
    runs = []
    for _ in range(2):
        with llmcore.backend(backend):
            y, last = ops.causal_conv1d(**values)
        runs.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["weight", "bias", "x"])
def test_one_gradient_alone(backend, device, name):
    values = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in inputs(device=device).items()}
    values[name].requires_grad_()
    check(backend, values)


def test_swish_is_silu(backend, device):
    values = inputs(device=device)
    with llmcore.backend(backend):
        assert torch.equal(ops.causal_conv1d(**values), ops.causal_conv1d(**values | {"activation": "swish"}))


# ---- one step after the other ----


def update_inputs(B=2, D=5, T=None, W=4, N=None, *, dtype=torch.float32, device="cpu", bias=True, silu=True, wide=None):
    shape = (B, D) if T is None else (B, D, T)
    return {
        "x": randn(*shape, dtype=dtype, device=device, grad=False, seed=1),
        "conv_state": randn(B, D, W - 1 if N is None else N, dtype=dtype, device=device, grad=False, seed=2),
        "weight": randn(D, W, dtype=wide or dtype, device=device, grad=False, seed=3),
        "bias": randn(D, dtype=wide or dtype, device=device, grad=False, seed=4) if bias else None,
        "activation": "silu" if silu else None,
    }


def updated(function, **values):
    """(y, the state afterwards), with the state a copy of the same strides."""
    state = values["conv_state"]
    copy = torch.empty_strided(state.shape, state.stride(), dtype=state.dtype, device=state.device).copy_(state)
    return function(**values | {"conv_state": copy}), copy


def check_update(backend, values):
    with llmcore.backend(backend):
        assert_accurate(
            lambda **v: updated(ops.causal_conv1d_update, **v),
            lambda **v: updated(ops.causal_conv1d_update.reference, **v),
            values,
            backward=False,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize(("T", "N"), [(None, None), (None, 4), (1, 7), (2, None), (3, 3), (5, 4), (70, None), (0, 4)])
def test_update(backend, device, dtype, W, T, N):
    check_update(backend, update_inputs(T=T, W=W, N=N, D=21, dtype=dtype, device=device, bias=W > 2, silu=T != 3))


@given(
    B=st.integers(1, 3), D=st.integers(1, 70), T=st.integers(0, 9), W=st.integers(2, 4), more=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES), view=st.booleans(),
)  # fmt: skip
def test_any_update(backend, B, D, T, W, more, dtype, view):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = update_inputs(B, D, T or None, W, W - 1 + more, dtype=dtype, device=device)
    if view:
        values["conv_state"] = transposed(values["conv_state"])
        values["x"] = values["x"].t().contiguous().t() if T == 0 else transposed(values["x"])
    check_update(backend, values)


def test_update_dtypes_may_differ(backend, device):
    values = update_inputs(T=2, dtype=torch.bfloat16, device=device, wide=torch.float32)
    check_update(backend, values)
    check_update(backend, values | {"conv_state": values["conv_state"].float()})
    check_update(backend, values | {"weight": values["weight"].double()})


@pytest.mark.parametrize("T", [1, 3])
def test_updates_equal_the_full_call(backend, device, T):
    values = inputs(2, 18, 24, device=device, initial=True, final=True)
    with llmcore.backend(backend):
        y, final = ops.causal_conv1d(**values)
        state = values["initial_state"].detach().clone()
        filter_ = {n: values[n] for n in ("weight", "bias", "activation")}
        pieces = []
        for piece in values["x"].split(T, -1):
            pieces.append(ops.causal_conv1d_update(piece[..., 0] if T == 1 else piece, state, **filter_).view(2, 18, T))
    torch.testing.assert_close(torch.cat(pieces, -1), y, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, final)


def test_update_of_nothing(backend, device):
    for sizes in ({"B": 0}, {"D": 0}):
        values = update_inputs(**sizes, device=device)
        with llmcore.backend(backend):
            assert ops.causal_conv1d_update(**values).shape == values["x"].shape


@pytest.mark.parametrize("T", [None, 2])
def test_update_as_an_operator(backend, device, T):
    values = update_inputs(T=T, N=4, device=device)
    arguments = (values["x"], values["conv_state"], values["weight"], values["bias"], True, backend)
    opcheck(torch.ops.llmcore.causal_conv1d_update.default, arguments)
    version = values["conv_state"]._version
    with llmcore.backend(backend):
        y = ops.causal_conv1d_update(**values | {"weight": values["weight"].requires_grad_()})
    assert values["conv_state"]._version > version and not y.requires_grad


@pytest.mark.skipif(INTERPRETED, reason="inductor would compile what the interpreter runs")
def test_update_compiles_to_one_graph(backend, device):
    values = update_inputs(N=4, device=device)

    def step(**values):
        return 2 * ops.causal_conv1d_update(**values)

    torch._dynamo.reset()
    with llmcore.backend(backend):
        torch.testing.assert_close(updated(torch.compile(step, fullgraph=True), **values), updated(step, **values))


# ---- what is refused ----


def wrong(**changes):
    return {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in inputs().items()} | changes


NUMBERS = torch.zeros(2, 9, dtype=torch.int32)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (wrong(weight=torch.randn(5, 5)), ValueError, "weight has width 5; allowed: 2 to 4."),
        (wrong(weight=torch.randn(5, 1)), ValueError, "weight has width 1; allowed: 2 to 4."),
        (wrong(weight=torch.randn(4, 5)), ValueError, "weight must be (D, W) with x's D = 5 channels, but its shape is (4, 5); it looks transposed, with the taps before the channels."),
        (wrong(weight=torch.randn(5, 1, 4)), ValueError, "weight must be (D, W), but its shape is (5, 1, 4)."),
        (wrong(x=torch.randn(2, 9, 5)), ValueError, "weight must be (D, W) with x's D = 9 channels, but its shape is (5, 4) and x's is (2, 9, 5); x looks transposed, with time before the channels."),
        (wrong(x=torch.randn(5, 9)), ValueError, "x must be (B, D, L), but its shape is (5, 9)."),
        (wrong(x=torch.zeros(2, 5, 9, dtype=torch.int64)), TypeError, "x has dtype int64; allowed: float32, bfloat16, float16, float64."),
        (wrong(weight=torch.zeros(5, 4, dtype=torch.int32)), TypeError, "weight has dtype int32"),
        (wrong(bias=torch.zeros(4)), ValueError, "bias must be (D,) = (5,), but its shape is (4,)."),
        (wrong(bias=torch.zeros(5, device="meta")), ValueError, "bias is on meta, but x is on cpu"),
        (wrong(activation="relu"), ValueError, "activation is 'relu'; allowed: None, 'silu' or 'swish', which is the same."),
        (wrong(initial_state=torch.zeros(2, 5, 4)), ValueError, "initial_state must be (B, D, W - 1) = (2, 5, 3), but its shape is (2, 5, 4)."),
        (wrong(initial_state=torch.zeros(2, 3, 5)), ValueError, "initial_state must be (B, D, W - 1) = (2, 5, 3), but its shape is (2, 3, 5)."),
        (inputs(1, L=5, documents=[2, 3]) | {"initial_state": torch.zeros(1, 5, 3)}, ValueError, "initial_state must be (S, D, W - 1) = (2, 5, 3), but its shape is (1, 5, 3)."),
        (wrong(cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)), ValueError, "with cu_seqlens all documents are one sequence, but the batch has 2."),
        (inputs(1, L=5, documents=[2, 3]) | {"cu_seqlens": torch.tensor([0, 4, 2, 5], dtype=torch.int32)}, ValueError, "cu_seqlens is [0, 4, 2, 5]; allowed: offsets that start at 0, never fall and end at the length, 5."),
        (inputs(1, L=5, documents=[2, 3]) | {"cu_seqlens": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens has dtype int64; allowed: int32."),
        (wrong(seq_idx=NUMBERS.long()), TypeError, "seq_idx has dtype int64; allowed: int32."),
        (wrong(seq_idx=NUMBERS[:1]), ValueError, "seq_idx must be (B, L) = (2, 9), but its shape is (1, 9)."),
        (wrong(seq_idx=NUMBERS, initial_state=torch.zeros(2, 5, 3)), ValueError, "seq_idx and initial_state were given together; allowed: one of them, since documents marked by seq_idx have no states."),
        (wrong(seq_idx=NUMBERS, return_final_state=True), ValueError, "seq_idx and return_final_state were given together"),
        (inputs(1, L=5, documents=[2, 3]) | {"seq_idx": NUMBERS[:1, :5]}, ValueError, "seq_idx and cu_seqlens were given together"),
    ],
)  # fmt: skip
def test_bad_arguments(values, error, words):
    with pytest.raises(error) as caught:
        ops.causal_conv1d(**values)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.randn(2)}, ValueError, "x must be (B, D) or (B, D, T), but its shape is (2,)."),
        ({"conv_state": torch.zeros(2, 5, 2)}, ValueError, "conv_state must be (B, D, N) = (2, 5, at least 3), but its shape is (2, 5, 2)."),
        ({"conv_state": torch.zeros(2, 3, 5)}, ValueError, "conv_state must be (B, D, N) = (2, 5, at least 3), but its shape is (2, 3, 5)."),
        ({"conv_state": torch.zeros(2, 5, 3, device="meta")}, ValueError, "conv_state is on meta, but x is on cpu"),
        ({"conv_state": torch.zeros(2, 5, 3).double()}, TypeError, "conv_state has dtype float64, but x has float32; allowed: a state that is no wider than float32."),
        ({"weight": torch.zeros(4, 5)}, ValueError, "it looks transposed, with the taps before the channels."),
        ({"activation": True}, ValueError, "activation is True; allowed: None, 'silu' or 'swish'"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_update(changes, error, words):
    with pytest.raises(error) as caught:
        ops.causal_conv1d_update(**update_inputs() | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
