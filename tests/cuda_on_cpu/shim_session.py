"""Lets a test session run the CUDA kernels on the CPU: with LLMCORE_CUDA_SHIM=<module built by build_shim> in the environment
the backend "cuda" takes CPU tensors, and tests/ops/test_<op>.py proves the .cu file as it proves any other backend."""

import importlib.machinery
import importlib.util

from llmcore import _extension
from llmcore.ops import _dispatch, _native


def install(path: str) -> None:
    loader = importlib.machinery.ExtensionFileLoader("llmcore._cuda", path)
    spec = importlib.util.spec_from_loader("llmcore._cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    usual = _dispatch.missing

    def missing(name: str, backend: str, device: str) -> str | None:
        if backend == "cuda" and device == "cpu" and "cuda" in _dispatch.registry[name].kernels:
            return None
        return usual(name, backend, device)

    _extension._load_cuda = lambda: (module, None)  # type: ignore[assignment]
    _dispatch.missing = missing  # type: ignore[assignment]
    _native.stream = lambda backend, tensor: () if backend == "cpu" else (0,)
