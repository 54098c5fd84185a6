"""python -m bench ops [NAME ...] | overhead | step | race | compile: measure, print, and write a record under
bench/results/. compile needs no GPU: what the compilers make of the GPU kernels. report: tables and plots of the
records. compare OLD NEW: what has become slower between two records of ops. tune OP: choose the configurations of an
op's kernels (python -m bench tune --help)."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from bench import compare, report
from bench.compile.record import ROOT, write_all
from bench.timing import folder_name, keep_freed_memory, machine
from llmcore.ops import registry

RESULTS = ROOT / "bench" / "results"


def main() -> int:
    if sys.argv[1:2] == ["tune"]:
        from bench.tune import cli

        return cli.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", choices=("ops", "overhead", "step", "race", "compile", "report", "compare", "tune"))
    parser.add_argument("names", nargs="*", help="ops: only these; compare: two records")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="ops: where to measure")
    parser.add_argument("--short", action="store_true", help="ops: the short set")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the records")
    parser.add_argument("--resume", action="store_true", help="ops: go on with the record that is there")
    parser.add_argument("--seconds", type=float, default=240.0, help="race: training time of each model")
    options = parser.parse_args()
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
    unknown = [name for name in options.names if name not in registry]
    if unknown:
        parser.error(f"{unknown[0]} is not an op; allowed: {', '.join(sorted(registry))}.")
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run = importlib.import_module(f"bench.run_{options.what}").run
    where = machine(options.device)
    folder = options.results / folder_name(where)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("-".join([options.what, *options.names]) + ".json")
    records = json.loads(path.read_text())["records"] if options.resume and path.exists() else []
    done = {(r["op"], r["case"]) for r in records if "op" in r and r.get("pass") != "forward"}
    arguments = {"ops": (options.names, options.device, options.short, done), "race": (options.seconds,)}
    for record in run(*arguments.get(options.what, ())):
        records.append(record)  # written as they come: a run that is cut short keeps what it measured
        path.write_text(json.dumps({"machine": where, "records": records}, indent=1) + "\n")
    print(f"written: {path}")
    return 1 if any("error" in r for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
