"""What a slot's candidates are timed on and proven on: the shapes of the op benchmarks.

Proven is every candidate on odd sizes, whose last tiles are ragged, small enough for the float64 reference.
"""

import dataclasses
from collections.abc import Iterator

import torch

from bench.ops import Case, bench_apply_rotary, bench_attention, bench_rms_norm, bench_swiglu
from bench.tune.candidates import Slot


def _broadcast(case: Case) -> Case:
    """Keys and values of one batch for all, which no descriptor describes."""

    def inputs(device: str):
        made = case.inputs(device)
        return {n: t.detach()[:1].requires_grad_() if n in ("k", "v") else t for n, t in made.items()}

    def expanded(function):
        def call(q, k, v, causal):
            return function(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1), causal)

        return call

    return dataclasses.replace(
        case, ours=expanded(case.ours), reference=expanded(case.reference), inputs=inputs, check=None
    )


def _attention(slot: Slot, device: str) -> Iterator[Case]:
    (_, kind), size = slot.places[0].path
    heads = max(2048 // size, 8)
    half = torch.bfloat16 if device == "cuda" else torch.float16  # the interpreter's bfloat16 is not the hardware's
    dtype = half if kind.startswith("half") else torch.float32
    shapes = [(4, 4096, heads, heads // 4, True), (4, 4096, heads, heads // 4, False)]
    if device != "cuda":
        shapes = [(2, 128, 2, 1, True)]
    for B, T, H, K, causal in shapes:
        timed = bench_attention.case(B, T, H, K, size, dtype, causal)
        odd = bench_attention.case(2, 1021 if device == "cuda" else 83, 2, 1, size, dtype, causal)
        if kind == "half by pointer":
            timed, odd = _broadcast(timed), _broadcast(odd)
        yield dataclasses.replace(timed, check=odd.inputs)


def _rms_norm(slot: Slot, device: str) -> Iterator[Case]:
    if device != "cuda":
        yield bench_rms_norm.case(11, 17000 if slot.name == "wide rows" else 200, torch.float32, residual=True)
        return
    shapes = {
        "wide rows": [(2**12, 32768), (2**11, 65536)],
        "reduction": [(2048, 1024), (2048, 8192)],
        "backward": [(2**17, 1024), (2**15, 4096), (2**13, 16384), (2**11, 65536)],
    }.get(slot.name, [(2**17, 1024), (2**15, 4096), (2**13, 16384)])
    for rows, cols in shapes:
        case = bench_rms_norm.case(rows, cols, torch.bfloat16, residual=True)
        yield dataclasses.replace(case, check=bench_rms_norm.case(67, cols - 3, torch.bfloat16, residual=True).inputs)


def _swiglu(slot: Slot, device: str) -> Iterator[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for shape in ((16384, 8192), (16384, 11008)) if device == "cuda" else ((3, 100),):
        timed = bench_swiglu.case(*shape, dtype)
        yield dataclasses.replace(timed, check=bench_swiglu.case(67, shape[1] - 3, dtype).inputs)


def _apply_rotary(slot: Slot, device: str) -> Iterator[Case]:
    if device != "cuda":
        yield bench_apply_rotary.case(2, 21, 3, 1, 24, torch.float32)
        return
    for B, H, K, D in ((8, 32, 8, 128), (16, 32, 4, 64)):
        timed = bench_apply_rotary.case(B, 4096, H, K, D, torch.bfloat16)
        yield dataclasses.replace(timed, check=bench_apply_rotary.case(2, 251, H - 1, K, D, torch.bfloat16).inputs)


WORKLOADS = {"apply_rotary": _apply_rotary, "attention": _attention, "rms_norm": _rms_norm, "swiglu": _swiglu}


def workloads(slot: Slot, device: str) -> list[Case]:
    return list(WORKLOADS[slot.op](slot, device))


def precision(slot: Slot) -> str:
    """What float32 products are to be, as torch.set_float32_matmul_precision takes it."""
    return "high" if " tf32 " in slot.name else "highest"
