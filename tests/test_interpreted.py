"""The Triton kernels, forward and backward, through Triton's interpreter: tests/ops again, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this session is itself the interpreted one")
def test_triton_kernels_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", "tests/ops", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
