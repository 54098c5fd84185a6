"""grouped_gemm: a matrix product for each group of rows, with the group's own weight.

    y[rows of group e] = x[rows of group e] @ w[e].T
Backward:   dx[rows of e] = dy[rows of e] @ w[e]        dw[e] = dy[rows of e].T @ x[rows of e]
Saved: the inputs.

T rows, E groups, C inputs, F outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcore.ops import _checks, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._documents import shown, values_are_checked
from llmcore.ops._experts import few_shapes, groups, product_into, zero_of_no_rows
from llmcore.ops._library import operator, public

OP = Op("grouped_gemm", kernels=("triton",))


def reference(x: Tensor, w: Tensor, group_sizes: Tensor) -> Tensor:
    parts = x.split(group_sizes.tolist())
    return torch.cat([part @ weight.T for part, weight in zip(parts, w, strict=True)])


@public(reference)
def grouped_gemm(x: Tensor, w: Tensor, group_sizes: Tensor) -> Tensor:
    """The products of groups of rows with a weight for each group. Sums are taken in float32.

    Args:
        x: (T, C), float32, bfloat16 or float16 (float64 on the torch backend), sorted by group.
        w: (E, F, C), x's dtype.
        group_sizes: (E,) int32 or int64, the rows of each group, 0 and 1 among them; their sum is T.

    Under autocast x and w are cast to its dtype.

    Returns:
        (T, F) in x's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, sizes that are negative or do not sum to T (on CUDA only with
            LLMCORE_CHECK=1; rows beyond the sum are NaN there). TypeError: a dtype that is not allowed.
    """
    for name, tensor, dims, rank in (("x", x, "(T, C)", 2), ("w", w, "(E, F, C)", 3)):
        _checks.floating("grouped_gemm", name, tensor)
        _checks.rank("grouped_gemm", name, tensor, dims, rank)
    x, w = _checks.autocast(x, w)
    _checks.like("grouped_gemm", "w", w, "x", x)
    _checks.shape("grouped_gemm", "w", w, "(E, F, C)", (*w.shape[:2], x.shape[1]))
    _checks.is_tensor("grouped_gemm", "group_sizes", group_sizes)
    if group_sizes.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"grouped_gemm: group_sizes has dtype {_checks.name_of(group_sizes.dtype)}; allowed: int32, int64."
        )
    _checks.shape("grouped_gemm", "group_sizes", group_sizes, "(E,)", (w.shape[0],))
    _checks.like("grouped_gemm", "group_sizes", group_sizes, "x", x, dtype=False)
    if x.shape[0] >= 2**31:
        raise ValueError(f"grouped_gemm: x has {x.shape[0]} rows; allowed: fewer than 2**31.")
    return _grouped_gemm(x, w, group_sizes, resolve("grouped_gemm", x))


def _offsets(group_sizes: Tensor, rows: int) -> Tensor:
    """(E + 1,) int32, where the groups begin, and their end."""
    if values_are_checked(group_sizes):
        sizes = group_sizes.tolist()
        if any(size < 0 for size in sizes) or sum(sizes) != rows:
            raise ValueError(
                f"grouped_gemm: group_sizes is {shown(sizes)} with the sum {sum(sizes)}; allowed: sizes from 0 whose "
                f"sum is x's {rows} rows."
            )
    # Sizes that have not been looked at lead nowhere outside of x.
    ends = group_sizes.clamp(min=0).cumsum(0).clamp(max=rows)
    return torch.cat([ends.new_zeros(1), ends]).int()


def _forward(x: Tensor, w: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    offsets = _offsets(group_sizes, x.shape[0])
    y = x.new_empty(x.shape[0], w.shape[1])
    if backend == "triton":
        from llmcore.kernels import grouped_gemm as kernel

        kernel.rows_times_weights(x, w, offsets, y)
        return y
    end = 0
    with torch.autocast(x.device.type, enabled=False):
        for e, begin, end in groups(offsets):
            product_into(y, begin, _rows(x, begin, end), w[e].T)
    y[end:] = torch.nan  # rows of no group
    return y


def _rows(t: Tensor, begin: int, end: int) -> Tensor:
    """The rows from begin to end, and perhaps some of the next groups."""
    count = few_shapes(end - begin, t.dtype)
    if begin + count <= len(t):
        return t[begin : begin + count]
    return F.pad(t[begin:end], (0, 0, 0, begin + count - end))


def _rows_alone(t: Tensor, begin: int, end: int) -> Tensor:
    """The rows from begin to end, and perhaps zeros."""
    more = few_shapes(end - begin, t.dtype) - (end - begin)
    return F.pad(t[begin:end], (0, 0, 0, more)) if more else t[begin:end]


def _fake(x: Tensor, w: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


def _backward(
    dy: Tensor, x: Tensor, w: Tensor, group_sizes: Tensor, needed: Sequence[bool], backend: str
) -> tuple[Tensor, ...]:
    offsets = _offsets(group_sizes, x.shape[0])
    dx, dw = results = _native.gradients(needed, x, w)
    need_dx, need_dw = needed
    if backend == "triton":
        from llmcore.kernels import grouped_gemm as kernel

        if need_dx:
            kernel.rows_times_weights(dy, w.transpose(1, 2), offsets, dx)
        if need_dw:
            kernel.rows_times_rows(dy, x, offsets, dw)
        return results
    if need_dw:
        zero_of_no_rows(offsets, dw)
    end = 0
    with torch.autocast(x.device.type, enabled=False):
        for e, begin, end in groups(offsets):
            if need_dx:
                product_into(dx, begin, _rows(dy, begin, end), w[e])
            if need_dw:
                torch.mm(_rows_alone(dy, begin, end).T, _rows_alone(x, begin, end), out=dw[e])
    if need_dx:
        dx[end:] = torch.nan
    return results


def _backward_fake(
    dy: Tensor, x: Tensor, w: Tensor, group_sizes: Tensor, needed: Sequence[bool], backend: str
) -> tuple[Tensor, ...]:
    return _native.gradients(needed, x, w)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    needed = ctx.needs_input_grad[:2]
    gradients = _grouped_gemm_backward(dy, *ctx.saved_tensors, needed, ctx.backend)
    return *_native.only(needed, gradients), None, None


_grouped_gemm = operator(
    "grouped_gemm(Tensor x, Tensor w, Tensor group_sizes, str backend) -> Tensor", _forward, _fake, _save,
    _differentiate,
)  # fmt: skip
_grouped_gemm_backward = operator(
    "grouped_gemm_backward(Tensor dy, Tensor x, Tensor w, Tensor group_sizes, bool[2] needed, str backend) -> "
    "(Tensor dx, Tensor dw)",
    _backward,
    _backward_fake,
)
