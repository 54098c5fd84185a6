"""python -m bench ops [NAME ...] | overhead | step | race | compile: measure, print, and write a record under
bench/results/. compile needs no GPU: what the compilers make of the GPU kernels."""

import argparse
import importlib
import json
import re
import sys

import torch

from bench.compile.record import ROOT, write_all
from bench.timing import keep_freed_memory, machine

RESULTS = ROOT / "bench" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", choices=("ops", "overhead", "step", "race", "compile"))
    parser.add_argument("names", nargs="*", help="ops: only these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=240.0, help="race: training time of each model")
    options = parser.parse_args()
    if options.what == "compile":
        for path in write_all(sorted((ROOT / "csrc" / "cuda").glob("*.cu"))):
            print(f"written: {path.relative_to(ROOT)}")
        return 0
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run = importlib.import_module(f"bench.run_{options.what}").run
    arguments = {"ops": (options.names,), "race": (options.seconds,)}.get(options.what, ())
    where = machine()
    device = re.sub(r"[^a-z0-9]+", "-", str(where["processor"]).lower()).strip("-")
    folder = RESULTS / f"{device}-{options.threads}-threads"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("-".join([options.what, *options.names]) + ".json")
    records = []
    for record in run(*arguments):  # written as they come: a run that is cut short keeps what it measured
        records.append(record)
        path.write_text(json.dumps({"machine": where, "records": records}, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")
    return 1 if any("error" in r for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
