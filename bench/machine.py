"""What a record must say of where it was taken."""

import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from llmcore import _extension

CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


def machine(device: str = "cpu") -> dict[str, str | int]:
    cpu = _extension.cpu()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    gpu = _gpu() if device == "cuda" else {}
    return {
        **gpu,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "clock": _clock(),
        "cpu kernels": cpu.isa() if cpu else "absent",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit,
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def plain(name: str) -> str:
    """As part of a file's name."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def folder_name(where: dict[str, str | int]) -> str:
    """Of the records of a machine."""
    return plain(str(where["gpu"]) if "gpu" in where else f"{where['processor']} {where['threads']} threads")


def cache_bytes(device: str) -> int:
    """The last cache before memory: a GPU's L2, a processor's L3; 32 MiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        return max(int(path.read_text().strip().removesuffix("K")) * 1024 for path in CACHE.glob("index*/size"))
    except (OSError, ValueError):
        return 32 << 20


def _version(package: str) -> str:
    try:
        return __import__(package).__version__
    except ImportError:
        return "absent"


def _gpu() -> dict[str, str | int]:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True).stdout.split(",")
    except OSError:
        said = []
    names = ("driver", "SM clock", "memory clock")
    facts = {name: value.strip() for name, value in zip(names, said, strict=False)}
    return {"gpu": torch.cuda.get_device_name(), **facts}


def _cpuinfo() -> dict[str, str]:
    with open("/proc/cpuinfo") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return {name.strip(): value.strip() for name, value in fields.items()}


def _processor() -> str:
    try:
        info = _cpuinfo()
        return f"{info['model name']} family {info['cpu family']} model {info['model']}"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _clock() -> str:
    try:
        return f"{float(_cpuinfo()['cpu MHz']):.0f} MHz"
    except (OSError, KeyError, ValueError):
        return "unknown"
