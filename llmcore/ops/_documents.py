"""Documents packed into one sequence: what `cu_seqlens` and `seq_idx` mean, and their checks.

cu_seqlens: offsets from 0 to the length, one more than there are documents; a document may be empty.
seq_idx: for each step the number of its document.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor

from llmcore.ops import _checks

_CHECK_VALUES_ON_CUDA = os.environ.get("LLMCORE_CHECK") == "1"


def count(op: str, cu_seqlens: Tensor, x: Tensor, batch: int) -> int:
    """The number of documents in x, which is a batch of one sequence. Raises ValueError or TypeError."""
    _checks.is_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{op}: cu_seqlens has dtype {_checks.name_of(cu_seqlens.dtype)}; allowed: int32.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens must be (S + 1,) for S >= 1 documents, but its shape is {tuple(cu_seqlens.shape)}."
        )
    if batch != 1:
        raise ValueError(f"{op}: with cu_seqlens all documents are one sequence, but the batch has {batch}.")
    if cu_seqlens.device != x.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, but the input is on {x.device}.")
    return cu_seqlens.shape[0] - 1


def check_numbers(op: str, seq_idx: Tensor, x: Tensor, shape: tuple[int, int]) -> None:
    _checks.is_tensor(op, "seq_idx", seq_idx)
    if seq_idx.dtype != torch.int32:
        raise TypeError(f"{op}: seq_idx has dtype {_checks.name_of(seq_idx.dtype)}; allowed: int32.")
    _checks.shape(op, "seq_idx", seq_idx, "(B, L)", shape)
    _checks.like(op, "seq_idx", seq_idx, "x", x, dtype=False)


def values_are_checked(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or _CHECK_VALUES_ON_CUDA


def check_values(op: str, cu_seqlens: Tensor | None, length: int) -> None:
    """Raise a ValueError unless the offsets rise from 0 to `length`; on CUDA only with LLMCORE_CHECK=1."""
    if cu_seqlens is None or not values_are_checked(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != length or any(a > b for a, b in zip(offsets, offsets[1:], strict=False)):
        raise ValueError(
            f"{op}: cu_seqlens is {shown(offsets)}; allowed: offsets that start at 0, never fall and end at the "
            f"length, {length}."
        )


def shown(offsets: list[int]) -> str:
    return str(offsets) if len(offsets) <= 8 else f"[{', '.join(map(str, offsets[:4]))}, ..., {offsets[-1]}]"


def number(cu_seqlens: Tensor | None) -> int:
    """How many documents; 0 where sequences are not packed."""
    return 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1


class Spans:
    """Where each state of a call begins and ends: one for each document, or one for all sequences of the batch."""

    def __init__(self, cu_seqlens: Tensor | None, length: int) -> None:
        self.packed = cu_seqlens is not None
        self.offsets: list[int] = [0, length] if cu_seqlens is None else cu_seqlens.tolist()

    def of(self, t: int) -> tuple[int, int, slice]:
        """The first step, the end and the rows of the states to which step t belongs."""
        i = bisect_right(self.offsets, t) - 1
        return self.offsets[i], self.offsets[i + 1], slice(i, i + 1) if self.packed else slice(None)


def table(x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """(S, 5) int64 for the documents of x (B, L, ...): sequence, first step, end, and the rows of the states that it
    starts from and ends in, -1 for none. On CUDA the host waits for seq_idx."""
    batch, length = x.shape[:2]
    if seq_idx is None:
        rows = torch.arange(batch if cu_seqlens is None else len(cu_seqlens) - 1, device=x.device)
        if cu_seqlens is None:
            return torch.stack([rows, torch.zeros_like(rows), torch.full_like(rows, length), rows, rows], 1)
        return torch.stack([torch.zeros_like(rows), cu_seqlens[:-1].long(), cu_seqlens[1:].long(), rows, rows], 1)
    begins = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    row, first = begins.nonzero(as_tuple=True)
    follows = torch.cat([row[1:] == row[:-1], row.new_zeros(min(len(row), 1), dtype=torch.bool)])
    end = torch.where(follows, first.roll(-1), length)
    return torch.stack([row, first, end, torch.where(first == 0, row, -1), torch.where(follows, -1, row)], 1)


def spans(
    x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None
) -> Iterator[tuple[tuple[slice, slice], slice | None, slice | None]]:
    """Where x (B, L, ...) holds documents of one length: its part, and the rows of their first and last states."""
    if cu_seqlens is None and seq_idx is None:
        yield (slice(None), slice(None)), slice(None), slice(None)
        return
    for row, first, end, initial, last in table(x, cu_seqlens, seq_idx).tolist():
        if end > first:
            before, after = (slice(i, i + 1) if i >= 0 else None for i in (initial, last))
            yield (slice(row, row + 1), slice(first, end)), before, after
