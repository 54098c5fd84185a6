"""Where the time of a step goes: a few steps under torch.profiler, as a trace and as a table of operations."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import TracebackType

from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList
from torch.profiler import profile, schedule

WARM_UP = 5  # steps before those that are recorded
ROWS = 20  # of a table
NAMED = 3  # operations in the sentence


class Profile:
    """Around the training loop: records `steps` steps, after the first few, on the first process, and writes
    run/profile (profile-2 and so on, where there is one from before a resume):

        trace.json   Chrome's format, for https://ui.perfetto.dev
        ops.txt      the operations that took most time themselves, on the CPU and on the GPU

    A run that ends while it records writes what there is. `say` gets one sentence of it, or of why nothing could be
    written.
    """

    def __init__(self, run: Path, steps: int, first: bool, say: Callable[[str], None]) -> None:
        self.run, self.say, self.steps, self.left = run, say, steps, WARM_UP + steps
        self.profiler: profile | None = None
        if steps and first:
            plan = schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=steps, repeat=1)
            self.profiler = profile(schedule=plan, on_trace_ready=self._write)

    def step(self) -> None:
        """A training step is over."""
        if self.profiler is None:
            return
        self.left -= 1
        self.profiler.step()
        if not self.left:
            self._end()

    def __enter__(self) -> "Profile":
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    def _write(self, profiler: profile) -> None:
        if self.left == self.steps:  # the run ends before the first step to record
            return
        names = (self.run / ("profile" if i == 1 else f"profile-{i}") for i in count(1))
        folder = next(path for path in names if not path.exists())
        averages = profiler.key_averages()
        clocks = ["self_cpu_time_total"]
        if any(event.self_device_time_total for event in averages):
            clocks.append("self_device_time_total")
        try:
            folder.mkdir()
            profiler.export_chrome_trace(str(folder / "trace.json"))
            text = "\n".join(averages.table(sort_by=clock, row_limit=ROWS) for clock in clocks)
            (folder / "ops.txt").write_text(text, encoding="utf-8")
        except OSError as error:
            self.say(f"profile: {folder} could not be written: {error.strerror}")
            return
        self.say(f"profile: {folder / 'ops.txt'} (top: {top(averages, clocks[-1])})")


def top(averages: EventList, clock: str) -> str:
    """The operations that took the largest shares of the time, such as aten::mm 43 %, aten::copy_ 8 %."""
    events = [event for event in averages if event.device_type == DeviceType.CPU]  # a GPU's kernels count for their ops
    total = sum(getattr(event, clock) for event in events) or 1
    ops = sorted((event for event in events if "::" in event.key), key=lambda event: -getattr(event, clock))
    return ", ".join(f"{op.key} {100 * getattr(op, clock) / total:.0f} %" for op in ops[:NAMED])
