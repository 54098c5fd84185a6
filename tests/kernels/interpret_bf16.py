"""Run one small kernel per bfloat16 operation in Triton's interpreter and print, as JSON, which ones agree with PyTorch.

TRITON_INTERPRET=1 python interpret_bf16.py [--patched]
"""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

SIZE = 64


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def _widen(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def _add(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x + x * x)


@triton.jit
def _fma(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.fma(x, x, x))


@triton.jit
def _less(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, (x < -x).to(tl.float32))


@triton.jit
def _maximum(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.where(x > 0.0, x, tl.full((N,), 0.5, tl.bfloat16)))


@triton.jit
def _sum_of_two(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _reduce_sum(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr, tl.reduce(tl.load(x_ptr + i), 0, tl.standard._sum_combine))


@triton.jit
def _reduce_max(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr, tl.reduce(tl.load(x_ptr + i), 0, _larger))


@triton.jit
def _scan(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.associative_scan(tl.load(x_ptr + i), 0, _sum_of_two))


@triton.jit
def _dot(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * N + i[None, :]
    x = tl.load(x_ptr + square)
    tl.store(out_ptr + square, tl.dot(x, x))


def _cases():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, generator=generator)
    low = x.bfloat16()
    edges = torch.tensor([0.0, -0.0, 1e-40, -3e-39, 1e38, 3.4e38, float("inf"), float("nan"), 1.00390625, 1.01171875])
    cast = torch.cat([x[:-10], edges])
    just_off_a_tie = 1 + 2.0**-8 + torch.tensor([2.0**-40, -(2.0**-40)], dtype=torch.float64).repeat(SIZE // 2)
    rounded_once = torch.tensor([1 + 2.0**-7, 1.0]).repeat(SIZE // 2).bfloat16()
    bf16 = torch.bfloat16
    yield "fp32 to bf16", _cast, cast, torch.empty(SIZE, dtype=bf16), cast.bfloat16()
    yield "fp64 to bf16", _cast, just_off_a_tie, torch.empty(SIZE, dtype=bf16), rounded_once
    yield "fp16 to bf16", _cast, x.half(), torch.empty(SIZE, dtype=bf16), x.half().bfloat16()
    yield "int32 to bf16", _cast, (1000 * x).int(), torch.empty(SIZE, dtype=bf16), (1000 * x).int().bfloat16()
    yield "bf16 to fp32", _widen, low, torch.empty(SIZE), low.float()
    yield "bf16 to fp64", _widen, low, torch.empty(SIZE).double(), low.double()
    yield "bf16 to fp16", _widen, low, torch.empty(SIZE).half(), low.half()
    yield "bf16 to int32", _widen, 100 * low, torch.empty(SIZE).int(), (100 * low).int()
    yield "add, multiply", _add, low, torch.empty_like(low), low + low * low
    yield "fused multiply-add", _fma, low, torch.empty_like(low), (low.float() * low.float() + low.float()).bfloat16()
    yield "compare", _less, low, torch.empty(SIZE), (low < -low).float()
    yield "select, constant", _maximum, low, torch.empty_like(low), torch.where(low > 0, low, 0.5)
    yield "sum", _reduce_sum, low, torch.empty(1, dtype=bf16), low.float().sum(0, keepdim=True).bfloat16()
    yield "max", _reduce_max, -low.abs() - 1, torch.empty(1, dtype=bf16), (-low.abs() - 1).amax(0, keepdim=True)
    yield "scan", _scan, (low * 8).round(), torch.empty_like(low), (low * 8).round().float().cumsum(0).bfloat16()
    square = torch.randn(SIZE, SIZE, generator=generator).bfloat16()
    yield "dot", _dot, square, torch.empty(SIZE, SIZE), square.float() @ square.float()


def _agrees(kernel, x, out, expected) -> bool:
    try:
        kernel[(1,)](x, out, SIZE)
    except triton.runtime.errors.InterpreterError:
        return False
    tolerance = 1e-5 if out.dim() == 2 else 0.0
    return torch.allclose(out.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


if __name__ == "__main__":
    if "--patched" in sys.argv:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import triton_interpreter

        triton_interpreter.install()
    print(json.dumps({name: _agrees(*case) for name, *case in _cases()}))
