"""What the machine is asked for before training: backends, the allocator's thresholds, the precision it is fast in."""

import ctypes
import os
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmcore import _extension
from llmcore.ops import _dispatch
from llmcore.train.config import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory(size: int = 1 << 30) -> None:
    """Let glibc keep freed blocks up to `size` bytes: fresh pages for each tensor cost 10 to 20 % of a training step on
    a CPU. Does nothing where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, size)
        if not mallopt(M_MMAP_THRESHOLD, size):
            mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that older versions accept


def choose_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16: what is asked for, or, for auto, bf16 where the processor gains from it and fp32 elsewhere.
    Raises ConfigError."""
    if precision != "auto":
        if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"precision is bf16, which {name} lacks; allowed are fp32 and fp16.")
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = _extension.cpu()
    return "bf16" if native is not None and native.bf16_matmul() else "fp32"


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16."""
    return choose_precision(precision, device) == "bf16"


def be_deterministic(on: bool) -> None:
    """Whether only algorithms run that give the same bits every time. Must come before a GPU is first used."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)


def out_of_memory(error: Exception) -> str | None:
    """What could not be allocated, on a GPU or on the CPU; None if `error` is another one."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if not on_cpu and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        return None
    return (str(error) or "of Python").splitlines()[0].rpartition("DefaultCPUAllocator: ")[2].rstrip(".")


def require_backends(device: torch.device) -> None:
    """Raise a ConfigError if an op cannot run on `device`, as when LLMCORE_BACKEND asks for a backend it has not."""
    with FakeTensorMode():  # makes no context on a GPU that is another process's
        tensor = torch.empty(0, device=device)
    try:
        for name in _dispatch.registry:
            _dispatch.resolve(name, tensor)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(str(error)) from error
