"""What every op promises as a PyTorch operator: opcheck, fullgraph, gradcheck, autocast, checkpointing, backends."""

import contextlib
import importlib
import itertools
import sys
import threading
from unittest import mock

import pytest
import torch
from ops.cases import randn
from ops.test_apply_rotary import tables
from sessions import INTERPRETED, backends
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import llmcore
from llmcore import ops
from llmcore.ops._dispatch import missing

IN_PLACE = {
    "selective_state_update"
}  # these change their first argument and have no gradient; their own tests hold them
NAMES = sorted(ops.registry.keys() - IN_PLACE)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLES = tables(7, 16, DEVICE)
SIZES, CHOICES = torch.tensor([3, 0, 4], device=DEVICE), torch.tensor([[0, 2]] * 3 + [[2, 0]] * 2, device=DEVICE)


def leaf(*shape, dtype=torch.float32, permuted=False, seed=0):
    """A leaf of this shape; permuted: its memory order is reversed."""
    tensor = randn(*(reversed(shape) if permuted else shape), dtype=dtype, device=DEVICE, grad=False, seed=seed)
    return (tensor.permute(*reversed(range(len(shape)))) if permuted else tensor).requires_grad_()


def by_name(op, names):
    """An op whose tensors are not its first arguments, as a function of its tensors in the order of these names."""

    def call(*tensors, **keywords):
        return op(**dict(zip(names, tensors, strict=True)), **keywords)

    if hasattr(op, "reference"):
        call.reference = by_name(op.reference, names)
    return call


def example(name, **how):
    """(public function, its differentiable arguments, its keywords) of each op."""
    if name == "rms_norm":
        return ops.rms_norm, (leaf(4, 6, 32, **how), leaf(32, seed=1)), {"residual": leaf(4, 6, 32, seed=2, **how)}
    if name == "swiglu":
        return ops.swiglu, (leaf(4, 6, 32, **how), leaf(4, 6, 32, seed=1, **how)), {}
    if name == "apply_rotary":
        return ops.apply_rotary, (leaf(2, 6, 4, 16, **how), leaf(2, 6, 2, 16, seed=1, **how)), TABLES
    if name == "causal_conv1d":
        tensors = (leaf(2, 5, 9, **how), leaf(5, 4, seed=1), leaf(5, seed=2))
        return ops.causal_conv1d, tensors, {"activation": "silu", "return_final_state": True}
    if name == "selective_scan":
        u, delta, z = (leaf(2, 5, 9, seed=seed, **how) for seed in range(3))
        B, C = (leaf(2, 4, 9, seed=seed, **how) for seed in (3, 4))
        A = leaf(5, 4, seed=5).detach().abs().neg().requires_grad_()
        others = (leaf(5, seed=6), z, leaf(5, seed=7))
        return ops.selective_scan, (u, delta, A, B, C, *others), {"delta_softplus": True, "return_last_state": True}
    if name == "ssd":
        x, z = (leaf(2, 9, 2, 5, seed=seed, **how) for seed in range(2))
        B, C = (leaf(2, 9, 1, 3, seed=seed, **how) for seed in (2, 3))
        A = leaf(2, seed=4).detach().abs().neg().requires_grad_()
        tensors = (x, leaf(2, 9, 2, seed=5, **how), A, B, C)
        keywords = {"dt_softplus": True, "dt_limit": (0.1, 2.0), "return_final_states": True}
        names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
        return by_name(ops.ssd, names), (*tensors, leaf(2, seed=6), z, leaf(2, seed=7)), keywords
    if name == "fused_swiglu":
        return ops.fused_swiglu, (leaf(4, 6, 8, **how), *(leaf(5, 8, seed=s, **how) for s in (1, 2))), {}
    if name == "grouped_gemm":
        return ops.grouped_gemm, (leaf(7, 5, **how), leaf(3, 4, 5, seed=1, **how)), {"group_sizes": SIZES}
    if name == "moe_route":
        return ops.moe_route, (leaf(6, 8, **how),), {"top_k": 3, "return_scores": True}
    if name == "moe_mlp":
        tensors = (leaf(5, 6, **how), leaf(3, 8, 6, seed=1, **how), leaf(3, 6, 4, seed=2, **how), leaf(5, 2, seed=3))
        return ops.moe_mlp, tensors, {"indices": CHOICES}
    q, k, v = leaf(2, 6, 4, 16, **how), leaf(2, 7, 2, 16, seed=1, **how), leaf(2, 7, 2, 24, seed=2, **how)
    return ops.attention, (q, k, v), {"causal": True, "return_lse": True}


