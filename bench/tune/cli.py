"""python -m bench tune OP: choose the configurations of one op on the GPU that is here; with --rank, what to try, without one.

--rank compiles every candidate ahead of time and writes bench/results/tune/OP-sm_XX-ranked.json. Without it the best of
that file are proven and timed beside the incumbents, the record goes to bench/results/DEVICE/tune-OP.json as it grows,
and winners into kernels/. The same command goes on where an earlier one stopped.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.timing import machine


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    made.add_argument("op")
    made.add_argument("--rank", action="store_true", help="only compile and rank, which needs no GPU")
    made.add_argument("--capability", type=int, help="of the GPU: 80, 86 or 90 (default: the one here, else 90)")
    made.add_argument("--only", default="", metavar="TEXT", help="slots whose name holds this, like 'half'")
    made.add_argument("--top", type=int, default=8, help="candidates of a slot: to keep with --rank, else to time")
    made.add_argument("--seconds", type=float, default=1500.0, help="begin no candidate after this time")
    made.add_argument("--dry-run", action="store_true", help="leave the tables (with --rank: the ranked file) alone")
    made.add_argument("--rehearse", action="store_true", help="sweep in Triton's interpreter, tiny; leaves the tables")
    made.add_argument("--results", type=Path, help="the folder of the records")
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from bench.tune.candidates import PROGRAM_SHARED_MEMORY, SLOTS, slots

    if options.op not in SLOTS:
        parser().error(f"{options.op} has no tables to tune; allowed: {', '.join(sorted(SLOTS))}.")
    here = None
    if torch.cuda.is_available():
        from llmcore.kernels import device

        here = int(device.architecture(torch.device("cuda")).removeprefix("sm_"))
    capability = options.capability or here or 90
    allowed = [name.removeprefix("sm_") for name in PROGRAM_SHARED_MEMORY]
    if str(capability) not in allowed:
        parser().error(f"--capability is {capability}; the tables have rows for {', '.join(allowed)}.")
    if not any(options.only in slot.name for slot in slots(options.op, f"sm_{capability}")):
        names = ", ".join(slot.name for slot in slots(options.op, f"sm_{capability}"))
        parser().error(f"no slot of {options.op} holds {options.only!r}; there are: {names}.")
    if options.rank:
        return rank(options, capability)
    if not options.rehearse and here is None:
        parser().error("there is no GPU here to time candidates on; --rank ranks them without one.")
    if not options.rehearse and here != capability:
        parser().error(f"the GPU here takes the tables' rows for sm_{here}, not sm_{capability}; --rank ranks any.")
    return sweep(options, capability)


def rank(options: argparse.Namespace, capability: int) -> int:
    from bench.tune import rank
    from bench.tune.workers import Workers

    path = rank.path_of(options.op, capability, *([options.results] if options.results else []))
    rows = rank.read(path)["slots"] if options.only and path.exists() else {}
    head = {"op": options.op, "architecture": f"sm_{capability}", "machine": machine()}
    with Workers(capability) as workers:
        for name, row in rank.rank(options.op, capability, workers, options.only, options.top):
            rows[name] = row
            print(line(name, row), flush=True)
            if not options.dry_run:
                rank.write(path, head, rows)
    if not options.dry_run:
        print(f"written: {path}")
    return 0


def line(name: str, row: dict) -> str:
    incumbent = row["incumbent"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in row["dropped"].items())
    best = row["ranked"][0]["values"] if row["ranked"] else None
    return (
        f"{name:28} {row['candidates']:3} candidates, {row['compiled well']:3} compile well; incumbent "
        f"{incumbent['values']} is number {incumbent['rank']}, first is {best}; dropped: {dropped or 'none'}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
