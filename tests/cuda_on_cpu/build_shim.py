"""Compiles csrc/cuda for the CPU, against the stand-in for cuda_runtime.h in shim/, and runs tests on the result."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).with_name("shim")
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = shlex.split("-std=c++17 -g -O1 -fPIC -Wall -Wextra -Wno-unknown-pragmas -Wno-clobbered")
SANITIZED = shlex.split("-fsanitize=address,alignment -fno-sanitize-recover=alignment -fno-omit-frame-pointer")


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def missing() -> str | None:
    """What this machine lacks to compile the kernels and their Python module, or None."""
    if sys.platform != "linux":
        return "the fibers are set up for Linux"
    if shutil.which(compiler()[0]) is None:
        return f"the C++ compiler {compiler()[0]} is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "this Python's development files are not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def missing_sanitizer() -> str | None:
    if missing() is not None:
        return missing()
    return None if sanitizer_library().is_absolute() else f"{compiler()[0]} comes without libasan.so"


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **options)


def compile_(source: Path, output: Path, options: list[str]) -> Path:
    """An object file."""
    includes = ["-I", str(SHIM), "-I", str(ROOT / "csrc"), *options]
    done = run([*compiler(), *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(output)])
    assert done.returncode == 0, done.stderr
    return output


def compile_all(sources: list[Path], directory: Path, options: list[str]) -> list[Path]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda s: compile_(s, directory / f"{s.name}.o", options), sources))


def link(objects: list[Path], output: Path, options: list[str]) -> Path:
    done = run([*compiler(), *map(str, objects), *options, "-o", str(output)])
    assert done.returncode == 0, done.stderr
    return output


class Builder:
    """Python modules llmcore._cuda for the CPU; what does not change between them is compiled once."""

    def __init__(self, directory: Path, options: list[str]) -> None:
        import pybind11

        self.directory, self.options = directory, options
        includes = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
        common = [SHIM / "shim.cpp", ROOT / "csrc" / "cuda" / "bindings.cpp"]
        objects = compile_all([*common, *KERNELS], directory, [*options, *includes])
        self.common, self.kernels = objects[:2], dict(zip(KERNELS, objects[2:], strict=True))
        self.module = self._link(directory / "whole", {})

    def _link(self, directory: Path, instead: dict[Path, Path]) -> Path:
        directory.mkdir()
        output = directory / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        kernels = [instead.get(source, compiled) for source, compiled in self.kernels.items()]
        return link([*self.common, *kernels], output, ["-shared", *self.options])

    def with_source(self, name: str, kernel: Path, text: str) -> Path:
        """The module with another text for one kernel."""
        source = self.directory / f"{name}.cu"
        source.write_text(text)
        return self._link(self.directory / name, {kernel: compile_(source, source.with_suffix(".o"), self.options)})


def sanitizer_library() -> Path:
    """A compiler that has none prints the bare name."""
    return Path(run([*compiler(), "-print-file-name=libasan.so"]).stdout.strip())


def sanitizer_environment() -> dict[str, str]:
    """What a Python needs that loads a module with AddressSanitizer."""
    return {"LD_PRELOAD": str(sanitizer_library()), "ASAN_OPTIONS": "detect_leaks=0"}


def prove(module: Path, op: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """tests/ops/test_<op>.py in a session in which the backend "cuda" is this module."""
    command = [sys.executable, "-m", "pytest", f"tests/ops/test_{op}.py", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    return run(command, cwd=ROOT, env={**os.environ, "LLMCORE_CUDA_SHIM": str(module), **environment})
