"""What ptxas makes of csrc/cuda: no spills, and no worse than the committed record; and of the instructions in ptx.cuh."""

import importlib.util
import re
import shutil
from pathlib import Path

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


def disassembler() -> str | None:
    """cuobjdump; Triton brings one along."""
    triton = importlib.util.find_spec("triton")
    places = [Path(str(record.nvcc())).parent, Path("/usr/local/cuda/bin")]
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump") or next((p for place in places if (p := shutil.which(place / "cuobjdump"))), None)


@pytest.mark.skipif(disassembler() is None, reason="cuobjdump is neither installed nor in Triton's wheel")
@pytest.mark.parametrize("capability", record.CAPABILITIES)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pipelined_gemm", "HMMA.16816.F32.BF16 LDSM.16.M88.4 LDSM.16.MT88.4 LDGSTS.E.BYPASS.128 LDGDEPBAR"),
        (
            "ptx_examples",
            "HMMA.16816.F32 HMMA.16816.F32.BF16 HMMA.1688.F32.TF32 LDSM.16.M88 LDSM.16.M88.2 LDSM.16.M88.4 LDSM.16.MT88 "
            "LDSM.16.MT88.2 LDSM.16.MT88.4 LDGSTS.E.ZFILL LDGSTS.E.64.ZFILL LDGSTS.E.128.ZFILL LDGSTS.E.BYPASS.128.ZFILL "
            "LDGDEPBAR DEPBAR.LE MUFU.EX2",
        ),
        ("wmma_examples", "HMMA.16816.F16 HMMA.16816.F32 HMMA.16816.F32.BF16"),
    ],
    ids=["pipelined_gemm", "ptx_examples", "wmma_examples"],
)
def test_the_machine_code_has_the_instructions(tmp_path, name, expected, capability):
    examples, cubin = build_shim.SHIM.parent, tmp_path / "examples.cubin"
    includes = ["-I", str(build_shim.ROOT / "csrc"), "-I", str(examples)]
    command = [str(record.nvcc()), "-std=c++17", "-O3", f"-arch=sm_{capability}", "-cubin", *includes]
    done = build_shim.run([*command, "-o", str(cubin), str(examples / f"{name}.cu")])
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    code = build_shim.run([str(disassembler()), "-sass", str(cubin)]).stdout
    found = set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE))
    assert set(expected.split()) <= found, sorted(set(expected.split()) - found)
