"""The instructions of csrc/cuda/ptx.cuh on the CPU: what each computes, a kernel made of them, and the mistakes in it."""

import shutil

import pytest
import torch
from cuda_on_cpu import build_shim
from cuda_on_cpu.build_shim import call

pytestmark = pytest.mark.skipif(build_shim.missing() is not None, reason=str(build_shim.missing()))
needs_sanitizer = pytest.mark.skipif(
    build_shim.missing_sanitizer() is not None, reason=str(build_shim.missing_sanitizer())
)
GEMM = build_shim.SHIM.parent / "pipelined_gemm.cu"
CG = 0  # ptx_examples.cu's name for cp.async.cg

# Where the matrices of mma are, told as Triton's compiler tells it (to_linear_layout of NVMMADistributedLayout and
# DotOperandLayout): the (row, column) of an element is the sum of those of the bits of its index in the lane, and of those of
# the bits of the lane.
ROWS_OF_LANES = [(1, 0), (2, 0), (4, 0)]
COLS_OF_LANES = [(0, 1), (0, 2), (0, 4)]
C = [(0, 1), (8, 0)], [(0, 2), (0, 4), *ROWS_OF_LANES]
A_16_BIT = [(0, 1), (8, 0), (0, 8)], [(0, 2), (0, 4), *ROWS_OF_LANES]
B_16_BIT = [(1, 0), (8, 0)], [(2, 0), (4, 0), *COLS_OF_LANES]
A_TF32 = [(8, 0), (0, 4)], [(0, 1), (0, 2), *ROWS_OF_LANES]
B_TF32 = [(4, 0)], [(1, 0), (2, 0), *COLS_OF_LANES]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_shim.library(build_shim.SHIM.parent / "ptx_examples.cu", tmp_path_factory.mktemp("ptx"))


def fragments(matrix, layout):
    """(32, elements of a lane)"""
    registers, lanes = layout

    def position(index, bases):
        return torch.tensor([base for bit, base in enumerate(bases) if index >> bit & 1] or [(0, 0)]).sum(0)

    where = torch.stack(
        [position(lane, lanes) + position(i, registers) for lane in range(32) for i in range(1 << len(registers))]
    )
    return matrix[where[:, 0], where[:, 1]].reshape(32, -1).contiguous()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(library, count, trans):
    x = torch.randint(-(2**15), 2**15, (32, 8)).short()
    order = torch.randperm(32).int()
    r = torch.zeros(32, count, dtype=torch.int32)
    assert call(library, "run_load_matrices", x, order, r, count, trans, 0) is None
    for i in range(count):
        matrix = x[order[8 * i : 8 * i + 8].long()]
        expected = (matrix.T if trans else matrix).reshape(32, 2).contiguous()
        assert torch.equal(r[:, i].contiguous().view(torch.int16).reshape(32, 2), expected)


def test_ldmatrix_checks_its_addresses(library):
    x, order, r = torch.zeros(32, 8).short(), torch.arange(32).int(), torch.zeros(32, 4, dtype=torch.int32)
    text = call(library, "run_load_matrices", x, order, r, 4, False, 4)
    assert text == "block (0, 0, 0): ldmatrix: the row address of lane 0 is not a multiple of 16."
    order[9] = 33
    text = call(library, "run_load_matrices", x, order, r, 4, True, 0)
    assert text == "block (0, 0, 0): ldmatrix: the row address of lane 9 is outside shared memory."
    assert call(library, "run_load_matrices", x, order, r, 1, True, 0) is None, "x1 does not use the address of lane 9"


def operands(which):
    """a, b, c, and the fragments of a and b as the kernel takes them."""
    torch.manual_seed(which)
    depth = 8 if which == 2 else 16
    a, b, c = torch.randn(16, depth), torch.randn(depth, 8), torch.randn(16, 8)
    if which == 2:
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
        return a, b, c, fragments(a, A_TF32), fragments(b, B_TF32)
    a, b = (x.to((torch.bfloat16, torch.float16)[which]) for x in (a, b))
    return a, b, c, fragments(a, A_16_BIT), fragments(b, B_16_BIT)


