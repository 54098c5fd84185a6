"""The interpreter's bfloat16 is wrong without our patch and right with it.

In processes of their own: whether Triton interprets is decided when it is imported, and a patch stays.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Triton 3.6 reads bfloat16 correctly; everything that computes with one, or rounds to one, is wrong.
RIGHT_UNPATCHED = {"bf16 to fp32", "bf16 to fp64", "bf16 to fp16", "bf16 to int32"}


def _agreement(*options: str) -> dict[str, bool]:
    command = [sys.executable, str(Path(__file__).with_name("interpret_bf16.py")), *options]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_patched_interpreter_agrees_with_pytorch():
    agreement = _agreement("--patched")
    assert [name for name, agrees in agreement.items() if not agrees] == []


def test_unpatched_interpreter_is_wrong():
    agreement = _agreement()
    assert {name for name, agrees in agreement.items() if agrees} == RIGHT_UNPATCHED
