import torch
import torch.nn.functional as F

from bench.ops import Case
from llmcore import ops


def eager(x, weight, residual=None):
    s = x if residual is None else x + residual
    y = F.rms_norm(s, weight.shape, weight, 1e-6)
    return y if residual is None else (y, s)


def case(rows: int, cols: int, dtype: torch.dtype, residual: bool) -> Case:
    def inputs():
        made = {
            "x": torch.randn(rows, cols).to(dtype).requires_grad_(),
            "weight": torch.randn(cols).to(dtype).requires_grad_(),
        }
        if residual:
            made["residual"] = torch.randn(rows, cols).to(dtype).requires_grad_()
        return made

    title = f"{rows}x{cols}{' + residual' if residual else ''} {str(dtype).removeprefix('torch.')}"
    return Case(title, ops.rms_norm, eager, ops.rms_norm.reference, inputs)


CASES = [
    case(rows, cols, dtype, residual)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, cols in ((2048, 128), (4096, 512), (2048, 2048), (2048, 4096))
    for residual in (False, True)
]
