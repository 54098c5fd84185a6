"""What the device can do at most, measured in the same run: copying memory, multiplying matrices, and how long the
smallest operation takes."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import interleaved

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ceilings:
    """copy_bytes: bytes a second, read and written, of a copy beyond the caches; product_flops: FLOP a second of a
    matrix product on random data, by dtype; launch: seconds from one addition of a single element to the next."""

    copy_bytes: float
    product_flops: dict[torch.dtype, float]
    launch: float

    def as_record(self) -> dict[str, Any]:
        products = {str(d).removeprefix("torch."): round(f / 1e9, 1) for d, f in self.product_flops.items()}
        return {
            "copy GB/s": round(self.copy_bytes / 1e9, 1),
            "matrix product GFLOP/s": products,
            "launch us": round(self.launch * 1e6, 2),
        }


def measure_ceilings(device: str) -> Ceilings:
    source = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    timings, _ = interleaved({"copy": lambda: target.copy_(source)}, device=device)
    copy = 2 * source.nbytes / timings["copy"].median
    products = {dtype: _product(device, dtype) for dtype in DTYPES}
    one = torch.zeros(1, device=device)
    timings, _ = interleaved({"launch": lambda: one.add_(1.0)}, device=device)
    return Ceilings(copy, products, timings["launch"].median)


def _product(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of square matrices: as large as takes a moment, for a processor without bf16 products takes seconds
    for what it does in milliseconds in fp32."""
    best = 0.0
    for n in (8192,) if device == "cuda" else (256, 512, 1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        timings, _ = interleaved({"product": functools.partial(torch.matmul, a, b)}, device=device, rounds=5)
        best = max(best, 2 * n**3 / timings["product"].median)
        if timings["product"].median > 0.02:
            break
    return best
