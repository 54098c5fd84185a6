"""Late and harmless loading of the native modules `llmcore._cpu` and `llmcore._cuda`.

Nothing is loaded before the first `cpu()` or `cuda()`. A module that is absent is None, and `cpu_reason()` or
`cuda_reason()` says why: it was not built (the build's own reason) or it cannot be loaded (the loader's words).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any


def build_info() -> dict[str, dict[str, Any]]:
    """What the build recorded for each part: {"built": True, ...facts} or {"built": False, "reason": ...}."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def cpu() -> ModuleType | None:
    """The compiled CPU kernels, or None."""
    return _load_cpu()[0]


def cpu_reason() -> str | None:
    """Why `cpu()` is None, or None."""
    return _load_cpu()[1]


def cuda() -> ModuleType | None:
    """The CUDA kernels compiled by nvcc, or None."""
    return _load_cuda()[0]


def cuda_reason() -> str | None:
    """Why `cuda()` is None, or None."""
    return _load_cuda()[1]


@functools.cache
def _load_cpu() -> tuple[ModuleType | None, str | None]:
    import torch  # noqa: F401  (its OpenMP runtime must be there first: the module is not linked to one)

    return _load("cpu")


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str | None]:
    return _load("cuda")


def _load(part: str) -> tuple[ModuleType | None, str | None]:
    name = f"llmcore._{part}"
    try:
        try:
            return importlib.import_module(name), None
        except ImportError as error:
            if not re.search(r"undefined symbol: (GOMP|omp)_", str(error)) or not _open_libgomp():
                raise
            return importlib.import_module(name), None
    except ModuleNotFoundError:
        facts = build_info().get(part)
        if facts is None:
            return None, f"{name} was not built (the package was not installed: run pip install -e .)"
        return None, f"{name} was not built: {facts.get('reason', 'its file is gone; install again')}"
    except ImportError as error:
        return None, f"{name} cannot be loaded: {error}"


def _open_libgomp() -> bool:
    """Make an OpenMP runtime visible to all modules: PyTorch's, if it is in this process, so that there is one
    thread pool; else the system's."""
    loaded: list[str] = []
    if os.path.exists("/proc/self/maps"):
        maps = Path("/proc/self/maps").read_text()
        loaded = sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[-.\w]*\.so\S*", maps)))
    for path in [*loaded, "libgomp.so.1"]:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return True
        except OSError:
            continue
    return False