def operator_arguments(name, backend, **how):
    """Positional arguments of torch.ops.llmcore.<name> and of its backward."""
    _, tensors, keywords = example(name, **how)
    if name == "rms_norm":
        return [(*tensors, keywords["residual"], 1e-6, 0.0, backend), (tensors[0], None, None, 1e-6, 1.0, backend)]
    if name == "swiglu":
        return [(*tensors, backend)]
    if name == "apply_rotary":
        positions = torch.tensor([3, 1, 0, 6, 2, 2], device=DEVICE)
        return [(*tensors, *TABLES.values(), p, i, False, backend) for p, i in ((None, False), (positions, True))]
    if name == "causal_conv1d":
        x, weight, bias = tensors
        offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=DEVICE)
        return [
            (*tensors, leaf(2, 5, 3, seed=3), None, None, True, True, backend),
            (
                x,
                weight,
                None,
                None,
                None,
                (torch.arange(18, device=DEVICE).view(2, 9) // 5).int(),
                False,
                False,
                backend,
            ),
            (x[:1].detach().requires_grad_(), weight, bias, None, offsets, None, True, True, backend),
        ]
    if name == "selective_scan":
        u, delta, A, B, C, *others = tensors
        required = (u, delta, A, B.unsqueeze(1), C.unsqueeze(1))
        return [
            (*required, *others, leaf(2, 5, 4, seed=8), None, True, True, backend),
            (*required, None, None, None, None, None, True, True, backend),
        ]
    if name == "ssd":
        options = (4, True, 0.1, 2.0, backend)
        numbers = (torch.arange(18, device=DEVICE).view(2, 9) // 5).int()
        return [
            (*tensors, leaf(2, 2, 5, 3, seed=8), None, None, *options),
            (*tensors[:5], None, None, None, None, None, numbers, *options),
        ]
    if name == "fused_swiglu":
        return [(*tensors, True, backend), (*(t.detach() for t in tensors), False, backend)]
    if name == "grouped_gemm":
        return [(*tensors, SIZES, backend)]
    if name == "moe_route":
        bias = torch.zeros(8, device=DEVICE)
        return [
            (*tensors, None, 3, True, True, 4, 2, 1.5, True, backend),
            (*tensors, bias, 2, False, False, 1, 1, 1.0, False, backend),
        ]
    if name == "moe_mlp":
        return [(*tensors, CHOICES, True, backend), (*(t.detach() for t in tensors), CHOICES, False, backend)]
    return [(*tensors, 0.25, -1, right, backend) for right in (0, -1)]


def flat(result):
    return sum(o.float().square().sum() for o in (result if isinstance(result, tuple) else (result,)))


def every(names=NAMES):
    return [pytest.param(n, b, id=f"{n}-{b}") for n in names for b in backends(n)]


@pytest.mark.parametrize(("name", "backend"), every())
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_opcheck(name, backend, permuted):
    for arguments in operator_arguments(name, backend, permuted=permuted):
        opcheck(getattr(torch.ops.llmcore, name).default, arguments)


@pytest.mark.parametrize(("name", "backend"), every())
def test_opcheck_of_the_backward(name, backend):
    """The backward operators, on the arguments a real backward passes them."""
    function, tensors, keywords = example(name)
    calls = []
    backward = "apply_rotary" if name == "apply_rotary" else f"{name}_backward"
    module = sys.modules[f"llmcore.ops.{name}"]
    real = getattr(module, f"_{backward}")
    with llmcore.backend(backend):
        result = function(*tensors, **keywords)
    with mock.patch.object(module, f"_{backward}", side_effect=lambda *a: calls.append(a) or real(*a)):
        flat(result).backward()
    assert calls
    for arguments in calls:
        opcheck(
            getattr(torch.ops.llmcore, backward).default,
            tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.skipif(INTERPRETED, reason="inductor would compile what the interpreter runs")
@pytest.mark.parametrize(("name", "backend"), every())
def test_compiles_to_one_graph(name, backend):
    function, tensors, keywords = example(name)

    def block(*tensors):
        return flat(function(*(2 * t for t in tensors), **keywords))

    with llmcore.backend(backend):
        torch._dynamo.reset()
        actual = torch.autograd.grad(torch.compile(block, fullgraph=True)(*tensors), tensors)
        expected = torch.autograd.grad(block(*tensors), tensors)
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(INTERPRETED, reason="the references do not change with the session")
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_reference_and_the_torch_backend(name):
    function, tensors, keywords = example(name, dtype=torch.float64)
    tensors = tuple(t.detach().double()[..., :16].requires_grad_() for t in tensors)
    keywords = {n: t.detach().double()[..., :16] if n == "residual" else t for n, t in keywords.items()}
    assert torch.autograd.gradcheck(lambda *t: function.reference(*t, **keywords), tensors, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *t: function(*t, **keywords), tensors, fast_mode=True)


@pytest.mark.parametrize(("name", "backend"), every())
def test_backward_keeps_its_forwards_backend(name, backend):
    """The context has ended and the backward runs on another thread; it still uses the forward's backend."""
    function, tensors, keywords = example(name)
    module = sys.modules[f"llmcore.ops.{name}"]
    backward = "apply_rotary" if name == "apply_rotary" else f"{name}_backward"
    real, seen = getattr(module, f"_{backward}"), []
    with llmcore.backend(backend):
        loss = flat(function(*tensors, **keywords))
    with mock.patch.object(module, f"_{backward}", side_effect=lambda *a: seen.append(a[-1]) or real(*a)):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert seen == [backend]


# Matrix products of the backward, of a group where there are groups: whatever is needed, and for each input's gradient.
PRODUCTS = {"fused_swiglu": (0, (2, 1, 1)), "grouped_gemm": (0, (1, 1)), "moe_mlp": (1, (1, 1, 1, 0))}


def products(name, backend, call):
    """How many matrix products a call takes; a launch for all groups is one."""
    if backend != "triton" or name == "fused_swiglu":
        with torch.profiler.profile() as profile:
            call()
        count = sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))
        return count if name == "fused_swiglu" else count / 2  # two groups have rows
    module = importlib.import_module(f"llmcore.kernels.{name}")
    with contextlib.ExitStack() as stack:
        launches = [
            stack.enter_context(mock.patch.object(module, function, wraps=getattr(module, function)))
            for function in ("rows_times_weights", "rows_times_rows")
        ]
        call()
    return sum(launch.call_count for launch in launches)


@pytest.mark.parametrize(("name", "backend"), every(PRODUCTS))
def test_gradients_that_nobody_needs_cost_no_product(name, backend):
    """Frozen experts, for one. The other gradients are the same bits."""
    function, tensors, keywords = example(name)
    always, costs = PRODUCTS[name]
    with llmcore.backend(backend):
        expected = torch.autograd.grad(flat(function(*tensors, **keywords)), tensors)
    for needed in itertools.product([True, False], repeat=len(tensors)):
        if not any(needed):
            continue
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        with llmcore.backend(backend):
            loss = flat(function(*leaves, **keywords))
        assert products(name, backend, loss.backward) == always + sum(itertools.compress(costs, needed))
        for t, gradient, need in zip(leaves, expected, needed, strict=True):
            assert torch.equal(t.grad, gradient) if need else t.grad is None


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_whoever_listens_meets_the_operator(name):
    """Eager calls go past the dispatcher, but not past a mode, the profiler or a transform."""
    function, tensors, keywords = example(name)
    with Seen() as seen:
        flat(function(*tensors, **keywords)).backward()
    backward = "apply_rotary" if name == "apply_rotary" else f"{name}_backward"
    assert {f"llmcore::{name}", f"llmcore::{backward}"} <= set(seen.names)
    with torch.profiler.profile() as profile:
        function(*tensors, **keywords)
    assert f"llmcore::{name}" in {e.key for e in profile.key_averages()}
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda *t: function(*t, **keywords))(*tensors)
    assert f"llmcore.{name}" in graph.code


