"""Batches made ahead of their step, in threads: reading from a slow disk, or mixing texts, costs the loop no time."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Prefetch:
    """This rank's slices of `batches`, a pure function of (step, rank, world_size) such as Batches, on `device`.

    `workers` threads prepare the batches of the next `ahead` steps, in pinned memory if they are for a GPU. Without
    workers a batch is made when it is asked for. The bits are the same, and steps may be asked for in any order.
    """

    def __init__(
        self,
        batches: Callable[[int, int, int], Batch],
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
        ahead: int = 2,
    ) -> None:
        self.batches, self.device, self.rank, self.world_size, self.ahead = batches, device, rank, world_size, ahead
        self.coming: dict[int, Future[Batch]] = {}
        self.pool: ThreadPoolExecutor | None = None
        if workers:
            # or pinning would open a context on the first GPU for every rank
            start = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
            self.pool = ThreadPoolExecutor(workers, "batches", *start)

    def __call__(self, step: int) -> Batch:
        """Inputs and targets. What goes wrong in a worker is raised here, at the step that it belongs to."""
        inputs, targets = self._prepare(step) if self.pool is None else self._take(step, self.pool)
        # does not wait for the GPU, as PyTorch keeps pinned memory until the copy is made
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Wait for the threads to end; a batch that no thread has begun is not made any more."""
        self.coming.clear()
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _take(self, step: int, pool: ThreadPoolExecutor) -> Batch:
        wanted = range(step, step + self.ahead + 1)
        for other in self.coming.keys() - set(wanted):  # after a jump
            self.coming.pop(other).cancel()
        for coming in wanted:
            if coming not in self.coming:
                self.coming[coming] = pool.submit(self._prepare, coming)
        return self.coming.pop(step).result()

    def _prepare(self, step: int) -> Batch:
        inputs, targets = self.batches(step, self.rank, self.world_size)
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs, targets
