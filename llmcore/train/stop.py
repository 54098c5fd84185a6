"""Ctrl-C, and the SIGTERM of a launcher or a cluster: the step is finished and saved before the run ends."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run has ended at a signal, after a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Inside the block a signal is only noted, as `number`; a second Ctrl-C interrupts at once if the process is alone
    (a launcher passes on to its processes what the terminal has sent them already)."""

    def __init__(self, alone: bool) -> None:
        self.alone, self.number = alone, 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.alone and self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