@pytest.mark.parametrize("name", NAMES)
def test_inside_another_operator_no_gradient_is_recorded(name):
    """The outer operator's backward answers for what its implementation calls."""
    function, tensors, keywords = example(name)
    with torch._C._AutoDispatchBelowAutograd():
        result = function(*tensors, **keywords)
    assert not any(r.requires_grad for r in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize(("name", "backend"), every())
def test_the_short_way_gives_the_operators_results(name, backend):
    function, tensors, keywords = example(name)
    with llmcore.backend(backend):
        short = function(*tensors, **keywords)
        actual = torch.autograd.grad(flat(short), tensors)
        with Seen():
            dispatched = function(*tensors, **keywords)
            expected = torch.autograd.grad(flat(dispatched), tensors)
    torch.testing.assert_close(short, dispatched, rtol=0, atol=0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "backend"), every())
def test_activation_checkpointing(name, backend):
    function, tensors, keywords = example(name)
    with llmcore.backend(backend):
        expected = torch.autograd.grad(flat(function(*tensors, **keywords)), tensors)
        again = torch.utils.checkpoint.checkpoint(
            lambda *t: flat(function(*t, **keywords)), *tensors, use_reentrant=False
        )
        actual = torch.autograd.grad(again, tensors)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "backend"), every())
