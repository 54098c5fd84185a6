"""Argument checks: each raises one sentence with the argument's name, what was given and what is allowed."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, but a {type(value).__name__} was given.")


def floating(op: str, name: str, tensor: Tensor) -> None:
    is_tensor(op, name, tensor)
    if tensor.dtype not in FLOATS:
        allowed = ", ".join(map(name_of, FLOATS))
        raise TypeError(f"{op}: {name} has dtype {name_of(tensor.dtype)}; allowed: {allowed}.")


def rank(op: str, name: str, tensor: Tensor, dims: str, count: int) -> None:
    if tensor.dim() != count:
        raise ValueError(f"{op}: {name} must be {dims}, but its shape is {tuple(tensor.shape)}.")


def number(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} is {value!r}; allowed: a number.")


def shape(op: str, name: str, tensor: Tensor, dims: str, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} must be {dims} = {tuple(expected)}, but its shape is {tuple(tensor.shape)}.")


def like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """tensor lives on other's device and, when `dtype`, has its dtype."""
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, but {other_name} is on {other.device}; both must be on one device."
        )
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} has dtype {name_of(tensor.dtype)}, but {other_name} has {name_of(other.dtype)}; "
            "both must have the same dtype."
        )


def at_most_as_wide(t: Tensor, x: Tensor) -> Tensor:
    """The kernels read any dtype that they compute in, beside an x of any; float64 is the reference's own."""
    return t.float() if t.dtype == torch.float64 and x.dtype != torch.float64 else t


def autocast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The operands of a matrix product, in the dtype of the autocast that is in force, if one is."""
    tensors = (x, *others)
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) for t in tensors)
