"""python -m bench VERB: measure, print, and write a record under bench/results/, or read the records.

measure: ops [NAME ...], errors [NAME ...], overhead, step, hugging_face, loop, scaling, lengths, race, curves,
mine CONFIG (a preset, a training configuration or a Hugging Face config.json); compile needs no GPU: what the
compilers make of the GPU kernels.
read: report (tables and plots of the records), compare OLD NEW (what has become slower between two records of ops).
tune OP: choose the configurations of an op's kernels (python -m bench tune --help).
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import compare, report
from bench.compile.record import ROOT, write_all
from bench.machine import folder_name, machine, plain
from bench.mine import cases_of_model, read_shapes
from bench.timing import keep_freed_memory
from llmcore.ops import registry

RESULTS = ROOT / "bench" / "results"
MEASURING = (
    "ops",
    "errors",
    "overhead",
    "step",
    "hugging_face",
    "loop",
    "scaling",
    "lengths",
    "race",
    "curves",
    "mine",
)
VERBS = (*MEASURING, "compile", "report", "compare", "tune")
DTYPES = ("float32", "bfloat16", "float16")


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", metavar="VERB", choices=VERBS, help=", ".join(VERBS))
    parser.add_argument("names", nargs="*", help="ops, errors: only these; compare: two records; mine: the model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="ops, errors, mine: where to measure")
    parser.add_argument("--short", action="store_true", help="ops: the short set")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the records")
    parser.add_argument("--resume", action="store_true", help="ops, curves: go on with the record that is there")
    parser.add_argument("--seconds", type=float, default=240.0, help="race: training time of each model")
    parser.add_argument("--steps", type=int, default=2000, help="curves: training steps of each run")
    parser.add_argument("--batch_size", type=int, default=1, help="mine: sequences")
    parser.add_argument("--seq_len", type=int, default=2048, help="mine: tokens of each sequence")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="mine: of the tensors")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, 1 where something measured is wrong or slower, 2 for arguments that are not allowed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["tune"]:
        from bench.tune import cli

        return cli.main(arguments[1:])
    parser = parser_of()
    options = parser.parse_args(arguments)
    if options.what == "compare":
        if len(options.names) != 2:
            parser.error(f"compare takes two records, old and new, but {len(options.names)} were given.")
        return compare.main(*map(Path, options.names))
    if options.what == "report":
        return report.main(ROOT, options.results)
    if options.what == "compile":
        for path in write_all(sorted((ROOT / "csrc" / "cuda").glob("*.cu"))):
            print(f"written: {path.relative_to(ROOT)}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch sees no GPU; allowed here: cpu.")
    if options.what == "mine" and len(options.names) != 1:
        parser.error(f"mine takes one model, but {len(options.names)} were given.")
    unknown = [] if options.what == "mine" else [name for name in options.names if name not in registry]
    if unknown:
        parser.error(f"{unknown[0]} is not an op; allowed: {', '.join(sorted(registry))}.")
    for name in ("threads", "steps", "batch_size", "seq_len"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; allowed: whole numbers from 1.")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    where = machine(options.device)
    path = path_of(options, where)
    records = json.loads(path.read_text())["records"] if options.resume and path.exists() else []
    try:
        measuring = measurements(options, records)
    except ValueError as error:
        parser.error(str(error))
    path.parent.mkdir(parents=True, exist_ok=True)
    for record in measuring:
        row = row_of(record)
        records = [r for r in records if row is None or row_of(r) != row]
        records.append(record)  # written as they come: a run that is cut short keeps what it measured
        path.write_text(json.dumps({"machine": where, "records": records}, indent=1) + "\n")
    print(f"written: {path}")
    return 1 if any("error" in r for r in records) else 0


def row_of(record: dict[str, Any]) -> tuple[Any, ...] | None:
    """Which row of a record of ops this is: measured again, it takes the old one's place."""
    return (record["op"], record["case"], record.get("pass")) if "op" in record else None


def path_of(options: argparse.Namespace, where: dict[str, Any]) -> Path:
    """The record's file: bench/results/DEVICE/VERB[-NAMES].json."""
    names = [plain(name) for name in options.names]
    if options.what == "mine":
        model = Path(options.names[0])
        named = model.parent.resolve().name if model.name == "config.json" else model.stem
        names = [plain(named), f"{options.batch_size}x{options.seq_len}", options.dtype]
    return options.results / folder_name(where) / ("-".join([options.what, *names]) + ".json")


def measurements(options: argparse.Namespace, records: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """What the verb measures and `records` lacks. Raises ValueError with a sentence for a model that cannot be read."""
    done = {(r["op"], r["case"]) for r in records if "op" in r and r.get("pass") != "forward"}
    run = importlib.import_module(f"bench.run_{'ops' if options.what == 'mine' else options.what}")
    if options.what == "mine":
        config, dtype = read_shapes(options.names[0]), getattr(torch, options.dtype)
        cases = cases_of_model(config, options.batch_size, options.seq_len, dtype, options.device)
        return run.run_cases(cases, options.device, done)
    arguments = {
        "ops": (options.names, options.device, options.short, done),
        "errors": (options.names, options.device),
        "race": (options.seconds,),
        "curves": (options.steps, {r["name"] for r in records if "name" in r}),
    }
    return run.run(*arguments.get(options.what, ()))


if __name__ == "__main__":
    sys.exit(main())
