"""Attention on AMX tiles, on a processor that need not have them: the tile instructions are emulated."""

import importlib.util
import shlex
import sysconfig

import pytest
import torch
from cuda_on_cpu import build_shim
from ops.cases import randn
from sessions import INTERPRETED

import llmcore
from llmcore import _extension, ops
from llmcore.testing import assert_accurate

pytestmark = [
    pytest.mark.skipif(build_shim.missing() is not None, reason=str(build_shim.missing())),
    pytest.mark.skipif(INTERPRETED, reason="C++ kernels, which an interpreted session does not run"),
]
FLAGS = shlex.split(
    "-std=c++17 -g0 -O1 -w -Wno-psabi -fPIC -fopenmp -DLLMCORE_ISA=emulated -DLLMCORE_LEVELS=X(emulated) "
    "-DLLMCORE_EMULATE_AMX -DLLMCORE_VECTOR_BYTES=64"
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    pybind11 = pytest.importorskip("pybind11")
    directory = tmp_path_factory.mktemp("emulated")
    includes = ["-I", str(build_shim.ROOT / "csrc"), "-isystem", sysconfig.get_path("include")]
    options = [*FLAGS, *includes, "-isystem", pybind11.get_include()]
    objects = build_shim.compile_all(sorted((build_shim.ROOT / "csrc" / "cpu").glob("*.cpp")), directory, options)
    path = build_shim.link(objects, directory / "_cpu.so", ["-shared"])
    spec = importlib.util.spec_from_file_location("_cpu", path)  # a name that no other module has
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "T_q", "T_k", "H", "K", "D", "Dv"),
    [
        (1, 64, 64, 2, 2, 64, 64),
        (2, 33, 33, 4, 2, 32, 32),
        (1, 130, 130, 3, 1, 16, 16),
        (1, 100, 30, 2, 2, 24, 24),
        (1, 17, 19, 2, 1, 40, 72),
        (1, 30, 41, 2, 2, 104, 200),
        (1, 200, 340, 2, 1, 64, 64),
        (1, 1, 1, 1, 1, 16, 16),
    ],
)
def test_shapes(emulated, monkeypatch, causal, B, T_q, T_k, H, K, D, Dv):
    assert emulated.isa() == "emulated"
    monkeypatch.setattr(_extension, "_load_cpu", lambda: (emulated, None))
    shapes = {"q": (B, T_q, H, D), "k": (B, T_k, K, D), "v": (B, T_k, K, Dv)}
    inputs = {name: randn(*shape, dtype=torch.bfloat16, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    with llmcore.backend("cpu"):
        assert_accurate(ops.attention, ops.attention.reference, {"return_lse": True, "causal": causal, **inputs})


def test_one_visible_key_gives_exact_zeros(emulated, monkeypatch):
    """dq of the first causal row: dout . v_j and delta are the same sum, in the same order."""
    monkeypatch.setattr(_extension, "_load_cpu", lambda: (emulated, None))
    q, k, v = (randn(1, 40, 2, D, dtype=torch.bfloat16, seed=D) for D in (64, 64, 48))
    with llmcore.backend("cpu"):
        out = ops.attention(q, k, v, causal=True)
        (dq,) = torch.autograd.grad(out, [q], randn(*out.shape, dtype=torch.bfloat16, grad=False))
    assert torch.equal(out[:, 0], v[:, 0]) and bool((dq[:, 0] == 0).all()) and bool((dq[:, 1] != 0).any())
