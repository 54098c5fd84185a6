"""The candidates of a slot in the order in which a GPU should time them, without a GPU.

Every candidate is compiled. Dropped are those that do not compile, need more shared memory than a program can have,
spill more than the incumbent does in the same launch, or lose a kind of instruction that the incumbent has (wgmma,
mma, bulk or asynchronous copies) and have no better one instead. The rest are ordered by the model, the geometric mean
over the launches that decide. The launches that only have to compile as well are compiled from the top of that order,
until enough have passed.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.compile.ahead_of_time import Compiled
from bench.compile.record import KINDS, RECORDS
from bench.tune.candidates import PROGRAM_SHARED_MEMORY, Slot, Values, slots
from bench.tune.launches import Launch, launches
from bench.tune.model import cycles
from bench.tune.workers import Outcome, Workers

FOLDER = RECORDS.parent / "tune"
# What may take the place of a kind of instruction.
BETTER = {"mma_sync": "wgmma", "async_copies": "bulk_copies"}
KEPT = 8
# Candidates that differ in nothing but warps and stages are kept up to this number, so that other tiles get a chance.
ALIKE = 3


def path_of(op: str, capability: int, folder: Path = FOLDER) -> Path:
    return folder / f"{op}-sm_{capability}-ranked.json"


def against(architecture: str, compiled: Outcome, incumbent: Outcome) -> str | None:
    """Why a launch of a candidate is no good: a few words, the same for all of a kind."""
    if isinstance(compiled, str):
        return re.sub(r"\d[\d.]*", "…", compiled)
    if any(kernel.shared > PROGRAM_SHARED_MEMORY[architecture] for kernel in compiled):
        return "more shared memory than a program can have"
    if isinstance(incumbent, str):
        return None
    for now, before in zip(compiled, incumbent, strict=True):
        if now.stack > before.stack:
            return "spills" if before.stack == 0 else "spills more than the incumbent"
        for kind in KINDS:
            better = getattr(now, BETTER.get(kind, kind))
            if getattr(before, kind) and not getattr(now, kind) and not better:
                return f"loses its {kind}"
    return None


def score(architecture: str, values: Values, found: Iterable[tuple[Launch, list[Compiled]]]) -> float:
    """The geometric mean of the model's cycles over every kernel of the launches."""
    logarithms = []
    for launch, compiled in found:
        assert launch.work
        work = launch.work(values)
        logarithms += [math.log(cycles(architecture, work[kernel.kernel], kernel)) for kernel in compiled]
    return math.exp(sum(logarithms) / len(logarithms))


def rounded(guess: float) -> float:
    return float(f"{guess:.4g}")


def facts(compiled: list[Compiled]) -> dict[str, Any]:
    """Of several kernels, the one that asks most of a thread."""
    worst = max(compiled, key=lambda kernel: (kernel.stack, kernel.registers))
    return {name: getattr(worst, name) for name in ("registers", "stack", "shared", "num_warps", "occupancy")}


def first_reason(architecture: str, row: Sequence[Outcome], incumbent: Sequence[Outcome]) -> str | None:
    return next(filter(None, (against(architecture, *pair) for pair in zip(row, incumbent, strict=True))), None)


def rank_slot(
    slot: Slot, architecture: str, workers: Workers, candidates: Sequence[Values] | None = None, top: int = KEPT
) -> dict[str, Any]:
    """The slot's row of the ranked file. candidates: the slot's own when None."""
    incumbent = slot.incumbent()
    every = list(dict.fromkeys([incumbent, *(slot.candidates if candidates is None else candidates)]))
    deciding = [launch for launch in launches(slot) if launch.work]
    others = [launch for launch in launches(slot) if not launch.work]

    def compile_all(chosen: Sequence[Values], which: Sequence[Launch]) -> list[list[Outcome]]:
        outcomes = workers.compile([(slot, values, launch.name) for values in chosen for launch in which])
        return [outcomes[i * len(which) : (i + 1) * len(which)] for i in range(len(chosen))]

    dropped: Counter[str] = Counter()
    order: list[tuple[float, Values, list[Compiled]]] = []
    rows = compile_all(every, deciding)
    for values, row in zip(every, rows, strict=True):
        reason = first_reason(architecture, row, rows[0])
        if reason is not None:
            dropped[reason] += 1
            continue
        kernels = [kernels for kernels in row if not isinstance(kernels, str)]
        guess = score(architecture, values, zip(deciding, kernels, strict=True))
        order.append((guess, values, [kernel for of_launch in kernels for kernel in of_launch]))
    order.sort(key=lambda entry: entry[0])
    (own,) = compile_all([incumbent], others)
    kept: list[dict[str, Any]] = []
    alike: Counter[Values] = Counter()
    for guess, values, kernels_of_all in order:
        if len(kept) == top:
            break
        if alike[slot.tile(values)] == ALIKE:
            continue
        (row,) = compile_all([values], others)
        reason = first_reason(architecture, row, own)
        if reason is not None:
            dropped[f"{reason} in another launch"] += 1
            continue
        alike[slot.tile(values)] += 1
        kept.append({"values": values, "cycles": rounded(guess), **facts(kernels_of_all)})
    places = {values: (place, rounded(guess)) for place, (guess, values, _) in enumerate(order, 1)}
    rank, guessed = places.get(incumbent, (None, None))
    names = [launch.name for launch in (*deciding, *others)]
    spills = {
        name: max(kernel.stack for kernel in compiled)
        for name, compiled in zip(names, (*rows[0], *own), strict=True)
        if not isinstance(compiled, str) and any(kernel.stack for kernel in compiled)
    }
    return {
        "incumbent": {"values": incumbent, "rank": rank, "cycles": guessed, "spills": spills},
        "candidates": len(every),
        "compiled well": len(order),
        "dropped": dict(dropped.most_common()),
        "ranked": kept,
    }


def rank(
    op: str, capability: int, workers: Workers, only: str = "", top: int = KEPT
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of the slot, its row) of each slot whose name holds `only`, as they come."""
    architecture = f"sm_{capability}"
    for slot in slots(op, architecture):
        if only in slot.name:
            yield slot.name, rank_slot(slot, architecture, workers, top=top)


def write(path: Path, head: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """One line for each candidate that was kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**head, "slots": {}}, indent=1)[: -len("{}\n}")]
    parts = []
    for name, row in rows.items():
        lines = ",\n".join(f"   {json.dumps(entry)}" for entry in row["ranked"])
        rest = "\n".join(f"  {json.dumps(k)}: {json.dumps(v)}," for k, v in row.items() if k != "ranked")
        parts.append(f'  {json.dumps(name)}: {{\n{rest}\n  "ranked": [\n{lines}\n  ]}}')
    path.write_text(text + "{\n" + ",\n".join(parts) + "\n }\n}\n")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
