"""Compile Triton kernels for a GPU that is not there, by calling their launch functions.

A driver that only compiles takes the place of the real one, and every launch stops after compilation. So a compile case is an
ordinary call of a launch function on CPU tensors, and what is compiled is exactly what that call would run on the GPU:
same configuration, same specialisation on strides and alignment.

Run as a program it compiles the cases of one architecture and prints one JSON list, since one process cannot both interpret
and compile: python ahead_of_time.py 90 [--all]
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Compiled:
    case: str
    kernel: str
    registers: int
    stack: int
    shared: int
    num_warps: int
    wgmma: int
    mma_sync: int
    tma_loads: int
    async_copies: int


class CompileOnlyDriver:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread; the stack is where spilled registers go."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no register count but {listing!r}.")
    return int(found[1]), int(found[2])


def _describe(case: str, kernel) -> Compiled:
    ptx = kernel.asm["ptx"]
    registers, stack = _resources(kernel.asm["cubin"])
    return Compiled(
        case=case,
        kernel=kernel.metadata.name,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=ptx.count("mma.sync"),
        tma_loads=ptx.count("cp.async.bulk.tensor"),
        async_copies=ptx.count("cp.async.cg") + ptx.count("cp.async.ca"),
    )


@contextmanager
def compiling(capability: int, device_module) -> Iterator[Callable[[str, Callable[[], object]], list[Compiled]]]:
    """Yields compile_case(name, launch) -> what the launch compiled; device_module is llmcore.kernels.device."""
    launched: list = []
    run = JITFunction.run
    saved = device_module.capability, device_module.multiprocessors

    def compile_only(self, *args, grid, warmup, **kwargs):
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    def compile_case(name: str, launch: Callable[[], object]) -> list[Compiled]:
        launched.clear()
        launch()
        return [_describe(name, kernel) for kernel in launched]

    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
    JITFunction.run = compile_only
    device_module.capability = lambda device: capability
    device_module.multiprocessors = lambda device: 132
    try:
        yield compile_case
    finally:
        JITFunction.run = run
        device_module.capability, device_module.multiprocessors = saved