@pytest.mark.parametrize("which", range(3), ids=["bf16", "f16", "tf32"])
def test_mma(library, which):
    a, b, c, a_fragments, b_fragments = operands(which)
    sums = fragments(c, C)
    assert call(library, "run_multiply_add", a_fragments, b_fragments, sums, which, 32) is None
    exact = a.double() @ b.double() + c.double()
    magnitude = a.double().abs() @ b.double().abs() + c.double().abs()
    assert ((sums - fragments(exact, C)).abs() <= 17 * 2.0**-23 * fragments(magnitude, C)).all()


def test_mma_checks_its_warp_and_its_operands(library):
    _, _, c, a, b = operands(2)
    text = call(library, "run_multiply_add", a, b, fragments(c, C), 2, 31)
    assert text == "block (0, 0, 0): mma.m16n8k8 by the lanes 0x7fffffff alone; a warp executes it as one."
    a[3, 1] = torch.pi
    assert "it needs float_to_tf32" in call(library, "run_multiply_add", a, b, fragments(c, C), 2, 32)
    assert "meet at two kinds of mma.m16n8k16" in call(library, "run_two_kinds", torch.zeros(32))


@pytest.mark.parametrize("size", [4, 8, 16, CG])
def test_cp_async(library, size):
    x = torch.randint(1, 256, (64 * 16 + 16,)).to(torch.uint8)
    count = size or 16
    for source_bytes in (0, 1, count // 2, count):
        to = torch.full((64, count), 7, dtype=torch.uint8)
        assert call(library, "run_copy", x, to, size, source_bytes, 0) is None
        expected = x[: 64 * count].reshape(64, count) * (torch.arange(count) < source_bytes)
        assert torch.equal(to, expected)


def test_cp_async_checks_its_addresses(library):
    x, to = torch.zeros(2048, dtype=torch.uint8), torch.zeros(1024, dtype=torch.uint8)
    assert "with a misaligned address" in call(library, "run_copy", x, to, 8, 8, 4)
    assert "of 4 bytes by lane" in call(library, "run_copy", x, to, 4, 5, 0)


def test_conversions(library):
    specials = [0.0, -0.0, 1.0, -1.5, 1 + 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1e-30, 65504.0, float("inf"), -150.0]
    x = torch.cat([torch.tensor(specials), torch.randn(50) * 8])
    powers, (tf32, bf16, f16) = torch.zeros_like(x), (torch.zeros(len(x), dtype=torch.int32) for _ in range(3))
    assert call(library, "run_convert", x, powers, tf32, bf16, f16, len(x)) is None
    exact = torch.exp2(x.double())
    assert torch.allclose(powers.double(), torch.where(exact < 2.0**-126, 0.0, exact), rtol=2.0**-21, atol=0)
    assert (tf32 & 0x1FFF == 0).all() and tf32.view(torch.float32)[4] == 1 + 2.0**-10
    assert torch.allclose(tf32.view(torch.float32), x, rtol=2.0**-11, atol=0)
    assert torch.equal(bf16.view(torch.bfloat16).reshape(-1, 2), torch.stack([x, -x], 1).bfloat16())
    assert torch.equal(f16.view(torch.float16).reshape(-1, 2), torch.stack([x, -x], 1).half())


def planted(directory, *replacements):
    """pipelined_gemm.cu with a mistake in it."""
    text = GEMM.read_text()
    for old, new in replacements:
        assert old in text, f"{old!r} is not in pipelined_gemm.cu"
        text = text.replace(old, new)
    source = directory / GEMM.name
    source.write_text(text)
    return source


def gemm_error(library, rows, cols, depth):
    """What was reported, and the error as a multiple of what float sums of bf16 products may have."""
    torch.manual_seed(rows)
    a, b, c = torch.randn(rows, depth).bfloat16(), torch.randn(depth, cols).bfloat16(), torch.empty(rows, cols)
    error = call(library, "run_pipelined_gemm", a, b, c.fill_(float("nan")), rows, cols, depth)
    bound = depth * 2.0**-23 * (a.double().abs() @ b.double().abs())
    return error, ((c - a.double() @ b.double()).abs() / bound).max().item()


def test_pipelined_gemm(tmp_path):
    library = build_shim.library(GEMM, tmp_path)
    for sizes in ((1, 8, 8), (32, 32, 16), (33, 40, 24), (70, 72, 136), (64, 64, 256)):
        error, difference = gemm_error(library, *sizes)
        assert error is None and difference <= 1, sizes


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("ptx::cp_async_wait_group<kStages - 2>();", "", id="no wait"),
        pytest.param("wait_group<kStages - 2>", "wait_group<kStages - 1>", id="waits for too little"),
        pytest.param("ptx::cp_async_commit_group();", "", id="no groups"),
        pytest.param("__syncthreads();", "", id="no barrier"),
        pytest.param("step + kStages - 1;", "step + kStages;", id="overwrites what is read"),
    ],
)
def test_a_planted_race_gives_wrong_results(tmp_path, old, new):
    error, difference = gemm_error(build_shim.library(planted(tmp_path, (old, new)), tmp_path), 64, 64, 256)
    assert error is None and not difference <= 1


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("[lane / 16 * 8]", "[lane / 16 * 4]", "ldmatrix: the row address of lane 16 is not a multiple of 16"),
        ("kPad = 8", "kPad = 4", "with a misaligned address"),
        ("stages, [kStages]", "stages, [kStages - 1]", "to outside shared memory"),
        ("ptx::mma_", "if (lane != 31) ptx::mma_", "4 wait at __syncthreads, 124 wait at mma.m16n8k16"),
    ],
    ids=["ldmatrix of half a row", "rows too near", "a stage too few", "a lane too few"],
)
def test_a_planted_misuse_is_reported(tmp_path, old, new, text):
    error, _ = gemm_error(build_shim.library(planted(tmp_path, (old, new)), tmp_path), 64, 64, 256)
    assert text in error


