"""Compiles many candidates in several processes, and outlives those that the compiler takes down or never leaves."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.compile.ahead_of_time import Compiled
from bench.compile.record import ROOT
from bench.tune.candidates import Slot, Values

# Seconds. What takes longer to compile is no candidate: somebody would wait for it at the first call.
LIMIT = 120.0

Outcome = list[Compiled] | str


class Workers:
    """compile() may be called from several threads; each has a process of its own."""

    def __init__(self, capability: int, processes: int | None = None) -> None:
        self.capability = capability
        self.processes = processes or os.cpu_count() or 1
        self._own = threading.local()
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Workers":
        self._pool = ThreadPoolExecutor(self.processes)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for process in self._started:
            process.kill()
            process.communicate()

    def compile(self, requests: Sequence[tuple[Slot, Values, str]]) -> list[Outcome]:
        """What each (slot, values, name of a launch) compiles to, or one clause on why it does not."""
        return list(self._pool.map(self._one, requests))

    def _process(self) -> subprocess.Popen[str]:
        process = getattr(self._own, "process", None)
        if process is None or process.poll() is not None:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.tune.worker", str(self.capability)], cwd=ROOT, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._own.process = process
            self._started.append(process)
        return process

    def _one(self, request: tuple[Slot, Values, str]) -> Outcome:
        slot, values, launch = request
        process = self._process()
        assert process.stdin and process.stdout
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        try:
            line = json.dumps({"op": slot.op, "slot": slot.name, "values": values, "launch": launch})
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline() or "null") or self._gone(process)
        except BrokenPipeError:
            answer = self._gone(process)
        finally:
            timer.cancel()
        return answer["error"] if "error" in answer else [Compiled(**kernel) for kernel in answer["kernels"]]

    def _gone(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        code = process.wait()
        return {"error": f"the compiler took more than {LIMIT:.0f} s" if code == -9 else f"the compiler died ({code})"}
