"""The launches whose kernels must compile for every architecture.

python -m bench.compile.cases 90 [--all] [--only PREFIX] compiles them for one compute capability and prints JSON: what
each launch compiled, and the kernels that no launch reaches. --all adds every entry of the tables of configurations.
"""

import argparse
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from bench.compile.ahead_of_time import compile_launches, never_compiled
from llmcore.kernels import (
    apply_rotary,
    attention,
    causal_conv1d,
    device,
    expert_plan,
    fused_swiglu,
    grouped_gemm,
    moe_mlp,
    moe_route,
    rms_norm,
    selective_scan,
    selective_state_update,
    ssd,
    swiglu,
)

ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Case = tuple[str, Callable[[], object]]


def launch_attention(dtype, D, DV, window, by_pointer, precision):
    torch.set_float32_matmul_precision(precision)
    B, T, H, K = 2, 256, 4, 2
    q, k, v = (torch.empty(B, T, *shape, dtype=dtype) for shape in ((H, D), (K, D), (K, DV)))
    out, lse = torch.empty(B, T, H, DV, dtype=dtype), torch.empty(B, H, T)
    if by_pointer:
        v = v[:1].expand(B, T, K, DV)
    attention.attention_fwd(q, k, v, 0.1, *window)
    attention.attention_bwd(out, lse, q, k, v, out, lse, 0.1, *window)


def _attention_cases(everything: bool) -> Iterator[Case]:
    full, causal, sliding = (-1, -1), (-1, 0), (100, 0)
    chosen = [
        ("bf16", 64, 64, causal, False), ("bf16", 128, 128, causal, False), ("bf16", 128, 128, full, False),
        ("bf16", 256, 256, causal, False), ("bf16", 80, 80, full, False), ("bf16", 128, 128, causal, True),
        ("fp16", 128, 128, causal, False), ("fp32", 64, 64, causal, False),
    ]  # fmt: skip
    if everything:
        sizes = [(8, 8), (32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)]
        chosen += [
            ("bf16", *size, window, by_pointer)
            for size in sizes
            for window in (full, causal, sliding)
            for by_pointer in (False, True)
        ]
        chosen += [("fp16", *size, causal, False) for size in sizes]
        chosen += [(dtype, *size, causal, False) for dtype in ("fp32", "tf32") for size in sizes]
    for dtype, D, DV, window, by_pointer in dict.fromkeys(chosen):
        precision = "high" if dtype == "tf32" else "highest"
        layout = "by_pointer" if by_pointer else "contiguous"
        mask = {full: "full", causal: "causal", sliding: "sliding"}[window]
        call = partial(launch_attention, DTYPES.get(dtype, torch.float32), D, DV, window, by_pointer, precision)
        yield f"attention {dtype} {D}/{DV} {mask} {layout}", call


def launch_rms_norm(dtype, cols, with_residual):
    x, weight = torch.empty(8, cols, dtype=dtype), torch.empty(cols, dtype=dtype)
    residual = x if with_residual else None
    rms_norm.rms_norm_fwd(x, weight, residual, 1e-6, 0.0)
    rms_norm.rms_norm_bwd(x, residual, x, weight, torch.empty(8), 0.0, dtype, dtype if with_residual else None, True)


def launch_swiglu(dtype, cols):
    x = torch.empty(8, 2 * cols, dtype=dtype)
    swiglu.swiglu_fwd(x[:, :cols], x[:, cols:])
    swiglu.swiglu_bwd(x[:, :cols], x[:, :cols], x[:, cols:])


def launch_fused_swiglu(dtype, precision):
    torch.set_float32_matmul_precision(precision)
    x, w, y = (torch.empty(shape, dtype=dtype) for shape in ((4096, 1024), (2048, 1024), (4096, 2048)))
    fused_swiglu.fused_swiglu_fwd(x, w, w, y, y, y)


