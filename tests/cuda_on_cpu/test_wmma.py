"""The stand-in for mma.h: products of every shape and type against float64, and the misuse that a card forgives or not."""

import ctypes

import pytest
import torch
from cuda_on_cpu import build_shim
from cuda_on_cpu.build_shim import call

pytestmark = pytest.mark.skipif(build_shim.missing() is not None, reason=str(build_shim.missing()))
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# as in wmma_examples.cu: tile, inputs (float32 is multiplied as tf32), whether a and b are transposed in memory, sums
GEMMS = [
    ((16, 16, 16), BF16, False, False, F32),
    ((32, 8, 16), BF16, True, True, F32),
    ((8, 32, 16), BF16, False, False, F32),
    ((16, 16, 16), F16, True, False, F32),
    ((32, 8, 16), F16, False, True, F32),
    ((8, 32, 16), F16, False, True, F32),
    ((16, 16, 16), F16, False, True, F16),
    ((16, 16, 8), F32, True, True, F32),
]
DEFECTS = [
    "no defect", "misaligned address", "leading dimension", "lanes disagree", "lane missing", "not filled",
    "lane instead of element", "knows the mapping",
]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = build_shim.SHIM.parent / "wmma_examples.cu"
    return build_shim.library(source, tmp_path_factory.mktemp("wmma"))


@pytest.mark.parametrize("which", range(len(GEMMS)))
@pytest.mark.parametrize("tiles", [(1, 1, 1), (2, 3, 5)])
def test_products(library, which, tiles):
    tile, inputs, a_transposed, b_transposed, sums = GEMMS[which]
    rows, cols, depth = (n * size for n, size in zip(tiles, tile, strict=True))
    torch.manual_seed(which)
    a, b = torch.randn(rows, depth).to(inputs), torch.randn(depth, cols).to(inputs)
    c, beta = torch.randn(rows, cols).to(sums), 0.5
    exact = a.double() @ b.double() + beta * c.double()
    magnitude = a.double().abs() @ b.double().abs() + beta * c.double().abs()
    in_memory = [(x.T if t else x).contiguous() for x, t in ((a, a_transposed), (b, b_transposed))]
    arguments = (which, *in_memory, c, rows, cols, depth, ctypes.c_float(beta))
    assert call(library, "run_wmma_gemm", *arguments) is None
    # every addition of floats may lose a last bit (a card cuts off where it does not round), half sums are rounded after
    # every tile and at the end, tf32 rounds both inputs to 11 bits
    relative = (depth + 2) * 2.0**-23
    relative += (tiles[2] + 1) * 2.0**-11 if sums == F16 else 0.0
    relative += 2.001 * 2.0**-11 if inputs == F32 else 0.0
    assert ((c.double() - exact).abs() <= relative * magnitude).all()


def square(library, defect):
    torch.manual_seed(0)
    a, c = torch.randn(16, 16).half(), torch.full((16, 16), float("nan"))
    error = call(library, "run_square", a, c, DEFECTS.index(defect))
    return error, (c - a.float() @ a.float()).abs().max().item()


def test_fragments_from_shared_memory(library):
    error, difference = square(library, "no defect")
    assert error is None and difference < 1e-4


def test_no_order_of_elements_can_be_relied_on(library):
    floats, halves, everything = torch.zeros(256), torch.zeros(256), torch.arange(256.0)
    assert call(library, "run_list_elements", floats, halves) is None
    assert torch.equal(floats.sort().values, everything) and torch.equal(halves.sort().values, everything)
    for a, b in ((floats, everything), (halves, everything), (floats, halves)):
        assert (a == b).sum() < 20


@pytest.mark.parametrize(
    ("defect", "text"),
    [
        ("misaligned address", "load_matrix_sync with an address that is not a multiple of 32"),
        ("leading dimension", "load_matrix_sync with rows that are not a multiple of 16 bytes apart"),
        ("lanes disagree", "load_matrix_sync with arguments that differ between lanes"),
        ("lane missing", "lanes of one mask meet at"),
        ("lane instead of element", "mma_sync with a fragment whose lanes hold different values of one element"),
    ],
)
def test_misuse_is_reported(library, defect, text):
    assert text in square(library, defect)[0]


@pytest.mark.parametrize("defect", ["not filled", "knows the mapping"])
def test_what_is_unspecified_gives_wrong_results(library, defect):
    error, difference = square(library, defect)
    assert error is None and not difference < 1.0


def test_unconverted_tf32_is_reported(library):
    a, b, c = torch.randn(16, 8), torch.randn(8, 16), torch.zeros(16, 16)
    assert "it needs __float_to_tf32" in call(library, "run_unconverted", a, b, c)
    assert call(library, "run_unconverted", a.round(), b.round(), c) is None
    assert torch.equal(c, a.round() @ b.round())
