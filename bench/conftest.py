"""`pytest bench`: every case and candidate as a test of pytest-benchmark. --device cuda, --short."""

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("llmcore")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    group.addoption("--short", action="store_true", help="the short set of cases")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'llmcore[bench]'.")
    if not config.option.collectonly and config.option.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device is cuda, but PyTorch sees no GPU; allowed here: cpu.")
