"""A process that compiles one launch of one candidate at a time: python -m bench.tune.worker CAPABILITY.

Reads one request a line, {"op", "slot", "values", "launch"}, and answers each with one line, {"kernels": [...]} or
{"error": "..."}. A process of its own because the compiler can take it down, and because compiling replaces the driver.
"""

import dataclasses
import json
import os
import sys
from typing import Any

from bench.compile.ahead_of_time import compiler
from bench.tune.candidates import slots, tupled
from bench.tune.launches import by_name
from bench.tune.places import injected
from llmcore.kernels import device


def main(capability: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the compiler prints is no answer
    wanted: set[str] = set()
    compile_launch = compiler(capability, device, only=wanted)
    known = {}
    for line in sys.stdin:
        request = json.loads(line)
        op = request["op"]
        if op not in known:
            known[op] = {slot.name: (slot, by_name(slot)) for slot in slots(op, f"sm_{capability}")}
        slot, launches = known[op][request["slot"]]
        wanted.clear()
        wanted.update(slot.kernels)
        try:
            with injected(slot.places, tupled(request["values"])):
                compiled = compile_launch(request["launch"], launches[request["launch"]].call)
            answer: dict[str, Any] = {"kernels": [dataclasses.asdict(entry) for _, entry in compiled]}
        except Exception as error:  # whatever the compiler says against a candidate is the answer
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
