"""Compiles csrc/cuda for the CPU, against the stand-ins for CUDA's headers in shim/, and runs tests on the result."""

import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

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
    includes = [f"-I{path}" for path in (SHIM, SHIM.parent, ROOT / "csrc")]
    done = run([*compiler(), *FLAGS, *includes, *options, "-x", "c++", "-c", str(source), "-o", str(output)])
    assert done.returncode == 0, done.stderr
    return output


def compile_all(sources: list[Path], directory: Path, options: list[str]) -> list[Path]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda s: compile_(s, directory / f"{s.name}.o", options), sources))


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="llmcore_shim_")


@functools.cache
def stand_in(*options: str) -> list[Path]:
    """The objects behind the headers in shim/."""
    directory = Path(tempfile.mkdtemp(dir=_temporary().name))
    return compile_all(sorted(SHIM.glob("*.cpp")), directory, list(options))


def link(objects: list[Path], output: Path, options: list[str]) -> Path:
    done = run([*compiler(), *map(str, objects), *options, "-o", str(output)])
    assert done.returncode == 0, done.stderr
    return output


def library(source: Path, directory: Path) -> ctypes.CDLL:
    """A .cu file of this folder, or such a file with a mistake in it, whose functions `call` calls."""
    compiled = compile_(source, directory / f"{source.stem}.o", [])
    return ctypes.CDLL(str(link([compiled, *stand_in()], directory / f"{source.stem}.so", ["-shared"])))


def call(library: ctypes.CDLL, name: str, *arguments) -> str | None:
    """None, or what the runtime or the stand-in reported."""
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    addresses = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
    text = function(*addresses)
    return None if text is None else text.decode()


def valgrind(program: Path) -> subprocess.CompletedProcess[str]:
    """Its return code is 9 where it finds something."""
    return run(["valgrind", "--quiet", "--error-exitcode=9", "--max-threads=4096", str(program)])


class Builder:
    """Python modules llmcore._cuda for the CPU; what does not change between them is compiled once."""

    def __init__(self, directory: Path, options: list[str]) -> None:
        import pybind11

        self.directory, self.options = directory, options
        includes = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
        bindings = ROOT / "csrc" / "cuda" / "bindings.cpp"
        objects = compile_all([bindings, *KERNELS], directory, [*options, *includes])
        self.common = [objects[0], *stand_in(*options)]
        self.kernels = dict(zip(KERNELS, objects[1:], strict=True))
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
