"""What an install contains, that it works where nothing can be compiled, and that every instruction-set level computes
the same."""

import ast
import ctypes.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llmcore import _extension

ROOT = Path(__file__).resolve().parent.parent
NATIVE: Any = _extension.cpu()
needs_cpu = pytest.mark.skipif(NATIVE is None, reason=str(_extension.cpu_reason()))

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""

# RMSNorm (with residual, mixed dtypes), SwiGLU and rotary at the level of LLMCORE_CPU_ISA; saves what they gave
LEVEL = """
import sys
import torch
from llmcore import _cpu

torch.manual_seed(0)
rows, cols, results = 37, 205, {}
codes = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
for dtype, code in codes.items():
    x, dy, up = (torch.randn(rows, cols).to(dtype) for _ in range(3))
    residual, weight = torch.randn(rows, cols), torch.randn(cols).to(dtype)
    y, dx, swiglu, dgate, dup = (torch.full_like(x, float("nan")) for _ in range(5))
    s, ds = torch.full((rows, cols), float("nan")), torch.randn(rows, cols)
    dresidual = torch.full_like(s, float("nan"))
    rstd, dweight = torch.full((rows,), float("nan")), torch.full_like(weight, float("nan"))
    p = lambda t: t.data_ptr()
    _cpu.rms_norm_fwd(p(x), p(residual), p(weight), p(y), p(s), p(rstd), rows, cols, cols, cols, 1e-6, 1.0,
                      code, 0, code)
    _cpu.rms_norm_bwd(p(dy), p(ds), p(s), p(weight), p(rstd), p(dx), p(dresidual), p(dweight), rows, cols,
                      cols, cols, cols, 1.0, code, 0, 0, code)
    _cpu.swiglu_fwd(p(x), p(up), p(swiglu), rows, cols, cols, cols, code)
    _cpu.swiglu_bwd(p(dy), p(x), p(up), p(dgate), p(dup), rows, cols, cols, cols, cols, code)
    B, T, H, K, D, R = 2, 5, 3, 1, 38, 34
    q, k = torch.randn(B, T, H, D).to(dtype), torch.randn(B, T, K, D).to(dtype)
    q_out, k_out = torch.full_like(q, float("nan")), torch.full_like(k, float("nan"))
    angle = torch.rand(T, R // 2)
    cos, sin = angle.cos(), angle.sin()
    for interleaved in (False, True):
        _cpu.apply_rotary(p(q), p(k), p(q_out), p(k_out), p(cos), p(sin), 0, B, T, H, K, D, R, *q.stride()[:3],
                          *k.stride()[:3], 0, 0, interleaved, False, code)
        results[f"rotary {interleaved} {dtype}"] = torch.cat((q_out.flatten(), k_out.flatten()))
    outputs = dict(y=y, s=s, rstd=rstd, dx=dx, dresidual=dresidual, dweight=dweight)
    outputs.update(swiglu=swiglu, dgate=dgate, dup=dup)
    results.update({f"{name} {dtype}": value for name, value in outputs.items()})
torch.save({"isa": _cpu.isa(), **results}, sys.argv[1])
"""