def launch_apply_rotary(dtype, D, R, interleaved):
    q, k, table = torch.empty(2, 8, 32, D, dtype=dtype), torch.empty(2, 8, 8, D, dtype=dtype), torch.empty(8, R // 2)
    apply_rotary.apply_rotary(q, k, table, table, None, interleaved, False)


def launch_selective_scan(dtype, states, length, packed):
    B, D = (1 if packed else 2), 64
    x, small = torch.empty(B, D, length, dtype=dtype), torch.empty(B, 1, states, length, dtype=dtype)
    A, vector, state = torch.empty(D, states), torch.empty(D), torch.empty(B, D, states)
    documents = torch.tensor([0, length], dtype=torch.int32) if packed else None
    saved = torch.empty(B, length // selective_scan.CHUNK, states, D)
    inputs = (x, x, A, small, small, vector, x, vector, state, documents)
    selective_scan.selective_scan_fwd(*inputs, True, torch.empty_like(x), torch.empty_like(state), saved)
    selective_scan.selective_scan_bwd(x, state, *inputs, saved, True, torch.empty_like(state))


def _scan_cases(everything: bool) -> Iterator[Case]:
    """Short sequences go through in one piece, long ones of few channels in segments."""
    chosen = [("bf16", 16, "short"), ("bf16", 16, "segments"), ("bf16", 16, "packed"), ("bf16", 128, "short")]
    if everything:
        chosen += [(name, 16, "short") for name in DTYPES]
        chosen += [("bf16", states, "short") for states in (1, 4, 8, 32, 64, 256)]
    for name, states, kind in dict.fromkeys(chosen):
        length = 8192 if kind == "segments" else 256
        call = partial(launch_selective_scan, DTYPES[name], states, length, kind == "packed")
        yield f"selective_scan {name} {states} {kind}", call


def launch_selective_state_update(dtype, state_dtype, heads, states):
    """heads: (H, P) with a parameter for each head, as Mamba-2 has them, or (1, D) with one for each channel."""
    H, P = heads
    state, x, small = (
        torch.empty(2, *shape, dtype=kind)
        for shape, kind in (((H, P, states), state_dtype), ((H, P), dtype), ((1, states), dtype))
    )
    dt, A, vector = x, torch.empty(H, P, states), torch.empty(H, P)
    if H > 1:
        dt = torch.empty(2, H, 1, dtype=dtype).expand(2, H, P)
        A, vector = torch.empty(H, 1, 1).expand(H, P, states), torch.empty(H, 1).expand(H, P)
    selective_state_update.selective_state_update(state, x, dt, A, small, small, vector, x, vector, True, x)


def _update_cases(everything: bool) -> Iterator[Case]:
    flat, heads = (1, 1536), (24, 64)
    chosen = [("fp32", "fp32", flat, 16), ("bf16", "fp32", flat, 16), ("bf16", "fp32", heads, 128)]
    if everything:
        chosen += [(name, state, shape, 16) for name in DTYPES for state in DTYPES for shape in (flat, heads)]
        chosen += [("bf16", "fp32", shape, states) for shape in (flat, heads) for states in (1, 33, 64, 128, 256)]
        chosen += [("bf16", "bf16", heads, 128)]
    for name, state, shape, states in dict.fromkeys(chosen):
        call = partial(launch_selective_state_update, DTYPES[name], DTYPES[state], shape, states)
        yield f"selective_state_update {name} {state} {'flat' if shape == flat else 'heads'} {states}", call


def launch_ssd(dtype, P, N, packed, precision):
    torch.set_float32_matmul_precision(precision)
    B, L, H, G = (1 if packed else 2), 1024, 16, 1
    x, dt, A = torch.empty(B, L, H, P, dtype=dtype), torch.empty(B, L, H, dtype=dtype), torch.empty(H)
    small, states = torch.empty(B, L, G, N, dtype=dtype), torch.empty(B, H, P, N)
    documents = torch.tensor([[0, 0, L, 0, 0]]) if packed else None
    inputs = (x, dt, A, small, small, A, x, A, states, documents, True, 0.0, math.inf)
    ssd.ssd_fwd(*inputs, torch.empty_like(x), states)
    ssd.ssd_bwd(x, states, *inputs, torch.empty_like(states))


def _ssd_cases(everything: bool) -> Iterator[Case]:
    chosen = [("bf16", 64, 128, False), ("bf16", 64, 64, False), ("bf16", 64, 128, True), ("fp32", 64, 128, False)]
    if everything:
        chosen += [("bf16", *size, False) for size in ((64, 16), (64, 256), (80, 100), (128, 128), (256, 256))]
        chosen += [(name, *size, False) for name in ("fp16", "fp32", "tf32") for size in ((64, 128), (256, 256))]
    for name, P, N, packed in dict.fromkeys(chosen):
        precision = "high" if name == "tf32" else "highest"
        call = partial(launch_ssd, DTYPES.get(name, torch.float32), P, N, packed, precision)
        yield f"ssd {name} {P}/{N} {'packed' if packed else 'plain'}", call


def launch_moe_route(dtype, experts, top_k, groups, sigmoid):
    tokens = 256
    logits, bias = torch.empty(tokens, experts, dtype=dtype), torch.empty(experts) if groups > 1 else None
    weights, indices = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int64)
    scores = torch.empty(tokens, experts)
    moe_route.moe_route_fwd(logits, bias, weights, indices, scores, sigmoid, True, groups, min(groups, 4), 1.0)
    moe_route.moe_route_bwd(weights, scores, logits, indices, torch.empty_like(logits), sigmoid, True, 1.0)


def launch_moe_mlp(dtype, experts, top_k, tokens, precision):
    torch.set_float32_matmul_precision(precision)
    width, inner, pairs = 2048, 768, tokens * top_k
    x, w_gate_up = torch.empty(tokens, width, dtype=dtype), torch.empty(experts, 2 * inner, width, dtype=dtype)
    w_down, h = torch.empty(experts, width, inner, dtype=dtype), torch.empty(pairs, 2 * inner, dtype=dtype)
    order, place, offsets = (torch.empty(n, dtype=torch.int32) for n in (pairs, pairs, experts + 1))
    indices, weights = torch.empty(pairs, dtype=torch.int64), torch.empty(tokens, top_k)
    expert_plan.expert_plan(indices, order, place, offsets)
    inputs = (x, w_gate_up, w_down, weights)
    moe_mlp.moe_mlp_fwd(*inputs, order, place, offsets, h, x)
    moe_mlp.moe_mlp_bwd(x, *inputs, h, order, place, offsets, weights, x, w_gate_up, w_down)


def launch_grouped_gemm(dtype, groups, rows):
    x, w = torch.empty(rows, 1024, dtype=dtype), torch.empty(groups, 512, 1024, dtype=dtype)
    y, offsets = torch.empty(rows, 512, dtype=dtype), torch.empty(groups + 1, dtype=torch.int32)
    grouped_gemm.rows_times_weights(x, w, offsets, y)
    grouped_gemm.rows_times_weights(y, w.transpose(1, 2), offsets, x)
    grouped_gemm.rows_times_rows(y, x, offsets, w)


def _expert_cases(everything: bool) -> Iterator[Case]:
    routes = [("fp32", 128, 8, 1, False), ("fp32", 256, 8, 8, True)]
    mlps = [("bf16", 128, 8, 32768), ("bf16", 64, 6, 256), ("fp32", 8, 2, 4096)]
    products = [("bf16", 64, 16384)]
    if everything:
        routes += [(name, 8, 2, 1, False) for name in DTYPES]
        mlps += [("fp16", 128, 8, 32768), ("tf32", 8, 2, 4096)]
        products += [(name, groups, 4096) for name in DTYPES for groups in (8, 256)]
    for name in (*DTYPES, "tf32") if everything else ("bf16", "fp32"):
        precision = "high" if name == "tf32" else "highest"
        yield f"fused_swiglu {name} 2048", partial(launch_fused_swiglu, DTYPES.get(name, torch.float32), precision)
    for name, experts, top_k, groups, sigmoid in routes:
        call = partial(launch_moe_route, DTYPES[name], experts, top_k, groups, sigmoid)
        yield f"moe_route {name} {experts} top {top_k} of {groups} groups", call
    for name, experts, top_k, tokens in mlps:
        precision = "high" if name == "tf32" else "highest"
        call = partial(launch_moe_mlp, DTYPES.get(name, torch.float32), experts, top_k, tokens, precision)
        yield f"moe_mlp {name} {experts} top {top_k} of {tokens}", call
    for name, groups, rows in products:
        yield f"grouped_gemm {name} {groups} of {rows}", partial(launch_grouped_gemm, DTYPES[name], groups, rows)


def launch_causal_conv1d(dtype, W, layout, documents):
    """documents: how they are marked, and whether there are states."""
    B, D, L = 1, 512, 1024
    x = torch.empty(B, L, D, dtype=dtype).transpose(1, 2) if layout == "view" else torch.empty(B, D, L, dtype=dtype)
    weight, bias = torch.empty(D, W, dtype=dtype), torch.empty(D, dtype=dtype)
    states = torch.empty(3 if documents == "packed" else B, D, W - 1, dtype=dtype) if documents != "numbered" else None
    offsets = torch.empty(4, dtype=torch.int32) if documents == "packed" else None
    numbers = torch.empty(B, L, dtype=torch.int32) if documents == "numbered" else None
    if documents == "plain":
        states = None
    inputs = (x, weight, bias, states, offsets, numbers, True)
    causal_conv1d.causal_conv1d_fwd(*inputs, x, states)
    causal_conv1d.causal_conv1d_bwd(x, states, *inputs, x, states)


def launch_causal_conv1d_update(dtype, W, remembered):
    x, state = torch.empty(8, 512, 1, dtype=dtype), torch.empty(8, 512, remembered, dtype=dtype)
    weight, bias = torch.empty(512, W, dtype=dtype), torch.empty(512, dtype=dtype)
    causal_conv1d.causal_conv1d_update(x, state, weight, bias, True, x)


def _causal_conv1d_cases(everything: bool) -> Iterator[Case]:
    chosen = [("bf16", 4, "view", "plain"), ("bf16", 4, "contiguous", "plain"), ("fp32", 4, "view", "packed")]
    if everything:
        chosen += [
            (name, W, layout, documents)
            for name in DTYPES
            for W in (2, 3, 4)
            for layout in ("view", "contiguous")
            for documents in ("plain", "states", "packed", "numbered")
        ]
    for name, W, layout, documents in dict.fromkeys(chosen):
        call = partial(launch_causal_conv1d, DTYPES[name], W, layout, documents)
        yield f"causal_conv1d {name} {W} {layout} {documents}", call
    for name in DTYPES if everything else ("bf16",):
        for W, remembered in ((2, 1), (4, 3), (4, 4)) if everything else ((4, 3),):
            call = partial(launch_causal_conv1d_update, DTYPES[name], W, remembered)
            yield f"causal_conv1d_update {name} {W} {remembered}", call


def _row_cases(everything: bool) -> Iterator[Case]:
    for name, dtype in DTYPES.items():
        for cols in (100, 128, 1000, 1024, 4096, 8192, 16384, 65536) if everything else (1000, 4096, 65536):
            for residual in (False, True) if everything else (True,):
                call = partial(launch_rms_norm, dtype, cols, residual)
                yield f"rms_norm {name} {cols} {'with' if residual else 'without'}_residual", call
        for cols in (11008, 1001) if everything else (11008,):
            yield f"swiglu {name} {cols}", partial(launch_swiglu, dtype, cols)
        for D, R in ((64, 64), (128, 128), (80, 80), (80, 40), (128, 64)) if everything else ((128, 128), (80, 40)):
            for interleaved in (False, True):
                call = partial(launch_apply_rotary, dtype, D, R, interleaved)
                yield f"apply_rotary {name} {D}/{R} {'interleaved' if interleaved else 'halves'}", call


def main(capability: int, everything: bool, only: str = "") -> None:
    kinds = (_attention_cases, _row_cases, _scan_cases, _update_cases, _ssd_cases, _causal_conv1d_cases, _expert_cases)
    cases = [case for kind in kinds for case in kind(everything)]
    compiled, kernels = compile_launches(capability, device, [case for case in cases if case[0].startswith(only)])
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    modules = [importlib.import_module(f"llmcore.kernels.{name}") for name in names]
    report = {
        "compiled": [dataclasses.asdict(entry) for entry in compiled],
        "never_compiled": never_compiled(modules, kernels),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    options = parser.parse_args()
    main(options.capability, options.all, options.only)
