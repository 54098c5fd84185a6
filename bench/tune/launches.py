"""What a slot's entry decides: the launches that compile it, and what each asks of a multiprocessor.

The first launches of a slot, which have a `work`, are those the ranking is made by. The others only have to compile as
well as they do with the incumbent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from bench.compile import cases
from bench.tune.candidates import ATTENTION, Slot, Values, bytes_of
from bench.tune.model import Work

TIME = 4096
WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "sliding": (100, 0)}
# A smaller head size that the same entry serves, padded.
SMALLER = {32: (24, 24), 64: (40, 40), 128: (80, 80), 256: (192, 128)}
ROWS = 2**15


@dataclass(frozen=True)
class Launch:
    name: str
    call: Callable[[], object]
    work: Callable[[Values], dict[str, Work]] | None = None


def _attention_work(slot: Slot, architecture: str, kind: str, size: int, values: Values) -> dict[str, Work]:
    """Scores are what is useful. Each group of warps reads the streamed operand of each product from shared memory."""
    table = next(table for table in ATTENTION if slot.kernels == (table.kernel,))
    m, n, warps, stages = values[0]
    held, stream = (m, n) if table.held_is_m else (n, m)
    products = {"forward": 2, "dk/dv": 4, "dq": 3}[table.name]
    on_wgmma = architecture == "sm_90" and not kind.startswith("ieee")
    groups = max(held // 64, 1) if on_wgmma else min(warps, max(held // 16, 1))
    tile = size * bytes_of(kind)
    units = {
        kind.split()[0]: 2.0 * products * m * n * size,
        "exponentials": m * n,
        "floats": 7 * m * n,
        "shared": (products * groups * stream + (products // 2) * held) * tile,
        "L2": 2 * stream * tile,
    }
    useful = m * n / (1 + (m + n) / TIME)
    return {table.kernel: Work(useful, units, stages, TIME / 2 / stream)}


def _attention(slot: Slot) -> Iterator[Launch]:
    (architecture, kind), size = slot.places[0].path
    by_pointer = kind == "half by pointer" or (architecture != "sm_90" and kind == "half")
    dtype = torch.bfloat16 if kind.startswith("half") else torch.float32
    precision = "highest" if kind == "ieee" else "high"
    launch = partial(cases.launch_attention, dtype, by_pointer=by_pointer, precision=precision)
    work = partial(_attention_work, slot, architecture, kind, size)
    yield Launch(f"{size}/{size} causal", partial(launch, size, size, WINDOWS["causal"]), work)
    if size in SMALLER:
        yield Launch("{}/{} causal".format(*SMALLER[size]), partial(launch, *SMALLER[size], WINDOWS["causal"]))
    for window in ("full", "sliding") if kind.startswith("half") else ():
        yield Launch(f"{size}/{size} {window}", partial(launch, size, size, WINDOWS[window]))


def _row_work(
    elements: int, moved: int, kept: int = 1, stages: int = 1, steps: float = 1.0, most_programs: int = 32
) -> Work:
    """Memory decides: `moved` bytes for each of the tile's elements, which are read `kept` times in all."""
    units = {"DRAM": float(elements * moved), "floats": 12.0 * elements * kept, "L2": float(elements * moved * kept)}
    return Work(elements * moved, units, stages, steps, most_programs)


def _rms_norm_work(slot: Slot, cols: int, size: int, values: Values) -> dict[str, Work]:
    """With a residual, as blocks of a model call it: x, residual, y, s; and dy, ds, s, dx."""
    from llmcore.kernels import rms_norm

    if slot.name == "reduction":
        rows, columns = values[0]
        return {slot.kernels[0]: _row_work(rows * columns, 4, steps=2 * 132 / rows)}
    if slot.name == "wide rows":
        pieces = max(cols / values[0], 1.0)
        return {kernel: _row_work(values[0], 4 * size, 2, steps=pieces) for kernel in slot.kernels}
    block_cols = 1 << (cols - 1).bit_length()
    tile = max(values[0] // block_cols, 1) * block_cols
    if slot.name == "forward":
        return {slot.kernels[0]: _row_work(tile, 4 * size)}
    works = {}
    for kernel, elements, streamed in (
        (slot.kernels[0], tile, 3 + (block_cols > rms_norm.MAX_KEPT_WEIGHT)), (slot.kernels[1], values[0], 2),
    ):  # fmt: skip
        programs = 2 if elements <= 4096 else 1
        stages = 1 + min(values[1] // programs // (elements * streamed * size), 3)
        steps = ROWS * block_cols / elements / 132 / programs
        works[kernel] = _row_work(elements, (streamed + 1) * size, 1, stages, steps, programs)
    return works


def _rms_norm(slot: Slot) -> Iterator[Launch]:
    widths = {"wide rows": (32768, 65536), "backward": (1024, 4096, 16384, 65536)}.get(slot.name, (1024, 4096, 16384))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for cols in widths:
            work = partial(_rms_norm_work, slot, cols, dtype.itemsize) if name == "bf16" else None
            yield Launch(f"{name} {cols}", partial(cases.launch_rms_norm, dtype, cols, True), work)
        # The widest row held with its sums: what spills without a residual is not what spills with one.
        if slot.name == "backward":
            yield Launch(f"{name} 16384 alone", partial(cases.launch_rms_norm, dtype, 16384, False))


def _swiglu(slot: Slot) -> Iterator[Launch]:
    def work(size: int, values: Values) -> dict[str, Work]:
        forward, backward = slot.kernels
        return {forward: _row_work(values[0][0], 3 * size), backward: _row_work(values[0][0], 5 * size)}

    for name, dtype, cols in (("bf16", torch.bfloat16, 11008), ("fp32", torch.float32, 11008)):
        known = partial(work, dtype.itemsize) if name == "bf16" else None
        yield Launch(f"{name} {cols}", partial(cases.launch_swiglu, dtype, cols), known)
    yield Launch("bf16 1001", partial(cases.launch_swiglu, torch.bfloat16, 1001))


def _apply_rotary(slot: Slot) -> Iterator[Launch]:
    def work(size: int, values: Values) -> dict[str, Work]:
        return {slot.kernels[0]: _row_work(2 * values[0][0], 2 * size)}

    for D, R, interleaved in ((64, 64, False), (128, 128, False), (128, 128, True), (80, 40, False)):
        name = f"{D}/{R} {'interleaved' if interleaved else 'halves'}"
        known = partial(work, 2) if D == R and not interleaved else None
        yield Launch(f"bf16 {name}", partial(cases.launch_apply_rotary, torch.bfloat16, D, R, interleaved), known)
    yield Launch("fp32 128/128", partial(cases.launch_apply_rotary, torch.float32, 128, 128, False))


LAUNCHES: dict[str, Callable[[Slot], Iterator[Launch]]] = {
    "apply_rotary": _apply_rotary, "attention": _attention, "rms_norm": _rms_norm, "swiglu": _swiglu,
}  # fmt: skip


def launches(slot: Slot) -> list[Launch]:
    return list(LAUNCHES[slot.op](slot))


def by_name(slot: Slot) -> dict[str, Launch]:
    return {launch.name: launch for launch in launches(slot)}
