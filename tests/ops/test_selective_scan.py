"""selective_scan against its float64 reference, on every backend that runs here."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn
from sessions import INTERPRETED

import llmcore
from llmcore import ops
from llmcore.ops.selective_scan import CHUNK
from llmcore.testing import assert_accurate

OP = "selective_scan"


def inputs(
    B=2, D=5, L=9, N=4, G=None, *, dtype=torch.float32, device="cpu", D_=True, z=True, bias=True, softplus=True,
    initial=False, documents=None, last=True, wide=None,
):  # fmt: skip
    """Keyword arguments of a call; `documents` are lengths that add up to L; `wide` is the dtype of u and z alone."""

    def leaf(*shape, seed, kind=dtype):
        return randn(*shape, dtype=kind, device=device, seed=seed)

    rows = B if documents is None else len(documents)
    delta = leaf(B, D, L, seed=1)
    values = {
        "u": leaf(B, D, L, seed=2, kind=wide or dtype),
        "delta": delta if softplus else (delta.detach().abs() / 2).requires_grad_(),
        "A": (-torch.exp(leaf(D, N, seed=3, kind=torch.float32).detach())).requires_grad_(),
        "B": leaf(*((B, N, L) if G is None else (B, G, N, L)), seed=4),
        "C": leaf(*((B, N, L) if G is None else (B, G, N, L)), seed=5),
        "delta_softplus": softplus,
        "return_last_state": last,
    }
    if D_:
        values["D"] = leaf(D, seed=6, kind=torch.float32)
    if z:
        values["z"] = leaf(B, D, L, seed=7, kind=wide or dtype)
    if bias:
        shift = leaf(D, seed=8, kind=torch.float32).detach()
        values["delta_bias"] = (shift if softplus else shift.abs()).requires_grad_()
    if initial:
        values["initial_state"] = leaf(rows, D, N, seed=9, kind=torch.float32)
    if documents is not None:
        assert sum(documents) == L and B == 1
        values["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32, device=device)
    return values


def check(backend, values, **options):
    with llmcore.backend(backend):
        assert_accurate(ops.selective_scan, ops.selective_scan.reference, values, **options)


SHAPES = [
    (2, 5, 9, 4, None),
    (1, 1, 1, 1, None),
    (2, 16, 64, 16, None),
    (1, 40, 65, 16, 2),
    (1, 17, 130, 16, None),
    (2, 6, 33, 3, 3),
    (1, 3, 20, 33, None),
    (1, 2, 5, 256, None),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D", "L", "N", "G"), SHAPES)
def test_shapes(backend, device, dtype, B, D, L, N, G):
    check(backend, inputs(B, D, L, N, G, dtype=dtype, device=device))


FLAGS = ("D_", "z", "bias", "softplus", "initial", "packed", "last", "grouped")


def flags(row: int) -> dict[str, bool]:
    """Over the 16 rows every pair of flags takes all four values."""
    a, b, c, d = (bool(row >> i & 1) for i in range(4))
    columns = (a, b, c, d, a ^ b, a ^ c, b ^ d, a ^ b ^ c ^ d)
    return dict(zip(FLAGS, columns, strict=True))


def of_flags(dtype, device, *, packed, grouped, **options):
    documents = [3, 0, 70, 1, 8] if packed else None
    B, L = (1, 82) if packed else (2, 70)
    return inputs(B, 6, L, 5, 2 if grouped else None, dtype=dtype, device=device, documents=documents, **options)


def test_flags_meet_in_pairs():
    rows = [tuple(flags(row).values()) for row in range(16)]
    for i, j in itertools.combinations(range(len(FLAGS)), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product((False, True), repeat=2)), (i, j)


@pytest.mark.parametrize("row", range(16))
def test_flags_pairwise(backend, device, row):
    check(backend, of_flags(DTYPES[row % 3], device, **flags(row)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", list(itertools.product((False, True), repeat=len(FLAGS))), ids=str)
def test_every_combination_of_flags(backend, device, dtype, values):
    check(backend, of_flags(dtype, device, **dict(zip(FLAGS, values, strict=True))))


@given(
    B=st.integers(1, 3), D=st.integers(1, 40), L=st.integers(1, 3 * CHUNK), N=st.integers(1, 40),
    groups=st.integers(1, 3), dtype=st.sampled_from(DTYPES), initial=st.booleans(),
)  # fmt: skip
def test_any_shape(backend, B, D, L, N, groups, dtype, initial):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    D, L = (D, L) if not INTERPRETED else (min(D, 6), min(L, 80))
    check(backend, inputs(B, D * groups, L, N, groups, dtype=dtype, device=device, initial=initial))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided(backend, device, dtype):
    """Views of (B, L, D) are read in place; so is every other layout."""
    values = inputs(2, 18, 70, 5, dtype=dtype, device=device)
    for name, permuted in (
        ("u", (1, 2)),
        ("delta", (1, 2)),
        ("z", (1, 2)),
        ("B", (1, 2)),
        ("C", (0, 2)),
        ("A", (0, 1)),
    ):
        t = values[name].detach()
        values[name] = t.transpose(*permuted).contiguous().transpose(*permuted).requires_grad_()
    check(backend, values)
    with llmcore.backend(backend):
        y, _ = ops.selective_scan(**values)
    assert y.stride() == values["u"].stride()
    wide = randn(2, 36, 140, dtype=dtype, device=device, grad=False)
    values["u"] = wide[:, ::2, ::2].requires_grad_()
    values["delta"] = wide[:, 1::2, 1::2].requires_grad_()
    values["z"] = wide[:1, :18, :70].expand(2, 18, 70).requires_grad_()
    check(backend, values)


def test_dtypes_may_differ(backend, device):
    check(backend, inputs(2, 5, 70, 4, dtype=torch.float32, device=device, wide=torch.bfloat16))


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_one_of_float64(backend, device, name):
    values = inputs(2, 5, 9, 4, device=device, initial=True)
    check(backend, values | {name: values[name].detach().double()})


@pytest.mark.parametrize("split", [1, 63, 64, 65, 127])
def test_a_state_passed_on_equals_one_call(backend, device, split):
    values = inputs(2, 5, 128, 7, device=device, initial=True)
    parts = []
    for part in (slice(0, split), slice(split, 128)):
        piece = {n: t[..., part] if n in ("u", "delta", "B", "C", "z") else t for n, t in values.items()}
        piece["initial_state"] = parts[0][1] if parts else values["initial_state"]
        with llmcore.backend(backend):
            parts.append(ops.selective_scan(**piece))
    with llmcore.backend(backend):
        y, last = ops.selective_scan(**values)
    joined = torch.cat([parts[0][0], parts[1][0]], -1)
    torch.testing.assert_close(joined, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[1][1], last, rtol=1e-5, atol=1e-5)
    leaves = [t for t in values.values() if isinstance(t, torch.Tensor)]
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device)
    one, two = (torch.autograd.grad((o * seed).sum() + s.sum(), leaves) for o, s in ((y, last), (joined, parts[1][1])))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("initial", [False, True])
def test_packed_equals_separate(backend, device, initial):
    lengths = [5, 64, 0, 1, 130]
    values = inputs(1, 6, sum(lengths), 5, device=device, documents=lengths, initial=initial)
    offsets = values.pop("cu_seqlens").tolist()
    with llmcore.backend(backend):
        y, states = ops.selective_scan(**values, cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device=device))
        for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
            one = {n: t[..., begin:end] if n in ("u", "delta", "B", "C", "z") else t for n, t in values.items()}
            if initial:
                one["initial_state"] = values["initial_state"][i : i + 1]
            alone, state = ops.selective_scan(**one)
            torch.testing.assert_close(y[..., begin:end], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(states[i : i + 1], state, rtol=1e-5, atol=1e-5)


def test_offsets_of_any_stride(backend, device):
    values = inputs(1, 6, 75, 5, device=device, documents=[5, 64, 6])
    apart = values["cu_seqlens"].repeat_interleave(2)[::2]
    assert apart.stride(0) == 2
    check(backend, {**values, "cu_seqlens": apart})


@pytest.mark.parametrize("scale", [1e-6, 1.0, 50.0])
@pytest.mark.parametrize("A", [-1e-8, -1.0, -100.0, 0.0, 1e-4])
def test_extreme_steps_and_decays(backend, device, scale, A):
    values = inputs(1, 3, 140, 4, device=device, softplus=False)
    values["delta"] = (values["delta"].detach() * scale).requires_grad_()
    values["A"] = torch.full_like(values["A"], A).requires_grad_()
    check(backend, values)


@pytest.mark.skipif(INTERPRETED, reason="hours in the interpreter")
def test_a_long_sequence(backend, device):
    if backend == "torch":
        pytest.skip("minutes of single steps; the other backends are held against them in shorter ones")
    values = inputs(1, 3, 32768, 2, device=device)
    check(backend, values)


@pytest.mark.parametrize("documents", [None, [70, 0, 129, 1, 50]])
def test_segments_side_by_side(backend, device, documents, monkeypatch):
    """What a long sequence of few channels is cut into."""
    if backend != "triton":
        pytest.skip("only the Triton kernels cut sequences")
    from llmcore.kernels import device as kernels_device
    from llmcore.kernels import selective_scan as kernel

    monkeypatch.setattr(kernel, "SEGMENT", 2 * CHUNK)
    monkeypatch.setattr(kernels_device, "multiprocessors", lambda _: 1000)
    B, L = (2, 300) if documents is None else (1, 250)
    check(backend, inputs(B, 6, L, 5, 2, device=device, documents=documents, initial=True))
    check(backend, inputs(B, 3, L, 5, device=device, documents=documents, z=False))


def test_deterministic(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        check(backend, inputs(2, 40, 70, 5, 2, device=device))
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_gradient_asked_saves_no_states(backend, device):
    values = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in inputs(device=device).items()}
    with llmcore.backend(backend):
        y, last = ops.selective_scan(**values)
    assert not y.requires_grad and not last.requires_grad


@pytest.mark.parametrize("L", [1, 64, 65, 200])
def test_what_is_saved(backend, device, L):
    """Besides the inputs, one fp32 state per chunk: 4 B D N ceil(L / chunk) bytes."""
    values = inputs(2, 6, L, 5, device=device, initial=True)
    saved = {}
    with (
        llmcore.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ),
    ):
        ops.selective_scan(**values)
    given_ = {t.untyped_storage().data_ptr() for t in values.values() if isinstance(t, torch.Tensor)}
    extra = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in given_)
    assert CHUNK >= 64 and extra == 4 * 2 * 6 * 5 * -(-L // CHUNK)


@pytest.mark.parametrize("empty", ["L", "B", "D"])
def test_empty(backend, device, empty):
    sizes = {"B": 2, "D": 4, "L": 3} | {empty: 0}
    values = inputs(sizes["B"], sizes["D"], sizes["L"], 3, device=device, initial=True)
    with llmcore.backend(backend):
        y, last = ops.selective_scan(**values)
    assert y.shape == values["u"].shape
    if empty == "L":
        assert torch.equal(last, values["initial_state"])
    (y.sum() + last.sum()).backward()
    assert values["A"].grad.shape == values["A"].shape


def test_results_repeat(backend, device):
    values = inputs(2, 40, 130, 16, device=device)
    leaves = [t for t in values.values() if isinstance(t, torch.Tensor)]
    runs = []
    for _ in range(2):
        with llmcore.backend(backend):
            y, last = ops.selective_scan(**values)
        runs.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def wrong(**changes):
    return {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in inputs().items()} | changes


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (wrong(B=torch.randn(2, 9, 4)), ValueError, "B must be (B, N, L), but its shape is (2, 9, 4): axis N is 9, not 4, axis L is 4, not 9; it looks transposed, with time before the states."),
        (wrong(C=torch.randn(2, 9, 1, 4)), ValueError, "C must be (B, G, N, L), but its shape is (2, 9, 1, 4): axis N is 1, not 4, axis L is 4, not 9"),
        (wrong(B=torch.randn(2, 2, 4, 9)), ValueError, "B has 2 groups; allowed: a divisor of u's 5 channels."),
        (wrong(B=torch.randn(9)), ValueError, "B must be (B, N, L) or (B, G, N, L), but its shape is (9,)."),
        (wrong(B=torch.randn(2, 1, 4, 9), C=torch.randn(2, 5, 4, 9)), ValueError, "C must be B's shape, as (B, G, N, L) = (2, 1, 4, 9)"),
        (wrong(A=-torch.rand(4, 5)), ValueError, "A must be (D, N) = (5, 5), but its shape is (4, 5)."),
        (wrong(A=-torch.rand(5, 257)), ValueError, "A has 257 states; allowed: 1 to 256."),
        (wrong(initial_state=torch.zeros(2, 4, 5)), ValueError, "initial_state must be (B, D, N) = (2, 5, 4), but its shape is (2, 4, 5)."),
        (wrong(delta=torch.rand(2, 9, 5)), ValueError, "delta must be (B, D, L) = (2, 5, 9), but its shape is (2, 9, 5)."),
        (wrong(D=torch.rand(4)), ValueError, "D must be (D,) = (5,), but its shape is (4,)."),
        (wrong(delta=-torch.rand(2, 5, 9), delta_softplus=False), ValueError, "delta (with delta_bias) has an element that is negative or no number"),
        (wrong(delta=torch.full((2, 5, 9), float("nan")), delta_softplus=False), ValueError, "negative or no number; allowed: at least 0, or delta_softplus=True."),
        (wrong(u=torch.zeros(2, 5, 9, dtype=torch.int64)), TypeError, "u has dtype int64"),
        (wrong(z=torch.zeros(2, 5, 9, device="meta")), ValueError, "z is on meta, but u is on cpu"),
        (wrong(cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)), ValueError, "with cu_seqlens all documents are one sequence, but the batch has 2."),
        (inputs(1, L=5, documents=[2, 3]) | {"cu_seqlens": torch.tensor([0, 4, 2, 5], dtype=torch.int32)}, ValueError, "cu_seqlens is [0, 4, 2, 5]; allowed: offsets that start at 0, never fall and end at the length, 5."),
        (inputs(1, L=5, documents=[2, 3]) | {"cu_seqlens": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens has dtype int64; allowed: int32."),
    ],
)  # fmt: skip
def test_bad_arguments(values, error, words):
    with pytest.raises(error) as caught:
        ops.selective_scan(**values)
    assert words in str(caught.value) and "\n" not in str(caught.value)
