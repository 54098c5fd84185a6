"""What this test session can prove: everything that runs here, or the Triton kernels in their interpreter, or the CUDA
kernels on the CPU (tests/cuda_on_cpu)."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHIMMED = "LLMCORE_CUDA_SHIM" in os.environ


def backends(op: str) -> list[str]:
    """The backends to prove for `op` in this session; those that cannot run here are listed by `llmcore doctor`."""
    from llmcore.ops._dispatch import missing, registry

    if INTERPRETED:
        return ["triton"] if "triton" in registry[op].kernels else []
    if SHIMMED:
        return ["cuda"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [b for b in ("triton", "cuda", "cpu", "torch") if missing(op, b, device) is None]
