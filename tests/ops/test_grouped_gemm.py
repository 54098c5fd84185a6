import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "grouped_gemm"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(backend, x, w, sizes, dtype=torch.int64):
    inputs = {"x": x, "w": w, "group_sizes": torch.tensor(sizes, dtype=dtype, device=x.device)}
    with llmcore.backend(backend):
        assert_accurate(ops.grouped_gemm, ops.grouped_gemm.reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [[7], [0, 5, 0], [1, 1, 1], [33, 0, 64, 1, 30], [0, 0, 100], [128, 64]],
    ids=lambda s: "-".join(map(str, s)),
)
def test_sizes(backend, device, dtype, sizes):
    x = randn(sum(sizes), 48, dtype=dtype, device=device)
    check(backend, x, randn(len(sizes), 40, 48, dtype=dtype, device=device, seed=1), sizes, torch.int32)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 130), (129, 5), (64, 64), (17, 1), (1, 40)])
def test_widths(backend, device, inputs, outputs):
    x = randn(37, inputs, device=device)
    check(backend, x, randn(4, outputs, inputs, device=device, seed=1), [3, 0, 33, 1])


def test_no_row_and_many_groups(backend, device):
    check(backend, randn(0, 8, device=device), randn(3, 5, 8, device=device, seed=1), [0, 0, 0])
    check(
        backend,
        randn(40, 8, device=device),
        randn(256, 6, 8, device=device, seed=1),
        [0, 1] * 30 + [0] * 186 + [1] * 10,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(backend, device, dtype):
    x, w = (
        randn(20, 64, dtype=dtype, device=device, grad=False),
        randn(3, 24, 32, dtype=dtype, device=device, grad=False),
    )
    for x_view in (x[:, ::2], x[:, 8:40], x[:, 1:33], x.T.contiguous().T[:, :32], x[:1, :32].expand(20, 32)):
        for w_view in (
            w,
            w.transpose(1, 2).contiguous().transpose(1, 2),
            w[:1].expand(3, 24, 32),
            w[:, :, :1].expand(w.shape),
        ):
            leaves = (t.detach().requires_grad_() for t in (x_view, w_view))
            check(backend, *leaves, [9, 0, 11])


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    widths=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_groups(backend, sizes, widths, dtype):
    x = randn(sum(sizes), widths[0], dtype=dtype, device=DEVICE)
    check(backend, x, randn(len(sizes), widths[1], widths[0], dtype=dtype, device=DEVICE, seed=1), sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "taken"), [([3, 0, 9], [3, 0, 9]), ([0, 0, 0], [0, 0, 0]), ([-4, 4, 90], [0, 4, 36])]
)
def test_rows_of_no_group_are_nan_where_sizes_are_not_looked_at(backend, monkeypatch, dtype, sizes, taken):
    monkeypatch.setattr(sys.modules["llmcore.ops.grouped_gemm"], "values_are_checked", lambda _: False)
    x, w = randn(40, 16, dtype=dtype, device=DEVICE), randn(3, 24, 16, dtype=dtype, device=DEVICE, seed=1)
    end, dy = sum(taken), randn(40, 24, dtype=dtype, device=DEVICE, grad=False, seed=2)
    with llmcore.backend(backend):
        y = ops.grouped_gemm(x, w, torch.tensor(sizes, device=DEVICE))
        dx, dw = torch.autograd.grad(y, (x, w), dy)
        right = ops.grouped_gemm(x[:end], w, torch.tensor(taken, device=DEVICE))
        dx_right, dw_right = torch.autograd.grad(right, (x, w), dy[:end])
    assert bool(y[end:].isnan().all()) and bool(dx[end:].isnan().all())
    torch.testing.assert_close((y[:end], dx[:end], dw), (right, dx_right[:end], dw_right))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"group_sizes": torch.tensor([4, 5])},
            ValueError,
            "group_sizes is [4, 5] with the sum 9; allowed: sizes from 0",
        ),
        ({"group_sizes": torch.tensor([-1, 11])}, ValueError, "group_sizes is [-1, 11] with the sum 10"),
        ({"group_sizes": torch.tensor([5, 4, 1])}, ValueError, "group_sizes must be (E,) = (2,)"),
        ({"group_sizes": torch.tensor([5.0, 5.0])}, TypeError, "group_sizes has dtype float32; allowed: int32, int64"),
        ({"group_sizes": [5, 5]}, TypeError, "group_sizes must be a tensor, but a list was given"),
        ({"w": torch.randn(2, 3, 5)}, ValueError, "w must be (E, F, C) = (2, 3, 4), but its shape is (2, 3, 5)"),
        ({"w": torch.randn(3, 4)}, ValueError, "w must be (E, F, C), but its shape is (3, 4)"),
        ({"w": torch.randn(2, 3, 4).half()}, TypeError, "w has dtype float16, but x has float32"),
        ({"x": torch.randn(4)}, ValueError, "x must be (T, C), but its shape is (4,)"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"x": torch.randn(10, 4), "w": torch.randn(2, 3, 4), "group_sizes": torch.tensor([5, 5]), **change}
    with pytest.raises(error) as caught:
        ops.grouped_gemm(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_more_rows_than_int32_reaches():
    with torch.device("meta"):
        arguments = torch.empty(2**31, 4), torch.empty(2, 3, 4), torch.empty(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^grouped_gemm: x has 2147483648 rows; allowed: fewer than 2\*\*31\.$"):
        ops.grouped_gemm(*arguments)
