"""Every Triton kernel compiles for the architectures we name, without spills, on the tensor cores, within shared memory, and
no worse than the committed record says.

The compiler runs in processes of its own, because this one may be interpreting kernels.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton")

from bench.compile import record  # noqa: E402

SHARED_MEMORY = {90: 232448, 86: 101376, 80: 166912}


def _compile_all(capabilities: tuple[int, ...], *options: str) -> dict[int, dict]:
    with ThreadPoolExecutor() as pool:
        reports = pool.map(lambda capability: record.compile_triton(capability, *options), capabilities)
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
        if not entry["case"].startswith(("attention", "selective_scan", "ssd")):
            assert entry["stack"] <= (80 if " 16384 " in entry["case"] else 8), entry


def test_the_scan_of_sixteen_states_does_not_spill(reports):
    """Which is Mamba's number; packed documents cost the backward more pointers than there are registers."""
    for _, entry in _entries(reports, 90, 80):
        if entry["case"].startswith("selective_scan") and entry["case"].split()[2:] in (
            ["16", "short"],
            ["16", "segments"],
        ):
            assert entry["stack"] == 0, entry


def test_mamba2_does_not_spill_and_multiplies_on_the_tensor_cores(reports):
    multiplying = {f"ssd_{name}_kernel" for name in ("states", "outputs", "bwd_pairs", "bwd_dbc", "bwd_dx")}
    for capability, entry in _entries(reports, 90, 80):
        if entry["case"].startswith(("ssd bf16 64/128", "ssd bf16 64/64")):
            assert entry["stack"] == 0, entry
            wanted, other = ("wgmma", "mma_sync") if capability == 90 else ("mma_sync", "wgmma")
            assert (entry[wanted] > 0) == (entry["kernel"] in multiplying) and entry[other] == 0, entry


def test_experts_do_not_spill_and_multiply_on_the_tensor_cores(reports):
    multiplying = {"gate_up_kernel", "rows_times_weights_kernel", "rows_times_rows_kernel"}
    for capability, entry in _entries(reports, 90, 80):
        if entry["case"].startswith(("moe_mlp bf16", "grouped_gemm bf16")):
            assert entry["stack"] == 0, entry
            wanted, other = ("wgmma", "mma_sync") if capability == 90 else ("mma_sync", "wgmma")
            assert (entry[wanted] > 0) == (entry["kernel"] in multiplying) and entry[other] == 0, entry
            if entry["kernel"] in multiplying:
                by_descriptor = capability == 90 and entry["kernel"] != "rows_times_rows_kernel"
                assert (entry["bulk_copies"] > 0) == by_descriptor, entry
                assert entry["bulk_copies"] > 0 or entry["async_copies"] > 0, entry


def test_attention_multiplies_on_the_tensor_cores(reports):
    for capability, entry in _entries(reports, 90, 80):
        case = _attention(entry)
        if case and case[0] in ("bf16", "fp16"):
            wanted, other = ("wgmma", "mma_sync") if capability == 90 else ("mma_sync", "wgmma")
            assert entry[wanted] > 0 and entry[other] == 0, entry


def test_exact_products_stay_off_the_tensor_cores(reports):
    for _, entry in _entries(reports, 90, 80):
        if entry["case"].startswith(("attention fp32", "ssd fp32", "moe_mlp fp32")):
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
                assert entry["occupancy"] >= 2 * entry["num_warps"], entry


needs_record = pytest.mark.skipif(
    not record.triton_record().exists(),
    reason=f"there is no {record.triton_record().name}; python -m bench compile writes it",
)


@needs_record
def test_no_worse_than_the_record(reports):
    recorded = record.read(record.triton_record())
    for capability in record.CAPABILITIES:
        assert record.worse(recorded, record.entries_of(capability, reports[capability])) == []


PLANT = """
import sys
from bench.compile import cases
{mistake}
cases.main(90, False, "{case}")
"""


@needs_record
@pytest.mark.parametrize(
    ("case", "mistake", "found"),
    [
        ("rms_norm fp32 4096", "cases.rms_norm.TILES['sm_90'] = (4096, 32768, 16384, (64, 32))", "spills"),
        (
            "attention bf16 128/128 causal contiguous",
            "cases.DTYPES['bf16'] = cases.torch.float32",
            "has lost its wgmma",
        ),
    ],
)
def test_a_planted_spill_and_a_lost_instruction_are_found(case, mistake, found):
    done = subprocess.run(
        [sys.executable, "-c", PLANT.format(mistake=mistake, case=case)], cwd=record.ROOT, capture_output=True, text=True,
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sentences = record.worse(record.read(record.triton_record()), record.entries_of(90, json.loads(done.stdout)))
    assert any(found in sentence for sentence in sentences), sentences
