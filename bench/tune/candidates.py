"""What can be tuned: the slots of each op, entries of its tables that are chosen together, and their candidates.

A slot is one entry of one architecture, or the two that decide one kernel between them. The candidates are products of
block sizes, warps and stages; those whose accumulators alone exceed the registers of their threads, or whose tiles on
their way alone exceed shared memory, are left out by arithmetic, so that nobody compiles them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from bench.tune.places import Place, value_at

Values = tuple[Any, ...]

# Bytes of shared memory that a program can have.
PROGRAM_SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448}
ACCUMULATOR_REGISTERS = 240


@dataclass(frozen=True)
class Slot:
    """kernels: those that the entry decides; part: the part of a training step in which they run; candidates: each one
    value for each place."""

    op: str
    name: str
    places: tuple[Place, ...]
    kernels: tuple[str, ...]
    part: Literal["forward", "backward", "both"]
    candidates: tuple[Values, ...]

    def tile(self, values: Values) -> Values:
        """The values without warps and stages."""
        return values[0][:2] if self.op == "attention" else values

    def incumbent(self) -> Values:
        return tuple(value_at(place) for place in self.places)


@dataclass(frozen=True)
class _Attention:
    """One of attention's tables: a program holds one block and streams the others past it."""

    name: str
    place: tuple[str, str]
    kernel: str
    part: Literal["forward", "backward"]
    held_is_m: bool
    accumulators: int  # of the held tile, in multiples of the head size
    scores: int  # float32 tiles of scores alive at once


ATTENTION = (
    _Attention("forward", ("attention_fwd", "CONFIGS"), "attention_fwd_kernel", "forward", True, 1, 1),
    _Attention("dk/dv", ("attention_bwd", "DKDV_CONFIGS"), "attention_bwd_dkdv_kernel", "backward", False, 2, 1),
    _Attention("dq", ("attention_bwd", "DQ_CONFIGS"), "attention_bwd_dq_kernel", "backward", True, 1, 2),
)
# By kind of product: held blocks, streamed blocks, warps, stages. Exact products keep their operands in registers:
# their tiles are small.
ATTENTION_SPACE = {
    "half": ((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)),
    "half by pointer": ((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)),
    "tf32": ((32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3)),
    "ieee": ((16, 32, 64, 128), (16, 32, 64), (4, 8), (1, 2)),
}


def bytes_of(kind: str) -> int:
    return 2 if kind.startswith("half") else 4


def _attention_candidates(table: _Attention, architecture: str, kind: str, size: int) -> Iterator[Values]:
    for held, stream, warps, stages in product(*ATTENTION_SPACE[kind]):
        if (
            kind.startswith("half") and stream < 32 and size <= 128
        ):  # narrow products are slow: only where nothing else fits
            continue
        floats = held * size * table.accumulators + held * stream * table.scores
        streamed = stages * stream * 2 * size * bytes_of(kind)
        if floats > ACCUMULATOR_REGISTERS * 32 * warps or streamed > PROGRAM_SHARED_MEMORY[architecture]:
            continue
        m, n = (held, stream) if table.held_is_m else (stream, held)
        yield ((m, n, warps, stages),)


def _attention(architecture: str) -> Iterator[Slot]:
    for table in ATTENTION:
        kinds = value_at(Place(*table.place, ()))
        for (row, kind), sizes in kinds.items():
            for size in sizes if row == architecture else ():
                yield Slot(
                    "attention", f"{table.name} {kind} {size}", (Place(*table.place, ((row, kind), size)),),
                    (table.kernel,), table.part, tuple(_attention_candidates(table, row, kind, size)),
                )  # fmt: skip


def _rms_norm(architecture: str) -> Iterator[Slot]:
    def tile(index: int) -> Place:
        return Place("rms_norm", "TILES", (architecture, index))

    elements = (1024, 2048, 4096, 8192, 16384)
    yield Slot("rms_norm", "forward", (tile(0),), ("rms_norm_fwd_kernel",), "forward", tuple((e,) for e in elements))
    shared = PROGRAM_SHARED_MEMORY[architecture] // 1024
    yield Slot(
        "rms_norm", "backward", (tile(1), Place("rms_norm", "PREFETCH_BYTES", (architecture,))),
        ("rms_norm_bwd_kernel", "rms_norm_bwd_weight_kernel"), "backward",
        tuple(product(elements, (0, *(part * shared // 8 // 8 * 8 * 1024 for part in (4, 6, 7))))),
    )  # fmt: skip
    yield Slot(
        "rms_norm", "wide rows", (tile(2),), ("rms_norm_fwd_wide_kernel", "rms_norm_bwd_wide_kernel"), "both",
        tuple((e,) for e in (2048, 4096, 8192, 16384, 32768)),
    )  # fmt: skip
    yield Slot(
        "rms_norm", "reduction", (tile(3),), ("rms_norm_bwd_reduce_kernel",), "backward",
        tuple((block,) for block in product((16, 32, 64, 128), (16, 32, 64, 128))),
    )  # fmt: skip


def _pieces(op: str, table: str, kernels: tuple[str, ...]) -> Callable[[str], Iterator[Slot]]:
    def slots(architecture: str) -> Iterator[Slot]:
        blocks = tuple((block,) for block in product((512, 1024, 2048, 4096, 8192), (2, 4, 8)))
        yield Slot(op, "pieces", (Place(op, table, (architecture,)),), kernels, "both", blocks)

    return slots


SLOTS: dict[str, Callable[[str], Iterator[Slot]]] = {
    "apply_rotary": _pieces("apply_rotary", "TILES", ("apply_rotary_kernel",)),
    "attention": _attention,
    "rms_norm": _rms_norm,
    "swiglu": _pieces("swiglu", "PIECES", ("swiglu_fwd_kernel", "swiglu_bwd_kernel")),
}


def slots(op: str, architecture: str) -> list[Slot]:
    return list(SLOTS[op](architecture))


def tupled(values: Any) -> Any:
    """What JSON made lists of, as tuples again."""
    return tuple(map(tupled, values)) if isinstance(values, list) else values
