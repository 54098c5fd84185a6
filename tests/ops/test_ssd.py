"""ssd against its float64 reference, on every backend that runs here."""

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn
from ops.plain_ssd import plain_ssd
from sessions import INTERPRETED

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "ssd"
OVER_TIME = ("x", "dt", "B", "C", "z", "seq_idx")


def inputs(
    B=2, L=9, H=4, P=5, N=3, G=1, *, dtype=torch.float32, device="cpu", D_=True, z=True, bias=True, softplus=True,
    initial=False, documents=None, numbered=False, last=True, limits=False, wide_D=False, other=None,
):  # fmt: skip
    """Keyword arguments of a call; `documents` are lengths that add up to L, or with `numbered` the numbers in each row
    of as many documents as there are lengths; `other` is the dtype of x and z alone."""

    def leaf(*shape, seed, kind=dtype):
        return randn(*shape, dtype=kind, device=device, seed=seed)

    rows = B if documents is None or numbered else len(documents)
    dt = leaf(B, L, H, seed=1)
    values = {
        "x": leaf(B, L, H, P, seed=2, kind=other or dtype),
        "dt": dt if softplus else (dt.detach().abs() / 2).requires_grad_(),
        "A": (-torch.exp(leaf(H, seed=3, kind=torch.float32).detach())).requires_grad_(),
        "B": leaf(B, L, G, N, seed=4),
        "C": leaf(B, L, G, N, seed=5),
        "dt_softplus": softplus,
        "return_final_states": last,
    }
    if limits:
        values["dt_limit"] = (0.2, 1.1)
    if D_:
        values["D"] = leaf(*((H, P) if wide_D else (H,)), seed=6, kind=torch.float32)
    if z:
        values["z"] = leaf(B, L, H, P, seed=7, kind=other or dtype)
    if bias:
        shift = leaf(H, seed=8, kind=torch.float32).detach()
        values["dt_bias"] = (shift if softplus else shift.abs()).requires_grad_()
    if initial:
        values["initial_states"] = leaf(rows, H, P, N, seed=9, kind=torch.float32)
    if documents is not None and numbered:
        row = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
        assert sum(documents) == L
        # One document more in every second row, which begins elsewhere.
        shifted = [row + 7 if i % 2 == 0 else (row.roll(3) + torch.arange(L).ge(L // 2)) for i in range(B)]
        values["seq_idx"] = torch.stack(shifted).int().to(device)
    elif documents is not None:
        assert sum(documents) == L and B == 1
        values["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32, device=device)
    return values


def check(backend, values, **options):
    products = values["x"].dtype if backend == "triton" else None
    with llmcore.backend(backend):
        assert_accurate(ops.ssd, ops.ssd.reference, values, plain_torch=plain_ssd(products), **options)


SHAPES = [
    (2, 9, 4, 5, 3, 1),
    (1, 1, 1, 1, 1, 1),
    (2, 64, 4, 16, 16, 2),
    (1, 65, 3, 17, 33, 3),
    (1, 130, 2, 64, 16, 1),
    (1, 20, 2, 3, 130, 1),
    (1, 33, 2, 80, 5, 2),
    (1, 5, 1, 256, 2, 1),
    (1, 5, 1, 2, 256, 1),
]
if INTERPRETED:  # where time goes with B H times the number of chunks
    SHAPES = [
        (1, 9, 2, 5, 3, 1),
        (1, 1, 1, 1, 1, 1),
        (1, 64, 2, 16, 16, 2),
        (1, 65, 1, 17, 33, 1),
        (1, 130, 1, 64, 16, 1),
        *SHAPES[5:],
    ]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(d, s) for i, s in enumerate(SHAPES) for j, d in enumerate(DTYPES) if not INTERPRETED or i == 2 or i % 3 == j],
)
def test_shapes(backend, device, dtype, shape):
    check(backend, inputs(*shape, dtype=dtype, device=device))


FLAGS = ("D_", "z", "bias", "softplus", "initial", "packed", "last", "grouped", "numbered", "limits", "wide_D")


def flags(row: int) -> dict[str, bool]:
    """Over the 16 rows every pair of flags takes all four values."""
    a, b, c, d = (bool(row >> i & 1) for i in range(4))
    columns = (a, b, c, d, a ^ b, a ^ c, b ^ d, a ^ b ^ c ^ d, a ^ d, b ^ c, c ^ d)
    return dict(zip(FLAGS, columns, strict=True))


def of_flags(dtype, device, *, packed, grouped, **options):
    documents = None
    if packed:
        documents = [3, 70, 1, 8] if options["numbered"] else [3, 0, 70, 1, 8]
    B, L, H = (1 if packed and not options["numbered"] else 2), (82 if packed else 70), 4
    if INTERPRETED:
        B, H = (2 if packed and options["numbered"] else 1), 2
        documents, L = (None, 66) if documents is None else ([n for n in documents if n not in (3, 8)], 71)
    return inputs(B, L, H, 6, 5, 2 if grouped else 1, dtype=dtype, device=device, documents=documents, **options)


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
    B=st.integers(1, 3), L=st.integers(1, 140), H=st.integers(1, 5), P=st.integers(1, 70), N=st.integers(1, 70),
    groups=st.integers(1, 3), dtype=st.sampled_from(DTYPES), initial=st.booleans(),
)  # fmt: skip
def test_any_shape(backend, B, L, H, P, N, groups, dtype, initial):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if INTERPRETED:
        B, H, groups, L, P, N = 1, 1, 2, 1 + L % 70, 1 + P % 40, 1 + N % 40
    check(backend, inputs(B, L, H * groups, P, N, groups, dtype=dtype, device=device, initial=initial))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided(backend, device, dtype):
    """Slices of one projection, as Mamba-2 has them, and layouts that no kernel reads in place."""
    L = 12 if INTERPRETED else 70
    values = inputs(2, L, 4, 6, 5, 2, dtype=dtype, device=device)
    wide = randn(2, L, 24 + 24 + 10 + 10 + 4, dtype=dtype, device=device, grad=False)
    x, z, B, C, dt = wide.split([24, 24, 10, 10, 4], -1)
    pieces = {"x": x.unflatten(-1, (4, 6)), "z": z.unflatten(-1, (4, 6)), "B": B.unflatten(-1, (2, 5))}
    pieces |= {"C": C.unflatten(-1, (2, 5)), "dt": dt}
    check(backend, values | {n: t.detach().requires_grad_() for n, t in pieces.items()})
    for name in ("x", "dt", "B", "C", "z"):
        t = values[name].detach()
        values[name] = t.transpose(1, -1).contiguous().transpose(1, -1).requires_grad_()
    values["z"] = values["z"].detach()[:1].expand(2, -1, -1, -1).requires_grad_()
    values["A"] = torch.stack([values["A"].detach()] * 2, 1)[:, 0].requires_grad_()
    check(backend, values)


def test_dtypes_may_differ(backend, device):
    B, H = (1, 2) if INTERPRETED else (2, 4)
    check(backend, inputs(B, 70, H, 5, 4, dtype=torch.float32, device=device, other=torch.bfloat16))
    check(backend, inputs(B, 70, H, 5, 4, dtype=torch.bfloat16, device=device, other=torch.float32))


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"])
def test_one_of_float64(backend, device, name):
    values = inputs(2, 9, 4, 5, 3, device=device, initial=True)
    check(backend, values | {name: values[name].detach().double()})


@pytest.mark.parametrize("split", [1, 63, 64, 65, 127])
def test_a_state_passed_on_equals_one_call(backend, device, split):
    values = inputs(*((1, 128, 1) if INTERPRETED else (2, 128, 3)), 5, 7, device=device, initial=True)
    parts = []
    for part in (slice(0, split), slice(split, 128)):
        piece = {n: t[:, part] if n in OVER_TIME else t for n, t in values.items()}
        piece["initial_states"] = parts[0][1] if parts else values["initial_states"]
        with llmcore.backend(backend):
            parts.append(ops.ssd(**piece))
    with llmcore.backend(backend):
        y, last = ops.ssd(**values)
    joined = torch.cat([parts[0][0], parts[1][0]], 1)
    torch.testing.assert_close(joined, y, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(parts[1][1], last, rtol=1e-5, atol=2e-5)
    leaves = [t for t in values.values() if isinstance(t, torch.Tensor)]
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device)
    one, two = (torch.autograd.grad((o * seed).sum() + s.sum(), leaves) for o, s in ((y, last), (joined, parts[1][1])))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("initial", [False, True])
def test_packed_equals_separate(backend, device, initial):
    lengths = [5, 64, 0, 1, 130]
    heads = 1 if INTERPRETED else 3
    values = inputs(1, sum(lengths), heads, 6, 5, device=device, documents=lengths, initial=initial)
    offsets = values["cu_seqlens"].tolist()
    numbers = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)).int()[None].to(device)
    with llmcore.backend(backend):
        y, states = ops.ssd(**values)
        values.pop("cu_seqlens")
        if not initial:
            torch.testing.assert_close(ops.ssd(**values, seq_idx=numbers)[0], y, rtol=1e-5, atol=1e-5)
        for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
            one = {n: t[:, begin:end] if n in OVER_TIME else t for n, t in values.items()}
            if initial:
                one["initial_states"] = values["initial_states"][i : i + 1]
            alone, state = ops.ssd(**one)
            torch.testing.assert_close(y[:, begin:end], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(states[i : i + 1], state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 50.0] if INTERPRETED else [1e-6, 1.0, 50.0])
