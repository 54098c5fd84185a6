"""What the device can do at most, measured in the same run: copying memory, and multiplying matrices."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import interleaved


@dataclass(frozen=True)
class Ceilings:
    """copy_bytes: bytes a second, read and written, of a copy beyond the caches; product_flops: FLOP a second of a
    matrix product on random data, by dtype."""

    copy_bytes: float
    product_flops: dict[torch.dtype, float]

    def as_record(self) -> dict[str, Any]:
        products = {str(d).removeprefix("torch."): round(f / 1e9, 1) for d, f in self.product_flops.items()}
        return {"copy GB/s": round(self.copy_bytes / 1e9, 1), "matrix product GFLOP/s": products}


def measure_ceilings(device: str) -> Ceilings:
    elements = 2**28 if device == "cuda" else 2**26
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    timings, _ = interleaved({"copy": lambda: target.copy_(source)}, device=device)
    copy = 2 * source.nbytes / timings["copy"].median
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        # a processor without bf16 products takes seconds for what it does in milliseconds in fp32
        n = 8192 if device == "cuda" else (1024 if dtype == torch.float32 else 256)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        timings, _ = interleaved({"product": functools.partial(torch.matmul, a, b)}, device=device, rounds=5)
        products[dtype] = 2 * n**3 / timings["product"].median
    return Ceilings(copy, products)
