import torch
import torch.nn.functional as F

from bench.ops import Case
from llmcore import ops


def eager(gate, up):
    return F.silu(gate) * up


def case(rows: int, cols: int, dtype: torch.dtype) -> Case:
    def inputs():
        return {n: torch.randn(rows, cols).to(dtype).requires_grad_() for n in ("gate", "up")}

    return Case(f"{rows}x{cols} {str(dtype).removeprefix('torch.')}", ops.swiglu, eager, ops.swiglu.reference, inputs)


CASES = [
    case(rows, cols, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, cols in ((2048, 384), (4096, 1536), (2048, 5632), (2048, 11008))
]