def run(code: str, *arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("CXX", "LLMCORE_BUILD", "LLMCORE_CPU_ISA")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked sdist: building there leaves the checkout, and the modules this process uses, alone."""
    pytest.importorskip("pybind11")
    directory = tmp_path_factory.mktemp("sdist")
    done = run(BUILD, "build_sdist", directory)
    assert done.returncode == 0, done.stderr
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python's first 3.10 and 3.11 lack it
    with tarfile.open(directory / done.stdout.split()[-1]) as archive:
        archive.extractall(directory, **safely)
    return next(path for path in directory.iterdir() if path.is_dir())


def build_wheel(source: Path, directory: Path, **environment: str) -> tuple[list[str], dict, str]:
    """The files of a wheel built from `source`, its build information, and what the build printed."""
    done = run(BUILD, "build_wheel", directory, cwd=source, **environment)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(directory / done.stdout.split()[-1]) as wheel:
        return wheel.namelist(), json.loads(wheel.read("llmcore/_build_info.json")), done.stderr


def test_sdist_has_the_sources(source: Path) -> None:
    packed = {path.relative_to(source) for path in source.rglob("*")}
    assert {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.*")} <= packed


def test_wheel_without_a_compiler_is_pure_python_and_says_why(source: Path, tmp_path: Path) -> None:
    names, info, printed = build_wheel(source, tmp_path, PATH="", CXX="no-such-compiler", CUDA_HOME="")
    kernels = {f"llmcore/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    assert kernels and kernels <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    assert "py3-none-any" in next(path.name for path in tmp_path.glob("*.whl"))
    assert info["cpu"] == {"built": False, "reason": "no C++ compiler was found (looked for no-such-compiler)"}
    assert not info["cuda"]["built"]
    assert "llmcore: installing without llmcore._cpu: no C++ compiler was found" in printed


def test_a_part_asked_for_by_name_must_build(source: Path, tmp_path: Path) -> None:
    done = run(BUILD, "build_wheel", tmp_path, cwd=source, PATH="", CXX="no-such-compiler", LLMCORE_BUILD="cpu")
    assert done.returncode != 0
    assert "LLMCORE_BUILD asks for cpu, which cannot be built: no C++ compiler was found" in done.stderr
    done = run(BUILD, "build_wheel", tmp_path, cwd=source, LLMCORE_BUILD="gpu")
    assert done.returncode != 0
    assert "LLMCORE_BUILD is 'gpu'; allowed are none, cpu, cuda and cpu,cuda." in done.stderr


@pytest.mark.slow
@needs_cpu
def test_wheel_with_a_compiler_has_the_module(source: Path, tmp_path: Path) -> None:
    names, info, _ = build_wheel(source, tmp_path, LLMCORE_BUILD="cpu")
    assert info["cpu"]["built"] and info["cuda"] == {"built": False, "reason": "LLMCORE_BUILD=cpu left it out"}
    assert [name for name in names if name.startswith("llmcore/_cpu.") and name.endswith(".so")]

    # a shared inline function compiled for AVX-512 could be the one that every level calls
    for path in source.glob("build/native-*/cpu/*.avx*.o"):
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout.splitlines()
        assert not [line for line in symbols if " W " in line], path


def test_import_loads_neither_the_extension_nor_triton() -> None:
    late = ("llmcore._cpu", "llmcore._cuda", "triton")
    done = run(f"import sys, llmcore\nprint([name for name in {late} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_version_is_readable_without_torch() -> None:
    tree = ast.parse((ROOT / "llmcore" / "_version.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_absent_module_has_a_reason() -> None:
    for module, reason in ((_extension.cpu(), _extension.cpu_reason()), (_extension.cuda(), _extension.cuda_reason())):
        assert (module is None) == (reason is not None)


@needs_cpu
def test_module_finds_an_openmp_runtime_without_torch() -> None:
    if not (ctypes.util.find_library("gomp") and _extension.build_info()["cpu"]["openmp"]):
        pytest.skip("this system has no libgomp of its own, or the module is serial")
    lines = (
        "import importlib.util, sys, types",
        "sys.modules['torch'] = types.ModuleType('torch')",
        f"spec = importlib.util.spec_from_file_location('llmcore._extension', {str(_extension.__file__)!r})",
        "package = types.ModuleType('llmcore')",
        f"package.__path__ = [{str(Path(_extension.__file__).parent)!r}]",
        "sys.modules['llmcore'] = package",
        "extension = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(extension)",
        "print(extension.cpu().isa())",
    )
    done = run("\n".join(lines))
    assert done.stdout.strip() == NATIVE.isas()[-1], done.stderr


@needs_cpu
def test_unknown_level_is_refused_in_one_sentence() -> None:
    code = "from llmcore import _extension\nprint(_extension.cpu(), _extension.cpu_reason())"
    done = run(code, LLMCORE_CPU_ISA="mmx")
    sentence = f"LLMCORE_CPU_ISA is 'mmx'; this processor and this build allow {', '.join(NATIVE.isas())}."
    assert done.stdout.strip().endswith(sentence), done
    assert done.stdout.startswith("None llmcore._cpu cannot be loaded: ")


@needs_cpu
def test_bad_dtype_code_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="dtype code is 7; allowed are 0"):
        NATIVE.swiglu_fwd(0, 0, 0, 0, 0, 0, 0, 7)


@needs_cpu
def test_every_level_gives_the_same_rows(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    results = {}
    for level in NATIVE.isas():
        path = tmp_path / f"{level}.pt"
        done = run("import torch\n" + LEVEL, path, LLMCORE_CPU_ISA=level)
        assert done.returncode == 0, done.stderr
        results[level] = torch.load(path)
        assert results[level].pop("isa") == level
    first = next(iter(results.values()))
    for level, values in results.items():
        for name, value in values.items():
            assert not value.isnan().any(), f"{name} at {level}"
            # other orders of summation: a few units in the last place
            rtol = 8 * torch.finfo(value.dtype).eps if value.dtype != torch.float32 else 1e-5
            close = torch.allclose(value, first[name], rtol=rtol, atol=rtol)
            assert close, f"{name} at {level} differs by {(value.float() - first[name].float()).abs().max()}"
