"""Compile Triton kernels for a GPU that is not there, by calling their launch functions.

A driver that only compiles takes the place of the real one, and every launch stops after compilation. So a compile case
is an ordinary call of a launch function on CPU tensors, and what is compiled is exactly what that call would run on the
GPU: the same configuration, the same specialisation on strides and alignment. For a process of its own: it never
restores the driver.
"""

import ast
import re
import subprocess
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

MULTIPROCESSORS = 132
# Of a multiprocessor, by compute capability: warps, bytes of shared memory, and what each program reserves of that.
WARPS = {80: 64, 86: 48, 90: 64}
SHARED_MEMORY = {80: 167936, 86: 102400, 90: 233472}
REGISTERS, PROGRAMS, RESERVED_SHARED_MEMORY = 65536, 32, 1024


@dataclass(frozen=True)
class Compiled:
    """What one launch compiled. registers: of a thread; stack: bytes of a thread, where spilled registers go; shared:
    bytes of a program; occupancy: warps at once on a multiprocessor; then counts of instructions in the PTX."""

    case: str
    kernel: str
    registers: int
    stack: int
    shared: int
    num_warps: int
    occupancy: int
    wgmma: int
    mma_sync: int
    bulk_copies: int
    async_copies: int


class _CompileOnlyDriver:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread; the stack is where spilled registers go."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no register count, but {listing!r}.")
    return int(found[1]), int(found[2])


def occupancy(capability: int, registers: int, shared: int, num_warps: int) -> int:
    """Warps that run at once on a multiprocessor (CUDA programming guide, compute capabilities)."""
    by_registers = REGISTERS // ((registers + 7) // 8 * 8 * 32 * num_warps)
    by_shared = SHARED_MEMORY[capability] // (shared + RESERVED_SHARED_MEMORY)
    return num_warps * min(by_registers, by_shared, WARPS[capability] // num_warps, PROGRAMS)


def _describe(capability: int, case: str, kernel) -> Compiled:
    ptx = kernel.asm["ptx"]
    registers, stack = _resources(kernel.asm["cubin"])
    shared, num_warps = kernel.metadata.shared, kernel.metadata.num_warps
    return Compiled(
        case=case,
        kernel=kernel.metadata.name,
        registers=registers,
        stack=stack,
        shared=shared,
        num_warps=num_warps,
        occupancy=occupancy(capability, registers, shared, num_warps),
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=ptx.count("mma.sync"),
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
        async_copies=ptx.count("cp.async.cg") + ptx.count("cp.async.ca"),
    )


def compiler(
    capability: int, device: Any, only: Container[str] | None = None
) -> Callable[[str, Callable[[], object]], list[tuple[JITFunction, Compiled]]]:
    """A function of (name, launch): each kernel of the launch, and what it compiles to for a capability like 90.

    device: the module kernels/device.py, which is made to report that capability. only: the names of the kernels to
    compile, where not all are wanted.
    """
    launched: list[tuple[JITFunction, object]] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if only is None or self.__name__ in only:
            launched.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))

    triton.runtime.driver.set_active(_CompileOnlyDriver(capability))
    JITFunction.run = compile_only
    device.capability = lambda _: capability
    device.multiprocessors = lambda _: MULTIPROCESSORS

    def compile_launch(name: str, launch: Callable[[], object]) -> list[tuple[JITFunction, Compiled]]:
        launched.clear()
        launch()
        return [(function, _describe(capability, name, kernel)) for function, kernel in launched]

    return compile_launch


def compile_launches(
    capability: int, device: Any, cases: Iterable[tuple[str, Callable[[], object]]]
) -> tuple[list[Compiled], set[JITFunction]]:
    """What every (name, launch) compiles, and the kernels that were launched."""
    compile_launch = compiler(capability, device)
    results = [result for name, launch in cases for result in compile_launch(name, launch)]
    return [compiled for _, compiled in results], {function for function, _ in results}


def _uses(function: JITFunction) -> Iterator[JITFunction]:
    """The function and every device function it calls."""
    yield function
    for node in ast.walk(ast.parse(function.src)):
        used = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(used, JITFunction) and used is not function:
            yield from _uses(used)


def never_compiled(modules: Iterable[ModuleType], kernels: Iterable[JITFunction]) -> list[str]:
    """The @triton.jit functions of the modules that are none of the kernels and used by none."""
    defined = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    }
    compiled = {used for kernel in kernels for used in _uses(kernel)}
    return sorted(f"{function.__module__}.{function.__name__}" for function in defined - compiled)
