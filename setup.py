"""Builds llmcore's two optional native parts, without PyTorch: `llmcore._cpu` (C++17) and `llmcore._cuda` (nvcc).

Every csrc/cpu/<op>.cpp is compiled once per instruction-set level, in a namespace of that level's name; bindings.cpp is
compiled once and chooses a level when the module is loaded. Nothing here may stop an install: a part that cannot be
built is left out, and llmcore/_build_info.json says why (`llmcore doctor` shows it).

LLMCORE_BUILD=none | cpu | cuda | cpu,cuda picks the parts; one that is asked for and cannot be built is an error.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PARTS = ("cpu", "cuda")
CXX_FLAGS = shlex.split("-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra")
KERNEL_FLAGS = shlex.split("-O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast")
BINDING_FLAGS = ["-O1"]  # they only pass arguments on, and pybind11 is slow to optimise

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16_FLAGS = [*AVX512_FLAGS, "-mavx512bf16"]
# level: (flags, a function that only compiles where compiler and assembler know the level). Worst level first.
X86_LEVELS = {
    "baseline": ([], ""),
    "avx2": (AVX2_FLAGS, "__m256 f(__m256 x) { return _mm256_fmadd_ps(x, x, _mm256_cvtph_ps(_mm_setzero_si128())); }"),
    "avx512": (AVX512_FLAGS, "__m512 f(__m512 x) { return _mm512_mul_ps(x, x); }"),
    "avx512_bf16": (AVX512_BF16_FLAGS, "__m256bh f(__m512 x) { return _mm512_cvtneps_pbh(x); }"),
    "amx": ([*AVX512_BF16_FLAGS, "-mamx-tile", "-mamx-bf16"], "void f() { _tile_dpbf16ps(0, 1, 2); }"),
}


class Unavailable(Exception):
    """A part cannot be built; the message is the reason, one sentence without a full stop."""


class Step(NamedTuple):
    """One command of the build: it makes `output` from `inputs`."""

    output: Path
    inputs: list[Path]
    command: list[str]


def requested_parts() -> tuple[tuple[str, ...], bool]:
    """The parts to build, and whether they were asked for by name."""
    value = os.environ.get("LLMCORE_BUILD", "").strip()
    if not value:
        return PARTS, False
    names = [name.strip() for name in value.split(",")]
    if names == ["none"]:
        return (), True
    if not set(names) <= set(PARTS):
        raise SystemExit(f"LLMCORE_BUILD is {value!r}; allowed are none, cpu, cuda and cpu,cuda.")
    return tuple(part for part in PARTS if part in names), True


def find_cxx() -> str:
    """The C++ compiler command: $CXX, or the first of the usual names on PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for candidate in candidates:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    raise Unavailable(f"no C++ compiler was found (looked for {', '.join(candidates)})")


