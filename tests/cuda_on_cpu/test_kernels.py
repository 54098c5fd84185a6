"""Every csrc/cuda/<op>.cu without a GPU: against the reference, and against what goes wrong in CUDA."""

import shutil

import pytest
from cuda_on_cpu import build_shim
from sessions import INTERPRETED, SHIMMED

pytestmark = [
    pytest.mark.skipif(build_shim.missing() is not None, reason=str(build_shim.missing())),
    pytest.mark.skipif(INTERPRETED or SHIMMED, reason="starts sessions of its own"),
]
needs_sanitizer = pytest.mark.skipif(
    build_shim.missing_sanitizer() is not None, reason=str(build_shim.missing_sanitizer())
)
KERNELS = {kernel.stem: kernel for kernel in build_shim.KERNELS}
RMS_NORM = KERNELS["rms_norm"].read_text()
BARRIER = "__syncthreads();"
SLOW = pytest.mark.slow  # a compilation each; one of every kind runs always


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return build_shim.Builder(tmp_path_factory.mktemp("cuda"), [])


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return build_shim.Builder(tmp_path_factory.mktemp("cuda_sanitized"), build_shim.SANITIZED)


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_agrees_with_the_reference_in_every_order_of_threads(builder, op, seed):
    done = build_shim.prove(builder.module, op, LLMCORE_SHIM_SEED=seed)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@needs_sanitizer
@pytest.mark.parametrize("op", KERNELS)
def test_stays_inside_its_memory_and_alignment(sanitized, op):
    done = build_shim.prove(sanitized.module, op, **build_shim.sanitizer_environment())
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.parametrize("op", KERNELS)
def test_depends_on_nothing_uninitialised(tmp_path, op):
    assert valgrind(tmp_path, op, KERNELS[op].read_text()).returncode == 0


def valgrind(directory, op, text):
    source = directory / f"{op}.cu"
    source.write_text(text)
    main = build_shim.SHIM.parent / f"{op}_main.cpp"
    objects = [*build_shim.stand_in(), *build_shim.compile_all([source, main], directory, [])]
    return build_shim.valgrind(build_shim.link(objects, directory / "main", []))


def planted(old: str, new: str, occurrence: int = 0) -> str:
    """rms_norm.cu with a mistake in it."""
    parts = RMS_NORM.split(old)
    assert len(parts) > occurrence + 1, f"{old!r} is not {occurrence + 1} times in rms_norm.cu"
    return old.join(parts[: occurrence + 1]) + new + old.join(parts[occurrence + 1 :])


@pytest.mark.parametrize("which", [0, *(pytest.param(i, marks=SLOW) for i in range(1, RMS_NORM.count(BARRIER)))])
def test_a_planted_missing_barrier_is_found(builder, which):
    module = builder.with_source(f"without_barrier_{which}", KERNELS["rms_norm"], planted(BARRIER, "", which))
    done = build_shim.prove(module, "rms_norm")
    assert done.returncode == 1 and "WRONG" in done.stdout, done.stdout[-2000:]


@needs_sanitizer
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        pytest.param("a row too many", "row < rows;", "row <= rows;", marks=SLOW),
        pytest.param("a column too many", "col < cols; col += step", "col <= cols; col += step", marks=SLOW),
        ("shared memory too small", "parts, [kMaxThreads / kWarp]", "parts, [kMaxThreads / kWarp / 2]"),
        (
            "workspace too small",
            "programs * cols * sizeof(float), stream",
            "(programs - 1) * cols * sizeof(float), stream",
        ),
    ],
)
def test_a_planted_access_out_of_bounds_is_found(sanitized, name, old, new):
    module = sanitized.with_source(name.replace(" ", "_"), KERNELS["rms_norm"], planted(old, new))
    done = build_shim.prove(module, "rms_norm", **build_shim.sanitizer_environment())
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_a_planted_uninitialised_read_is_found(tmp_path):
    done = valgrind(tmp_path, "rms_norm", planted("float sum = 0.0f, a[V], b[V];", "float sum, a[V], b[V];"))
    assert done.returncode == 9 and "uninitialised" in done.stderr, done.stderr[-2000:]