def test_meta_tensors_give_shapes(name, backend):
    function, tensors, keywords = example(name)
    with llmcore.backend(backend):
        real = function(*tensors, **keywords)
        meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in keywords.items()}
        shapes = function(*(t.to("meta") for t in tensors), **meta)
    for a, b in zip(
        real if isinstance(real, tuple) else (real,), shapes if isinstance(shapes, tuple) else (shapes,), strict=True
    ):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) and b.is_meta


@pytest.mark.parametrize(("name", "backend"), every())
def test_double_backward_is_refused(name, backend):
    function, tensors, keywords = example(name)
    with llmcore.backend(backend), pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
        torch.autograd.grad(flat(function(*tensors, **keywords)), tensors, create_graph=True)


@pytest.mark.skipif(INTERPRETED, reason="other backends are not proven in this session")
def test_forcing_a_backend():
    x = torch.randn(2, 16)
    with llmcore.backend("torch"):
        with pytest.raises(
            ValueError, match="backend\\(...\\) is 'tritom', which is not a backend; allowed: triton, cuda, cpu, torch"
        ):
            llmcore.backend("tritom").__enter__()
        ops.rms_norm(x)
    with llmcore.backend("cuda"), pytest.raises(RuntimeError) as caught:
        ops.swiglu(x, x)
    assert str(caught.value).startswith("swiglu was asked to run on the cuda backend, but swiglu has no cuda kernel")
    assert "available for cpu tensors:" in str(caught.value) and "torch" in str(caught.value)
    with (
        llmcore.backend("triton"),
        pytest.raises(RuntimeError, match="triton takes CPU tensors only under its interpreter"),
    ):
        ops.rms_norm(x)
    if missing("rms_norm", "cpu", "cpu") is None:
        with llmcore.backend("cpu"), pytest.raises(TypeError, match="takes float32, bfloat16 or float16, not float64"):
            ops.rms_norm(x.double())


def test_a_forced_backend_belongs_to_its_thread():
    seen = []

    def look():
        seen.append(ops._dispatch._forced.name)

    with llmcore.backend("torch"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
    assert seen == [None, "torch"]


@pytest.mark.skipif(INTERPRETED, reason="inductor would compile what the interpreter runs")
@pytest.mark.skipif(missing("rms_norm", "cpu", "cpu") is not None, reason="needs two backends on the CPU")
def test_compiled_code_follows_the_forced_backend():
    x, seen = torch.randn(2, 16), []

    def capture(graph, inputs):
        seen.append([n.args[-1] for n in graph.graph.nodes if "rms_norm" in str(n.target)])
        return graph

    compiled = torch.compile(lambda x: ops.rms_norm(x), fullgraph=True, backend=capture)
    torch._dynamo.reset()
    compiled(x)
    with llmcore.backend("torch"):
        compiled(x)
    assert seen == [["cpu"], ["torch"]]


def test_imported_twice():
    """A second import of the package finds the operators registered and works with them."""
    old = {n: m for n, m in sys.modules.items() if n == "llmcore" or n.startswith("llmcore.")}
    for n in old:
        del sys.modules[n]
    try:
        again = importlib.import_module("llmcore")
        gate = randn(2, 8, device=DEVICE)
        with again.backend("torch"):
            again.ops.swiglu(gate, gate).sum().backward()
        assert gate.grad is not None
    finally:
        for n in [n for n in sys.modules if n == "llmcore" or n.startswith("llmcore.")]:
            del sys.modules[n]
        sys.modules.update(old)


@pytest.mark.parametrize(("name", "backend"), every([n for n in NAMES if n != "attention"]))
def test_results_may_be_written_in_place(name, backend):
    """Where the backward does not need them (attention's does)."""
    function, tensors, keywords = example(name)
    with llmcore.backend(backend):
        result, again = function(*tensors, **keywords), function(*tensors, **keywords)
    first, same = (r if isinstance(r, torch.Tensor) else r[0] for r in (result, again))
    expected = torch.autograd.grad(2 * first.sum(), tensors, allow_unused=True)
    same.mul_(2)
    actual = torch.autograd.grad(same.sum(), tensors, allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e)


def test_forward_mode_derivatives_are_refused():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(4), torch.randn(4))
        with pytest.raises(RuntimeError, match="swiglu has no forward-mode derivative"):
            ops.swiglu(x, x)