def program(directory, options, *replacements):
    """One product of odd sizes, in arrays that are no larger than it needs."""
    main = directory / "main.cpp"
    main.write_text("""
        #include <memory>
        extern "C" const char* run_pipelined_gemm(const unsigned short*, const unsigned short*, float*, int, int, int);
        int main() {
            std::unique_ptr<unsigned short[]> a(new unsigned short[33 * 24]()), b(new unsigned short[24 * 40]());
            std::unique_ptr<float[]> c(new float[33 * 40]);
            const char* error = run_pipelined_gemm(a.get(), b.get(), c.get(), 33, 40, 24);
            for (int i = 0; i < 33 * 40; i++) if (!(c[i] == 0.0f)) return 2;
            return error != nullptr;
        }""")
    objects = build_shim.compile_all([planted(directory, *replacements), main], directory, options)
    return build_shim.link([*objects, *build_shim.stand_in(*options)], directory / "main", options)


@needs_sanitizer
@pytest.mark.parametrize(
    ("replacements", "found"),
    [
        pytest.param([], None, id="right"),
        pytest.param([("from_row < rows && ", "")], "heap-buffer-overflow", id="copies a row too many"),
        pytest.param([("ptx::cp_async_wait_group<kStages - 2>();", "")], "use-after-poison", id="no wait"),
    ],
)
def test_the_sanitizer_sees_copies(tmp_path, replacements, found):
    done = build_shim.run([str(program(tmp_path, build_shim.SANITIZED, *replacements))])
    assert (done.returncode == 0) == (found is None), done.stderr
    assert found is None or f"AddressSanitizer: {found}" in done.stderr, done.stderr


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.parametrize(
    ("replacements", "code"),
    [([], 0), ([("ptx::cp_async_wait_group<kStages - 2>();", "")], 9)],
    ids=["right", "no wait"],
)
def test_valgrind_sees_copies(tmp_path, replacements, code):
    done = build_shim.valgrind(program(tmp_path, [], *replacements))
    assert done.returncode == code, done.stderr[-2000:]
