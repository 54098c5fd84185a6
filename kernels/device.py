"""Where a launch runs: what the tables of configurations are looked up by, and the device that must be current.

Tensors on the CPU mean Triton's interpreter; it is an architecture of its own, because its cost follows the number of
operations and not their size.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

INTERPRETER = "interpreter"


@cache
def capability(device: torch.device) -> int:
    """Compute capability as one number (90 for 9.0), 0 for the interpreter."""
    if device.type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(device: torch.device) -> str:
    """The row of the tables that fits the device: the interpreter, or the largest part that is no larger than this one.

    sm_86 stands for every part with about 100 kB of shared memory per block (8.6, 8.9, 12.x).
    """
    number = capability(device)
    if number == 0:
        return INTERPRETER
    if number < 80 or number in (86, 89) or number >= 120:
        return "sm_86"
    return "sm_80" if number < 90 else "sm_90"


@cache
def multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors' own."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