@pytest.mark.parametrize("A", [-1e-8, -1.0, -100.0, 0.0, 1e-4])
def test_extreme_steps_and_decays(backend, device, scale, A):
    values = inputs(1, *((70, 1) if INTERPRETED else (140, 3)), 4, 4, device=device, softplus=False)
    values["dt"] = (values["dt"].detach() * scale).requires_grad_()
    values["A"] = torch.full_like(values["A"], A).requires_grad_()
    check(backend, values)


@pytest.mark.skipif(INTERPRETED, reason="hours in the interpreter")
def test_a_long_sequence(backend, device):
    if backend == "torch":
        pytest.skip("a minute of single steps in the reference; the kernels are held against it")
    with llmcore.backend(backend):
        values = inputs(1, 32768, 1, 2, 3, device=device)
        assert_accurate(ops.ssd, ops.ssd.reference, values, plain_torch=plain_ssd(None)[:1])


@pytest.mark.parametrize("chunk_size", [7] if INTERPRETED else [1, 7, 64, 256])
def test_the_chunk_size_changes_nothing(backend, device, chunk_size):
    check(backend, inputs(1, 100, 2, 4, 5, device=device, initial=True) | {"chunk_size": chunk_size})


def test_equals_the_selective_scan(backend, device):
    """One head and one state per channel of Mamba's scan."""
    values = inputs(2, 70, 3, 4, 5, device=device)
    x, z = (values[n].flatten(2).transpose(1, 2) for n in ("x", "z"))
    delta = values["dt"].repeat_interleave(4, 2).transpose(1, 2)
    B, C = (values[n].permute(0, 2, 3, 1) for n in ("B", "C"))
    A = values["A"].repeat_interleave(4)[:, None].expand(12, 5)
    D, bias = (values[n].repeat_interleave(4) for n in ("D", "dt_bias"))
    y, last = ops.selective_scan(x, delta, A, B, C, D, z, bias, True, True)
    with llmcore.backend(backend):
        actual, states = ops.ssd(**values)
    torch.testing.assert_close(actual.flatten(2).transpose(1, 2), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states.flatten(1, 2), last, rtol=1e-5, atol=1e-5)