def find_nvcc() -> str:
    """The path of nvcc: below $CUDA_HOME or $CUDA_PATH, on PATH, or in the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in [*(os.path.join(home, "bin", "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]:
        path = shutil.which(candidate)
        if path:
            return path
    raise Unavailable("nvcc was not found (looked below CUDA_HOME and CUDA_PATH, on PATH and in /usr/local/cuda)")


def try_compile(cxx: str, flags: list[str], source: str) -> bytes | None:
    """The object file that `source` compiles to, or None."""
    with tempfile.TemporaryDirectory() as directory:
        path, output = Path(directory, "probe.cpp"), Path(directory, "probe.o")
        path.write_text(source)
        command = [*shlex.split(cxx), *flags, "-c", str(path), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, check=False)
        return output.read_bytes() if done.returncode == 0 and output.exists() else None


def check_cxx(cxx: str) -> None:
    if sys.platform == "win32":
        raise Unavailable("the native parts are built on Linux and macOS only")
    if try_compile(cxx, CXX_FLAGS + KERNEL_FLAGS, "#include <string_view>\nint main() { return 0; }\n") is None:
        raise Unavailable(f"the compiler {cxx!r} does not compile C++17 with GCC's options")


def module_includes() -> list[str]:
    """Include options of a pybind11 module."""
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        raise Unavailable(f"Python.h is not in {python} (install this Python's development files)")
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 is not installed where the build runs") from None
    return ["-I", str(ROOT / "csrc"), "-isystem", python, "-isystem", pybind11.get_include()]


def openmp_flags(cxx: str) -> list[str]:
    """OpenMP is compiled in but not linked: the GOMP symbols resolve to the one runtime that PyTorch has loaded. A
    compiler that calls another runtime (Clang's __kmpc_*) would need a second thread pool, so its build is serial."""
    source = "void g(int); void f() {\n#pragma omp parallel for\n  for (int i = 0; i < 9; i++) g(i);\n}\n"
    compiled = try_compile(cxx, ["-fopenmp"], source)
    return ["-fopenmp"] if compiled is not None and b"GOMP_parallel" in compiled else ["-Wno-unknown-pragmas"]


def cpu_levels(cxx: str) -> dict[str, list[str]]:
    """The levels this compiler can build and their flags, worst first."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return {"neon": []}
    if machine not in ("x86_64", "amd64"):
        return {"baseline": []}
    return {
        level: flags
        for level, (flags, probe) in X86_LEVELS.items()
        if not probe or try_compile(cxx, flags, f"#include <immintrin.h>\n{probe}\n") is not None
    }


def link_flags() -> list[str]:
    return ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]


def plan_cpu(directory: Path, target: Path) -> tuple[list[Step], dict[str, Any]]:
    """The steps that make llmcore._cpu, and what to remember of them."""
    cxx = find_cxx()
    check_cxx(cxx)
    includes, levels, openmp = module_includes(), cpu_levels(cxx), openmp_flags(cxx)
    source_dir = ROOT / "csrc" / "cpu"
    base = [*shlex.split(cxx), *CXX_FLAGS, *openmp, *includes]
    steps = []

    def compile_(source: Path, output: Path, flags: list[str]) -> None:
        command = [*base, *flags, "-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        steps.append(Step(output, [source], command))

    for source in sorted(source_dir.glob("*.cpp")):
        if source.name != "bindings.cpp":
            for level, flags in levels.items():
                options = [*KERNEL_FLAGS, *flags, f"-DLLMCORE_ISA={level}"]
                compile_(source, directory / f"{source.stem}.{level}.o", options)
    names = " ".join(f"X({level})" for level in levels)
    compile_(source_dir / "bindings.cpp", directory / "bindings.o", [*BINDING_FLAGS, "-DLLMCORE_LEVELS=" + names])
    objects = [step.output for step in steps]
    steps.append(Step(target, objects, [*shlex.split(cxx), *link_flags(), *map(str, objects), "-o", str(target)]))
    return steps, {"compiler": cxx, "levels": list(levels), "openmp": openmp == ["-fopenmp"]}


def plan_cuda(directory: Path, target: Path) -> tuple[list[Step], dict[str, Any]]:
    """The steps that make llmcore._cuda. The .cu files see neither PyTorch nor pybind11; the CUDA runtime is linked
    statically, so that the module loads on a machine without a driver and next to any PyTorch."""
    nvcc, cxx = find_nvcc(), find_cxx()
    check_cxx(cxx)
    includes = module_includes()
    source_dir = ROOT / "csrc" / "cuda"
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    targets = [code for code in ("sm_80", "sm_90") if code in listed]
    if not targets:
        raise Unavailable(f"{nvcc} knows neither sm_80 nor sm_90 (CUDA 11.8 or newer is needed)")
    newest = targets[-1].removeprefix("sm_")
    gencode = [f"-gencode=arch=compute_{code[3:]},code={code}" for code in targets]
    gencode.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    host = ["-ccbin", shlex.split(cxx)[0]] if os.environ.get("CXX") else []
    steps = []
    for source in sorted(source_dir.glob("*.cu")):
        output = directory / f"{source.stem}.cu.o"
        options = shlex.split("-std=c++17 -O3 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden")
        command = [nvcc, *host, *options, *gencode, "-I", str(ROOT / "csrc")]
        command += ["-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
        steps.append(Step(output, [source], command))
    output = directory / "bindings.o"
    command = [*shlex.split(cxx), *CXX_FLAGS, *BINDING_FLAGS, *includes, "-MMD", "-MF", f"{output}.d"]
    bindings = source_dir / "bindings.cpp"
    steps.append(Step(output, [bindings], [*command, "-c", str(bindings), "-o", str(output)]))
    objects = [step.output for step in steps]
    link = [nvcc, *host, "-shared", "-cudart", "static"]
    steps.append(Step(target, objects, [*link, *map(str, objects), "-o", str(target)]))
    return steps, {"compiler": nvcc, "targets": [*targets, f"compute_{newest}"]}


def run_steps(directory: Path, steps: list[Step]) -> None:
    """Run the steps with ninja: in parallel, and only what changed since the last build in this directory."""
    try:
        import ninja
    except ImportError:
        raise Unavailable("ninja is not installed where the build runs") from None

    def path(value: Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    text = "rule compile\n  command = $cmd\n  depfile = $out.d\n  deps = gcc\nrule link\n  command = $cmd\n"
    for step in steps:
        rule = "compile" if "-c" in step.command else "link"
        command = shlex.join(step.command).replace("$", "$$")
        text += f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}\n  cmd = {command}\n"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text(text)
    done = subprocess.run(
        [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(directory)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        errors = [line.strip() for line in done.stdout.splitlines() if "error" in line or "fatal" in line]
        raise Unavailable(f"compilation failed ({errors[0] if errors else 'run the install with -v for the output'})")


def install_file(source: Path, target: Path) -> None:
    """Copy in one step: a process that has the old module mapped keeps it whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, f"{target}.new")
    os.replace(f"{target}.new", target)


