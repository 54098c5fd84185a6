"""What every op needs to call the C++ and CUDA kernels: raw pointers, dtype codes, rows."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmcore import _extension

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPE_CODE[tensor.dtype]


def view(tensor: Tensor | None) -> tuple[int, ...]:
    """Address, dtype code and up to four strides, as the kernels take a tensor of any layout; zeros for None. A
    fifth dimension is contiguous."""
    if tensor is None:
        return (0,) * 6
    strides = tensor.stride()[:4]
    return (tensor.data_ptr(), DTYPE_CODE.get(tensor.dtype, 0), *strides, *(0,) * (4 - len(strides)))


def module(backend: str) -> Any:
    return _extension.cpu() if backend == "cpu" else _extension.cuda()


def stream(backend: str, tensor: Tensor) -> tuple[int, ...]:
    """The trailing argument of a CUDA launcher; the CPU's take none."""
    return () if backend == "cpu" else (torch.cuda.current_stream(tensor.device).cuda_stream,)


def empty_like(tensor: Tensor) -> Tensor:
    """Contiguous, of tensor's shape and dtype: the cheapest way to such a tensor."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def gradients(needed: Sequence[bool], *inputs: Tensor) -> tuple[Tensor, ...]:
    """A place for each input's gradient; (0,) for those that nobody needs."""
    return tuple(empty_like(t) if need else t.new_empty(0) for t, need in zip(inputs, needed, strict=True))


def only(needed: Sequence[bool], results: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that are needed, for autograd, and None for the others."""
    return tuple(gradient if need else None for gradient, need in zip(results, needed, strict=True))


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself when its last dimension is contiguous, otherwise a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def rows(tensor: Tensor) -> Tensor:
    """(..., C) as (rows, C) with a contiguous last dimension: a view where the strides allow it, otherwise a copy."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return unit_stride(tensor)
