"""The stand-in for CUDA computes what a card computes, and finds the mistakes it is there to find."""

import subprocess

import pytest
import torch
from cuda_on_cpu import build_shim
from cuda_on_cpu.build_shim import call

pytestmark = pytest.mark.skipif(build_shim.missing() is not None, reason=str(build_shim.missing()))
EXAMPLES = build_shim.SHIM.parent / "examples.cu"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_shim.library(EXAMPLES, tmp_path_factory.mktemp("examples"))


def test_blocks_barriers_and_shared_memory(library):
    x, out = torch.randn(5, 128), torch.full((5,), float("nan"))
    assert call(library, "run_sum_blocks", x, out, 5, False) is None
    torch.testing.assert_close(out, x.sum(1))


def test_a_missing_barrier_shows(library):
    """The thread that adds up reads parts that are not there yet: they hold NaN."""
    x, out = torch.randn(20, 128), torch.zeros(20)
    assert call(library, "run_sum_blocks", x, out, 20, True) is None
    assert out.isnan().any()


def test_shuffles_and_votes(library):
    x = torch.arange(64, dtype=torch.int32) * 7 % 31
    out = torch.zeros(64, 6, dtype=torch.int32)
    assert call(library, "run_warp_instructions", x, out) is None
    for warp in (slice(0, 32), slice(32, 64)):
        v, got, lane = x[warp], out[warp], torch.arange(32)
        assert got[:, 0].tolist() == [v[5]] * 32
        assert got[:, 1].tolist() == v[lane ^ 3].tolist()
        assert got[:, 2].tolist() == v[torch.where(lane < 2, lane, lane - 2)].tolist()
        assert got[:, 3].tolist() == v[torch.where(lane % 8 + 2 >= 8, lane, lane + 2)].tolist()
        votes = sum(1 << i for i in range(32) if v[i] % 3 == 0)
        assert {int(b) & 0xFFFFFFFF for b in got[:, 4]} == {votes}
        for half in (slice(0, 16), slice(16, 32)):
            assert got[half, 5].tolist() == [2 + int((v[half] == 7).any())] * 16


def test_atomics_and_all_blocks(library):
    counter, highest = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert call(library, "run_count", counter, highest) is None
    assert (counter.item(), highest.item()) == (3 * 2 * 5 * 7, 2 * 5 + 4)


def test_dynamic_shared_memory_and_its_limit(library):
    x, out = torch.randn(96), torch.zeros(96)
    assert call(library, "run_reverse", x, out, 96, 0, 96 * 4) is None
    assert torch.equal(out, x.flip(0))
    assert call(library, "run_reverse", x, out, 96, 0, 48 * 1024 + 1) == "invalid argument"
    assert call(library, "run_reverse", x, out, 1025, 0, 0) == "invalid configuration argument"


def test_waiting_for_ever_is_reported(library):
    text = call(library, "run_waits_for_ever")
    assert text == ("block (0, 0, 0): deadlock: of 64 threads, 1 wait at __shfl_sync, 63 wait at __syncthreads.")


def test_misused_masks_are_reported(library):
    assert "which its mask leaves out" in call(library, "run_outside_its_mask")
    assert "lanes of one mask meet at" in call(library, "run_two_instructions")


def test_shared_memory_is_never_zero_by_chance(library):
    out = torch.zeros(32)
    assert call(library, "run_reads_shared_memory_too_early", out) is None
    assert out.isnan().all()


def test_shared_arrays_are_no_better_aligned_than_their_type(library):
    distances = torch.full((50,), -1, dtype=torch.int32)
    assert call(library, "run_measure_alignment", distances, 50) is None
    assert (distances % 16 == 0).all() and (distances % 32 == 16).any()


@pytest.mark.skipif(build_shim.missing_sanitizer() is not None, reason=str(build_shim.missing_sanitizer()))
@pytest.mark.parametrize(("by", "found"), [(0, False), (1, True)])
def test_reading_past_shared_memory_is_found(tmp_path, by, found):
    main = tmp_path / "main.cpp"
    main.write_text(
        'extern "C" const char* run_reverse(const float*, float*, int, int, int);\n'
        f"int main() {{ float x[64] = {{}}, y[64]; return run_reverse(x, y, 64, {by}, 256) != nullptr; }}\n"
    )
    objects = build_shim.compile_all([EXAMPLES, main], tmp_path, build_shim.SANITIZED)
    objects += build_shim.stand_in(*build_shim.SANITIZED)
    program = build_shim.link(objects, tmp_path / "main", build_shim.SANITIZED)
    done = subprocess.run([program], capture_output=True, text=True)
    assert ("heap-buffer-overflow" in done.stderr) == found, done.stderr
    assert (done.returncode != 0) == found
