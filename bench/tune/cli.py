"""python -m bench tune OP: choose the configurations of one op on the GPU that is here, or with --rank what to try.

--rank compiles every candidate ahead of time and writes bench/results/tune/OP-sm_XX-ranked.json. Without it the best of
that file are proven and timed beside the incumbents, the record goes to bench/results/DEVICE/tune-OP.json as it grows,
and winners into kernels/. The same command goes on where an earlier one stopped.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.compile.record import ROOT
from bench.machine import folder_name, machine

if TYPE_CHECKING:
    from bench.tune.candidates import Slot, Values

RESULTS = ROOT / "bench" / "results"


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
    if options.top < 1:
        parser().error(f"--top is {options.top}; it must be at least 1.")
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
        from bench.tune.rank import path_of

        path = path_of(options.op, capability, options.results / "tune" if options.results else RESULTS / "tune")
        rank_into(path, options, capability)
        if not options.dry_run:
            print(f"written: {path}")
        return 0
    if not options.rehearse and here is None:
        parser().error("there is no GPU here to time candidates on; --rank ranks them without one.")
    if not options.rehearse and here != capability:
        parser().error(f"the GPU here takes the tables' rows for sm_{here}, not sm_{capability}; --rank ranks any.")
    return sweep(options, capability)


def rank_into(path: Path, options: argparse.Namespace, capability: int) -> None:
    from bench.tune import rank
    from bench.tune.workers import Workers

    rows = rank.read(path)["slots"] if path.exists() else {}
    head = {"op": options.op, "architecture": f"sm_{capability}", "machine": machine()}
    with Workers(capability) as workers:
        for name, row in rank.rank(options.op, capability, workers, options.only, options.top):
            rows[name] = row
            print(line(name, row), flush=True)
            if not (options.rank and options.dry_run):
                rank.write(path, head, rows)


def sweep(options: argparse.Namespace, capability: int) -> int:
    from bench.tune import places, rank, table
    from bench.tune.candidates import slots, tupled
    from bench.tune.sweep import Broken, Settings, sweep_slot
    from llmcore.kernels import device

    path = rank.path_of(options.op, capability)
    wanted = [slot for slot in slots(options.op, f"sm_{capability}") if options.only in slot.name]
    if not path.exists() or any(slot.name not in rank.read(path)["slots"] for slot in wanted):
        print(f"{path} does not rank them all: ranking first", flush=True)
        rank_into(path, options, capability)
    ranked = rank.read(path)["slots"]
    settings = Settings(top=options.top, deadline=time.monotonic() + options.seconds)
    where = machine("cpu" if options.rehearse else "cuda")
    if options.rehearse:
        device.architecture = lambda device: f"sm_{capability}"
        settings = dataclasses.replace(settings, device="cpu", rounds=2, round_seconds=1e-4)
    record = (options.results or RESULTS) / folder_name(where) / f"tune-{options.op}.json"
    rows = json.loads(record.read_text())["records"] if record.exists() else []
    record.parent.mkdir(parents=True, exist_ok=True)
    chosen = {slot: [tupled(entry["values"]) for entry in ranked[slot.name]["ranked"]] for slot in wanted}
    if not options.rehearse:
        fill_cache(chosen, capability, options.top)
    wrong = False
    try:
        for slot, candidates in chosen.items():
            for row in sweep_slot(slot, candidates, rows, settings):
                if json.dumps(row) not in map(json.dumps, rows):  # a decision that an earlier run left unwritten
                    rows.append(row)
                record.write_text(json.dumps({"machine": where, "records": rows}, indent=1) + "\n")
                print(sentence(row), flush=True)
                wrong = wrong or row["what"] == "incumbent"
                if row.get("replaces") and not options.dry_run and not options.rehearse:
                    table.write(slot.places, row["values"])
                    places.put(slot.places, row["values"])
    except Broken as error:
        print(f"bench: the device no longer answers after {error}; the same command goes on after it.", file=sys.stderr)
        return 1
    if settings.late():
        print(f"stopped after {options.seconds:.0f} s; the same command goes on.")
    print(f"written: {record}")
    return 1 if wrong else 0


def fill_cache(chosen: "dict[Slot, list[Values]]", capability: int, top: int) -> None:
    """Compiles on all processors what the sweep would compile on one: Triton finds it in its cache on the disk."""
    from bench.tune.launches import launches
    from bench.tune.workers import Workers

    with Workers(capability) as workers:
        workers.compile(
            [
                (slot, values, launch.name)
                for slot, candidates in chosen.items()
                for values in dict.fromkeys([slot.incumbent(), *candidates[: top + 1]])
                for launch in launches(slot)
            ]
        )


def sentence(row: dict[str, Any]) -> str:
    name = f"{row['slot']:28} {row['what']:14} {row['values']}"
    if "error" in row:
        return f"{name} WRONG: {row['error']}"
    if "timed" in row:
        times = "; ".join(f"{r['case']}: {r['ratio']:.3f} ± {r['noise']:.3f}" for r in row["timed"])
        return f"{name} over the incumbent's time: {times}"
    return f"{name} {'wins' if row['replaces'] else 'stays; no candidate is faster beyond noise'}"


def line(name: str, row: dict[str, Any]) -> str:
    incumbent = row["incumbent"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in row["dropped"].items())
    best = row["ranked"][0]["values"] if row["ranked"] else None
    return (
        f"{name:28} {row['candidates']:3} candidates, {row['compiled well']:3} compile well; incumbent "
        f"{incumbent['values']} is number {incumbent['rank']}, first is {best}; dropped: {dropped or 'none'}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
