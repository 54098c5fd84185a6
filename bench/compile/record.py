"""The compile record: a committed table for each version of a compiler, and what counts as worse than it.

One entry for each kernel of each launch in cases.py (Triton) or each kernel and architecture (CUDA, by ptxas), under
bench/results/compile/. `python -m bench compile` writes it.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "bench" / "results" / "compile"
CAPABILITIES = (90, 80)
# Kinds of instruction that a change must not lose.
KINDS = ("wgmma", "mma_sync", "bulk_copies", "async_copies")
Entries = dict[str, dict[str, Any]]


def compile_triton(capability: int, *options: str) -> dict[str, Any]:
    """The report of cases.py, from a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile.cases", str(capability), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def entries_of(capability: int, report: dict[str, Any]) -> Entries:
    """By architecture, case and kernel; a kernel that one launch compiles to several things, such as with and without
    an output, has a number from the second on."""
    entries: Entries = {}
    for entry in report["compiled"]:
        facts = {name: value for name, value in entry.items() if name not in ("case", "kernel")}
        name = f"sm_{capability} {entry['case']} {entry['kernel']}"
        keys = (name if number == 1 else f"{name} {number}" for number in itertools.count(1))
        key = next(key for key in keys if entries.get(key, facts) == facts)
        entries[key] = facts
    return entries


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_cuda(source: Path) -> Entries:
    """What ptxas says of each kernel of a .cu file."""
    entries: Entries = {}
    for capability in CAPABILITIES:
        command = [
            str(nvcc()),
            "-std=c++17",
            "-O3",
            f"-arch=sm_{capability}",
            "-cubin",
            "-Xptxas",
            "-v",
            "-I",
            str(ROOT / "csrc"),
        ]
        done = subprocess.run([*command, "-o", os.devnull, str(source)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found = re.findall(
            r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
            r"loads.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
            done.stderr,
            re.DOTALL,
        )
        for name, stack, stores, loads, registers, shared in found:
            entries[f"sm_{capability} {source.stem} {_demangled(name)}"] = {
                "registers": int(registers),
                "stack": max(int(stack), int(stores), int(loads)),
                "shared": int(shared or 0),
            }
    return entries


def _demangled(name: str) -> str:
    """The kernel's own name and its template arguments."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    found = re.search(r"::(\w+(?:<[^>]*>)?)\(", plain)
    return found[1] if found else name


def triton_record() -> Path:
    import triton

    return RECORDS / f"triton-{triton.__version__}.json"


def nvcc_record() -> Path:
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return RECORDS / f"nvcc-{found[1] if found else 'unknown'}.json"


def read(path: Path) -> Entries:
    return json.loads(path.read_text())


def write(path: Path, entries: Entries) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def worse(recorded: Entries, now: Entries) -> list[str]:
    """One sentence for each spill that grew, each kind of instruction that went and each kernel the record lacks."""
    sentences = []
    for key, entry in now.items():
        before = recorded.get(key)
        if before is None:
            sentences.append(f"{key} is not in the record: python -m bench compile writes it.")
            continue
        if entry["stack"] > before["stack"]:
            sentences.append(f"{key} spills {entry['stack']} bytes; recorded are {before['stack']}.")
        for kind in KINDS:
            if before.get(kind, 0) and not entry[kind]:
                sentences.append(f"{key} has lost its {kind}; recorded are {before[kind]}.")
        if entry.get("occupancy", 0) < before.get("occupancy", 0):
            sentences.append(f"{key} runs {entry['occupancy']} warps at once; recorded are {before['occupancy']}.")
    return sentences


def write_all(sources: Iterable[Path]) -> list[Path]:
    """Compiles everything and writes the records of the compilers that are here."""
    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(lambda capability: compile_triton(capability, "--all"), CAPABILITIES))
    entries: Entries = {}
    for capability, report in zip(CAPABILITIES, reports, strict=True):
        entries.update(entries_of(capability, report))
    write(triton_record(), entries)
    if nvcc() is None:
        return [triton_record()]
    write(nvcc_record(), {key: entry for source in sources for key, entry in compile_cuda(source).items()})
    return [triton_record(), nvcc_record()]
