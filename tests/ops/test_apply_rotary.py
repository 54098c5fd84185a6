import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import DTYPES, randn

import llmcore
from llmcore import ops
from llmcore.testing import assert_accurate

OP = "apply_rotary"


def tables(T_max, R, device="cpu"):
    angle = torch.arange(T_max, dtype=torch.float64)[:, None] * 10000 ** (-torch.arange(0, R, 2) / max(R, 1))
    return {"cos": angle.cos().float().to(device), "sin": angle.sin().float().to(device)}


def check(backend, **inputs):
    with llmcore.backend(backend):
        assert_accurate(ops.apply_rotary, ops.apply_rotary.reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D", "R"),
    [(2, 5, 4, 2, 64, 64), (1, 1, 1, 1, 16, 16), (2, 3, 3, 1, 40, 40), (1, 7, 2, 2, 96, 32), (1, 4, 2, 1, 24, 6), (0, 4, 2, 1, 16, 16),
     (1, 0, 2, 1, 16, 16), (1, 3, 2, 2, 256, 128), (1, 2, 2, 1, 16, 0)],
)  # fmt: skip
def test_shapes(backend, device, dtype, interleaved, B, T, H, K, D, R):
    q, k = randn(B, T, H, D, dtype=dtype, device=device), randn(B, T, K, D, dtype=dtype, device=device, seed=1)
    check(backend, q=q, k=k, **tables(9, R, device), interleaved=interleaved)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_positions(backend, device, per_row, dtype):
    q, k = randn(3, 4, 2, 32, device=device), randn(3, 4, 2, 32, device=device, seed=1)
    positions = torch.tensor(
        [[0, 8, 3, 3], [5, 4, 3, 2], [1, 1, 1, 7]] if per_row else [6, 0, 2, 8], dtype=dtype, device=device
    )
    check(backend, q=q, k=k, **tables(9, 32, device), positions=positions)
    if per_row:
        check(backend, q=q, k=k, **tables(9, 32, device), positions=positions.t().contiguous().t())
        check(backend, q=q, k=k, **tables(9, 32, device), positions=positions[:1].expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_broadcast(backend, device, dtype):
    qkv = randn(2, 6, 5, 64, dtype=dtype, device=device, grad=False)
    for q, k in (
        (qkv[:, :, :3], qkv[:, :, 3:]),
        (qkv.transpose(1, 2), qkv.transpose(1, 2)),
        (qkv[..., ::2], qkv[..., 1::2]),
        (qkv[:1].expand(2, 6, 5, 64), qkv),
        (qkv[:, :, :1].expand(2, 6, 5, 64), qkv[:, :, ::2]),
    ):
        check(backend, q=q.requires_grad_(), k=k.detach().requires_grad_(), **tables(9, q.shape[-1] // 4 * 2, device))


def test_one_output_unused(backend, device):
    q, k = randn(2, 3, 4, 32, device=device), randn(2, 3, 2, 32, device=device, seed=1)
    with llmcore.backend(backend):
        only_q = torch.autograd.grad(
            ops.apply_rotary(q, k, **tables(3, 32, device))[0].square().sum(), (q, k), allow_unused=True
        )
        only_k = torch.autograd.grad(
            ops.apply_rotary(q, k, **tables(3, 32, device))[1].square().sum(), (q, k), allow_unused=True
        )
    torch.testing.assert_close(only_q[0], 2 * q.detach())
    torch.testing.assert_close(only_k[1], 2 * k.detach())


@given(B=st.integers(1, 3), T=st.integers(1, 9), H=st.integers(1, 5), K=st.integers(1, 3), half=st.integers(1, 20),
       rest=st.integers(0, 12), dtype=st.sampled_from(DTYPES), interleaved=st.booleans())  # fmt: skip
def test_any_shape(backend, B, T, H, K, half, rest, dtype, interleaved):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    D = 2 * half + rest
    q, k = randn(B, T, H, D, dtype=dtype, device=device), randn(B, T, K, D, dtype=dtype, device=device, seed=1)
    check(backend, q=q, k=k, **tables(9, 2 * half, device), interleaved=interleaved)


Q, K = torch.randn(2, 4, 2, 16), torch.randn(2, 4, 1, 16)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(q=torch.randn(4, 2, 16)), ValueError, "q must be (B, T, H, D), but its shape is (4, 2, 16)"),
        (dict(k=torch.randn(2, 3, 1, 16)), ValueError, "k must be (B, T, K, D) = (2, 4, 1, 16)"),
        (dict(k=K.half()), TypeError, "k has dtype float16, but q has float32"),
        (dict(cos=torch.randn(9, 9), sin=torch.randn(9, 9)), ValueError, "at most 8 columns"),
        (dict(cos=torch.randn(3, 8), sin=torch.randn(3, 8)), ValueError, "q has 4 positions, but cos has only 3 rows"),
        (dict(sin=torch.randn(9, 7)), ValueError, "sin must be cos's shape = (9, 8)"),
        (dict(positions=torch.tensor([0, 1, 2, 9])), ValueError, "positions lie in [0, 9], but cos has rows 0 to 8"),
        (dict(positions=torch.tensor([0, -1, 2, 3])), ValueError, "positions lie in [-1, 3]"),
        (dict(positions=torch.tensor([0.0, 1, 2, 3])), TypeError, "positions has dtype float32; allowed: int64, int32"),
        (dict(positions=torch.tensor([0, 1])), ValueError, "positions must be (B, T) = (2, 4) or (T,) = (4,)"),
    ],
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error) as caught:
        ops.apply_rotary(**{"q": Q, "k": K, **tables(9, 16), **changes})
    assert words in str(caught.value) and "\n" not in str(caught.value)
