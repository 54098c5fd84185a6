"""Every Triton kernel compiles for the architectures we name, without spills, on the tensor cores, within shared memory.

The compiler runs in processes of its own, because this one may be interpreting kernels.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = {90: 232448, 86: 101376, 80: 166912}
REGISTERS, SHARED_MEMORY_OF_SM_90, RESERVED_PER_PROGRAM = 65536, 233472, 1024


def _compile(capability: int, *options: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_cases.py")), str(capability), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _compile_all(capabilities: tuple[int, ...], *options: str) -> dict[int, dict]:
    with ThreadPoolExecutor() as pool:
        reports = pool.map(lambda capability: _compile(capability, *options), capabilities)
        return dict(zip(capabilities, reports, strict=True))


@pytest.fixture(scope="module")
def representative() -> dict[int, dict]:
    return _compile_all((90, 80))


@pytest.fixture(scope="module")
def everything() -> dict[int, dict]:
    return _compile_all((90, 80, 86), "--all")


@pytest.fixture(params=["representative", pytest.param("everything", marks=pytest.mark.slow)])
def reports(request) -> dict[int, dict]:
    return request.getfixturevalue(request.param)


def _entries(reports, *capabilities):
    return [(cap, entry) for cap in capabilities if cap in reports for entry in reports[cap]["compiled"]]


def _attention(entry) -> tuple[str, int, str, str] | None:
    """(dtype, larger head size, mask, layout) of an entry that multiplies matrices."""
    name, dtype, sizes, *rest = entry["case"].split()
    if name != "attention" or entry["kernel"] == "attention_bwd_delta_kernel":
        return None
    return dtype, max(map(int, sizes.split("/"))), *rest


def test_every_kernel_has_a_case(reports):
    for report in reports.values():
        assert report["never_compiled"] == []


def test_shared_memory_fits(reports):
    for capability, entry in _entries(reports, 90, 86, 80):
        assert entry["shared"] <= SHARED_MEMORY[capability], entry


def test_half_precision_attention_does_not_spill(reports):
    for _, entry in _entries(reports, 90, 80):
        case = _attention(entry)
        if case and case[0] in ("bf16", "fp16") and case[1] <= 128:
            # A sliding window's two limits cost the forward on sm_90 two registers more than there are.
            assert entry["stack"] <= (8 if case[2] == "sliding" else 0), entry


def test_row_kernels_do_not_spill(reports):
    """But for a register or two where the assembler prefers a higher occupancy, and the widest row held with its sums."""
    for _, entry in _entries(reports, 90, 80):
        if not entry["case"].startswith("attention"):
            assert entry["stack"] <= (80 if " 16384 " in entry["case"] else 8), entry


def test_attention_multiplies_on_the_tensor_cores(reports):
    for capability, entry in _entries(reports, 90, 80):
        case = _attention(entry)
        if case and case[0] in ("bf16", "fp16"):
            wanted, other = ("wgmma", "mma_sync") if capability == 90 else ("mma_sync", "wgmma")
            assert entry[wanted] > 0 and entry[other] == 0, entry


def test_exact_products_stay_off_the_tensor_cores(reports):
    for _, entry in _entries(reports, 90, 80):
        if entry["case"].startswith("attention fp32"):
            assert entry["wgmma"] == entry["mma_sync"] == 0, entry


def test_tiles_arrive_asynchronously(reports):
    for capability, entry in _entries(reports, 90, 80):
        case = _attention(entry)
        if case and case[0] in ("bf16", "fp16"):
            by_descriptor = capability == 90 and case[3] == "contiguous"
            assert (entry["bulk_copies"] > 0) == by_descriptor, entry
            if 16 <= case[1] <= 128:
                assert by_descriptor or entry["async_copies"] > 0, entry
        if entry["kernel"] == "rms_norm_bwd_kernel" and " 4096 " in entry["case"]:
            assert entry["async_copies"] > 0, entry


def test_two_forward_programs_share_a_multiprocessor(reports):
    """On sm_90 one program's exponentials are to run beside the other's products."""
    for _, entry in _entries(reports, 90):
        case = _attention(entry)
        if case and entry["kernel"] == "attention_fwd_kernel" and case[0] in ("bf16", "fp16") and case[1] <= 128:
            if case[3] == "contiguous":
                registers = (entry["registers"] + 7) // 8 * 8
                assert 2 * 32 * entry["num_warps"] * registers <= REGISTERS, entry
                assert 2 * (entry["shared"] + RESERVED_PER_PROGRAM) <= SHARED_MEMORY_OF_SM_90, entry