class BuildNative(Command):
    """The sub-command of `build` that makes the native parts (setuptools' SubCommand protocol)."""

    description = "build llmcore's native parts"
    user_options = [("inplace", "i", "put the modules into the source tree")]
    boolean_options = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False
        self.build_lib: Any = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def in_source(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def package_dir(self) -> Path:
        return ROOT / "llmcore" if self.in_source() else Path(self.build_lib).resolve() / "llmcore"

    def module_name(self, part: str) -> str:
        return f"_{part}{sysconfig.get_config_var('EXT_SUFFIX')}"

    def run(self) -> None:
        parts, by_name = requested_parts()
        info: dict[str, dict[str, Any]] = {}
        for part, plan in (("cpu", plan_cpu), ("cuda", plan_cuda)):
            target = self.package_dir() / self.module_name(part)
            directory = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / part
            try:
                if part not in parts:
                    raise Unavailable(f"LLMCORE_BUILD={os.environ['LLMCORE_BUILD']} left it out")
                steps, facts = plan(directory, directory / target.name)
                run_steps(directory, steps)
                install_file(directory / target.name, target)
                info[part] = {"built": True, **facts}
                print(f"llmcore: built llmcore._{part}: {facts}", file=sys.stderr)
            except Unavailable as reason:
                if by_name and part in parts:
                    text = f"llmcore: LLMCORE_BUILD asks for {part}, which cannot be built: {reason}."
                    raise SystemExit(text) from None
                target.unlink(missing_ok=True)
                info[part] = {"built": False, "reason": str(reason)}
                print(f"llmcore: installing without llmcore._{part}: {reason}.", file=sys.stderr)
        self.package_dir().mkdir(parents=True, exist_ok=True)
        (self.package_dir() / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    def get_source_files(self) -> list[str]:
        found = (path for path in ROOT.joinpath("csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
        return sorted(str(path.relative_to(ROOT)) for path in found)

    def get_outputs(self) -> list[str]:
        names = ["_build_info.json", *map(self.module_name, PARTS)]
        return [str(Path(self.build_lib, "llmcore", name)) for name in names if (self.package_dir() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.in_source():
            return {}
        return {output: str(self.package_dir() / Path(output).name) for output in self.get_outputs()}


class PlatformDistribution(Distribution):
    """Marks the wheel as built for a platform when a native part is going to be in it."""

    def has_ext_modules(self) -> bool:
        try:
            return bool(requested_parts()[0]) and sys.platform != "win32" and bool(find_cxx())
        except Unavailable:
            return False


build.sub_commands.append(("build_native", None))
setup(cmdclass={"build_native": BuildNative}, distclass=PlatformDistribution)
