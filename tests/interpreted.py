"""The interpreted sessions of tests/ops: one for the state-space scans, one for all others."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCANS = ("test_selective_scan.py", "test_ssd.py")
PARTS = ("scans", "others")
_running: dict[str, tuple[subprocess.Popen, Any]] = {}


def files_of(part: str) -> list[str]:
    """Every file of tests/ops is in one part."""
    names = sorted(path.name for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    return [f"tests/ops/{name}" for name in names if (name in SCANS) == (part == "scans")]


def start(part: str) -> None:
    if part in _running or importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return
    output = tempfile.TemporaryFile("w+")
    command = [sys.executable, "-m", "pytest", *files_of(part), "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    _running[part] = (
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.nice(10),
        ),
        output,
    )  # fmt: skip


def result(part: str) -> tuple[int, str]:
    """Exit status and output."""
    start(part)
    process, output = _running[part]
    code = process.wait()
    output.seek(0)
    return code, output.read()


def stop() -> None:
    for process, _ in _running.values():
        process.kill()
        process.wait()
