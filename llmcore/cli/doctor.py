"""`llmcore doctor`: for every op, which backend runs it on this machine and why the better ones do not."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import torch

from llmcore import _extension, ops
from llmcore._version import __version__
from llmcore.ops._dispatch import BACKENDS, PREFERENCE, missing

Report = dict[str, Any]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="ops x backends: what runs here, and why the better ones do not")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def diagnose() -> Report:
    """Versions, the state of the compiled parts, and a row for each op and device."""
    forced = os.environ.get("LLMCORE_BACKEND")
    rows = []
    for name, op in sorted(ops.registry.items()):
        for device in devices():
            cells = {}
            for backend in BACKENDS:
                reason = missing(name, backend, device)
                cells[backend] = "yes" if reason is None else reason
                if reason is None and backend in op.opt_in:
                    cells[backend] = f"on request: {op.opt_in[backend]}"
            interpreted = os.environ.get("TRITON_INTERPRET") == "1"
            order = [b for b in PREFERENCE[device] if b in op.kernels or b == "torch"]
            order = [b for b in order if b != "triton" or device == "cuda" or interpreted]
            chosen = forced or next(b for b in order if cells[b] == "yes")
            if forced and missing(name, forced, device) is not None:
                chosen = "nothing"
            better = order[: order.index(chosen)] if chosen in order else []
            rows.append({
                "op": name, "device": device, "runs on": chosen, "backends": cells,
                "why not better": "; ".join(f"{b}: {cells[b]}" for b in better if cells[b] != "yes"),
            })  # fmt: skip
    cpu = _extension.cpu()
    return {
        "llmcore": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "machine": f"{platform.system()} {platform.machine()}",
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu kernels": f"instruction set {cpu.isa()}" if cpu else f"absent: {_extension.cpu_reason()}",
        "cuda kernels": "loaded" if _extension.cuda() else f"absent: {_extension.cuda_reason()}",
        "LLMCORE_BACKEND": forced,
        "ops": rows,
    }


def run(options: argparse.Namespace) -> int:
    forced = os.environ.get("LLMCORE_BACKEND")
    if forced and forced not in BACKENDS:
        print(
            f"LLMCORE_BACKEND is {forced!r}, which is not a backend; allowed: {', '.join(BACKENDS)}.", file=sys.stderr
        )
        return 2
    report = diagnose()
    code = 1 if any(row["runs on"] == "nothing" for row in report["ops"]) else 0
    if options.json:
        print(json.dumps(report, indent=2))
        return code
    for key in (
        "llmcore",
        "python",
        "torch",
        "triton",
        "machine",
        "gpus",
        "cpu kernels",
        "cuda kernels",
        "LLMCORE_BACKEND",
    ):
        value = report[key]
        print(f"{key:16} {', '.join(value) if isinstance(value, list) else value or '-'}")
    print(f"\n{'op':14} {'device':6} {'runs on':8} " + " ".join(f"{b:10}" for b in BACKENDS))
    notes: dict[str, None] = {}
    for row in report["ops"]:
        cells = [
            c if c == "yes" else "on request" if c.startswith("on request") else "-" for c in row["backends"].values()
        ]
        print(f"{row['op']:14} {row['device']:6} {row['runs on']:8} " + " ".join(f"{c:10}" for c in cells))
        for backend, cell in row["backends"].items():
            if cell != "yes" and not cell.endswith(f"no {backend} kernel"):
                notes[f"{backend} on {row['device']}: {cell}"] = None
    if notes:
        print("\nWhy not:")
        for note in notes:
            print(f"  {note}")
    return code
