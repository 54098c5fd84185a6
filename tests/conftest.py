"""Which backends a test session can prove.

A plain session runs every backend that runs on this machine. With TRITON_INTERPRET=1 (tests/test_interpreted.py starts such
a session, because one process cannot both interpret and compile) tests/ops runs the Triton kernels in the interpreter; with LLMCORE_CUDA_SHIM
(tests/cuda_on_cpu) it runs the CUDA kernels on the CPU.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import interpreted  # noqa: E402
from sessions import INTERPRETED, SHIMMED, backends  # noqa: E402

if INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()

if SHIMMED:
    from cuda_on_cpu import shim_session

    shim_session.install(os.environ["LLMCORE_CUDA_SHIM"])

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "llmcore", max_examples=8 if INTERPRETED or SHIMMED else 40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("llmcore")

torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        for item in session.items:
            if getattr(item, "originalname", "") == "test_triton_kernels_interpreted":
                interpreted.start(item.callspec.params["part"])


def pytest_sessionfinish() -> None:
    interpreted.stop()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `backend` runs once for each; its module's OP names the op."""
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        metafunc.parametrize("backend", backends(metafunc.module.OP))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