def test_deterministic(backend, device):
    torch.use_deterministic_algorithms(True)
    try:
        check(backend, inputs(1 if INTERPRETED else 2, 70, 4, 8, 5, 2, device=device))
    finally:
        torch.use_deterministic_algorithms(False)


def test_results_repeat(backend, device):
    values = inputs(*((1, 70, 2) if INTERPRETED else (2, 130, 4)), 16, 16, device=device)
    leaves = [t for t in values.values() if isinstance(t, torch.Tensor)]
    runs = []
    for _ in range(2):
        with llmcore.backend(backend):
            y, last = ops.ssd(**values)
        runs.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_is_saved_but_the_inputs(backend, device):
    values = inputs(1 if INTERPRETED else 2, 200, 3, 6, 5, device=device, initial=True)
    saved = {}
    with (
        llmcore.backend(backend),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ),
    ):
        ops.ssd(**values)
    assert saved.keys() <= {t.untyped_storage().data_ptr() for t in values.values() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("empty", ["L", "B", "H"])
def test_empty(backend, device, empty):
    sizes = {"B": 2, "L": 3, "H": 4} | {empty: 0}
    values = inputs(sizes["B"], sizes["L"], sizes["H"], 5, 3, device=device, initial=True)
    with llmcore.backend(backend):
        y, last = ops.ssd(**values)
    assert y.shape == values["x"].shape
    if empty == "L":
        assert torch.equal(last, values["initial_states"])
    (y.sum() + last.sum()).backward()
    assert values["A"].grad.shape == values["A"].shape


@pytest.mark.skipif(not INTERPRETED, reason="other devices have tables of their own")
def test_small_blocks_and_slices(backend, device, monkeypatch):
    """Chunks of four blocks, and the heads of a group shared out, as where a GPU would otherwise have too little to do."""
    tiles = importlib.import_module("llmcore.kernels.ssd_tiles")
    for kind in ("bf16", "ieee"):
        small = {256: tiles.Tile(64, 16, 16, 4, 4, 1)}
        monkeypatch.setitem(tiles.TILES, (tiles.device.INTERPRETER, kind), small)
    for multiprocessors, dtype in ((1, torch.float32), (12, torch.bfloat16)):
        monkeypatch.setattr(tiles.device, "multiprocessors", lambda _, n=multiprocessors: n)
        values = inputs(1, 70, 2, 20, 18, dtype=dtype, device=device, initial=True, documents=[52, 18])
        check(backend, values)


def wrong(**changes):
    return {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in inputs().items()} | changes


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (wrong(B=torch.randn(2, 1, 9, 3)), ValueError, "B must be (B, L, G, N) with x's B, L = (2, 9), but its shape is (2, 1, 9, 3)."),
        (wrong(C=torch.randn(2, 9, 3, 1)), ValueError, "C must be B's shape, (B, L, G, N) = (2, 9, 1, 3), but its shape is (2, 9, 3, 1)."),
        (wrong(B=torch.randn(2, 9, 3)), ValueError, "B must be (B, L, G, N), but its shape is (2, 9, 3)."),
        (wrong(B=torch.randn(2, 9, 3, 3)), ValueError, "B has 3 groups; allowed: a divisor of x's 4 heads."),
        (wrong(B=torch.randn(2, 9, 1, 257)), ValueError, "B has a number of states of 257; allowed: 1 to 256."),
        (wrong(x=torch.randn(2, 9, 4, 0)), ValueError, "x has a head size of 0; allowed: 1 to 256."),
        (wrong(A=-torch.rand(4, 5)), ValueError, "A must be (H,) = (4,), but its shape is (4, 5)."),
        (wrong(dt=torch.rand(2, 4, 9)), ValueError, "dt must be (B, L, H) = (2, 9, 4), but its shape is (2, 4, 9)."),
        (wrong(D=torch.rand(5)), ValueError, "D must be (H,) = (4,), but its shape is (5,)."),
        (wrong(D=torch.rand(5, 4)), ValueError, "D must be (H, P) = (4, 5), but its shape is (5, 4)."),
        (wrong(initial_states=torch.zeros(2, 4, 3, 5)), ValueError, "initial_states must be (B, H, P, N) = (2, 4, 5, 3), but its shape is (2, 4, 3, 5)."),
        (wrong(dt=torch.full((2, 9, 4), math.nan), dt_softplus=False), ValueError, "dt (with dt_bias) has an element that is no number; allowed: numbers."),
        (wrong(dt_limit=(-1.0, 1.0)), ValueError, "dt_limit is (-1.0, 1.0); allowed: from at least 0 to no less."),
        (wrong(dt_limit=(2.0, 1.0)), ValueError, "dt_limit is (2.0, 1.0); allowed: from at least 0 to no less."),
        (wrong(dt_limit=3.0), ValueError, "dt_limit is 3.0; allowed: two numbers, the first at least 0."),
        (wrong(chunk_size=0), ValueError, "chunk_size is 0; allowed: whole numbers from 1."),
        (wrong(x=torch.zeros(2, 9, 4, 5, dtype=torch.int64)), TypeError, "x has dtype int64"),
        (wrong(z=torch.zeros(2, 9, 4, 5, device="meta")), ValueError, "z is on meta, but x is on cpu"),
        (wrong(seq_idx=torch.zeros(2, 9)), TypeError, "seq_idx has dtype float32; allowed: int32."),
        (wrong(seq_idx=torch.zeros(9, 2, dtype=torch.int32)), ValueError, "seq_idx must be (B, L) = (2, 9), but its shape is (9, 2)."),
        (wrong(seq_idx=torch.zeros(2, 9, dtype=torch.int32), cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)), ValueError, "cu_seqlens and seq_idx are both given; allowed: one of them."),
        (wrong(cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)), ValueError, "with cu_seqlens all documents are one sequence, but the batch has 2."),
        (inputs(1, 5, documents=[2, 3]) | {"cu_seqlens": torch.tensor([0, 4, 2, 5], dtype=torch.int32)}, ValueError, "cu_seqlens is [0, 4, 2, 5]; allowed: offsets that start at 0, never fall and end at the length, 5."),
    ],
)  # fmt: skip
def test_bad_arguments(values, error, words):
    with pytest.raises(error) as caught:
        ops.ssd(**values)
    assert words in str(caught.value) and "\n" not in str(caught.value)
