"""Checkpoints are written in the background: training goes on while the first process's thread hashes and flushes.

A save that fails ends the run at the step that is being made: no step is trained that could not be gone back from.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from llmcore import models
from llmcore.train.best import Best
from llmcore.train.checkpoint import SaveError, Snapshot, save_checkpoint, tidy
from llmcore.train.distributed import World


class Saver:
    """One checkpoint at a time. All ranks call `save` and `finish`; rank 0 writes."""

    def __init__(
        self, run: Path, world: World, model: models.ModelConfig, keep: int | None, say: Callable[[str], None]
    ) -> None:
        self.run, self.world, self.model, self.keep, self.say = run, world, model, keep, say
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[Path] | None = None

    def save(self, step: int, snapshot: Snapshot, facts: dict[str, Any], best: Best) -> None:
        """Begin to write run/step_N, after the one before is done, and then delete what is no longer kept."""
        self.finish()
        if self.world.rank == 0:
            self.pending = self.thread.submit(self._write, step, snapshot, facts, Best(**vars(best)))

    def poll(self) -> bool:
        """Whether the save that is under way is known to have failed; if it is done, that is said."""
        if self.pending is None or not self.pending.done():
            return False
        if self.pending.exception() is not None:
            return True
        path, self.pending = self.pending.result(), None
        self.say(f"checkpoint: {path}")
        return False

    def finish(self) -> None:
        """Wait for what is being written. Raises SaveError, on all ranks, if it could not be."""
        self.world.on_first(lambda: self.pending.result() if self.pending is not None else None)
        self.poll()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.thread.shutdown()  # what is being written when an error ends the run is still completed

    def _write(self, step: int, snapshot: Snapshot, facts: dict[str, Any], best: Best) -> Path:
        path = save_checkpoint(self.run, step, snapshot, self.model, facts)
        try:
            tidy(self.run, self.keep, best)
        except OSError as error:
            raise SaveError(f"old checkpoints in {self.run} could not be deleted: {error.strerror}") from error
        return path
