"""What ptxas makes of csrc/cuda: no spills, and no worse than the committed record."""

import pytest
from cuda_on_cpu import build_shim

from bench.compile import record

pytestmark = pytest.mark.skipif(record.nvcc() is None, reason="nvcc is not installed")


@pytest.mark.parametrize("source", build_shim.KERNELS, ids=lambda source: source.stem)
def test_no_spills_and_no_worse_than_the_record(source):
    entries = record.compile_cuda(source)
    assert entries and all(entry["stack"] == 0 for entry in entries.values()), entries
    if record.nvcc_record().exists():
        assert record.worse(record.read(record.nvcc_record()), entries) == []


def test_a_planted_spill_is_found(tmp_path):
    text = next(s for s in build_shim.KERNELS if s.stem == "rms_norm").read_text()
    planted = tmp_path / "rms_norm.cu"
    planted.write_text(text.replace("__launch_bounds__(kMaxThreads)", "__launch_bounds__(kMaxThreads, 4)"))
    entries = record.compile_cuda(planted)
    assert any(entry["stack"] > 0 for entry in entries.values()), entries
    if record.nvcc_record().exists():
        assert any("spills" in sentence for sentence in record.worse(record.read(record.nvcc_record()), entries))
