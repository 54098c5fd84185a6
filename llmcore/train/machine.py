"""What the machine is asked for before training: backends, the allocator's thresholds, the precision it is fast in."""

import ctypes
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


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: `precision` is fp32, bf16, or auto, which asks the processor."""
    if precision != "auto":
        if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ConfigError(f"precision is bf16, which {torch.cuda.get_device_name(device)} lacks; allowed is fp32.")
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = _extension.cpu()
    return native is not None and bool(native.bf16_matmul())


def require_backends(device: torch.device) -> None:
    """Raise a ConfigError if an op cannot run on `device`, as when LLMCORE_BACKEND asks for a backend it has not."""
    with FakeTensorMode():  # makes no context on a GPU that is another process's
        tensor = torch.empty(0, device=device)
    try:
        for name in _dispatch.registry:
            _dispatch.resolve(name, tensor)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(str(error)) from error
