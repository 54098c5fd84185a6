"""The Triton kernels, forward and backward, through Triton's interpreter: tests/ops again, in processes of their own.

They take minutes of one processor each, and start as soon as it is known that they are wanted (conftest.py): the rest of
the session runs beside them.
"""

import importlib.util
import os

import interpreted
import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this session is itself the interpreted one")
@pytest.mark.parametrize("part", interpreted.PARTS)
def test_triton_kernels_interpreted(part: str) -> None:
    code, output = interpreted.result(part)
    assert code == 0, output[-8000:]
    assert " passed" in output
