import torch
import torch.nn.functional as F

from bench.ops import Case, name_of
from llmcore import ops


def eager(x, weight, residual=None):
    s = x if residual is None else x + residual
    y = F.rms_norm(s, weight.shape, weight, 1e-6)
    return y if residual is None else (y, s)


def liger():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6)


def case(rows: int, cols: int, dtype: torch.dtype, residual: bool, device: str = "cpu", short: bool = False) -> Case:
    def inputs(device):
        made = {
            "x": torch.randn(rows, cols, device=device).to(dtype).requires_grad_(),
            "weight": torch.randn(cols, device=device).to(dtype).requires_grad_(),
        }
        if residual:
            made["residual"] = torch.randn(rows, cols, device=device).to(dtype).requires_grad_()
        return made

    tensor = rows * cols * dtype.itemsize
    title = f"{rows}x{cols}{' + residual' if residual else ''} {name_of(dtype)}"
    # with a residual: x, residual, y, s; dy, ds, s, dx. Without: x, y; dy, x, dx
    moved = (4 * tensor, 4 * tensor) if residual else (2 * tensor, 3 * tensor)
    peers = {"Liger": liger} if device == "cuda" and not residual else {}
    return Case(
        title, ops.rms_norm, eager, ops.rms_norm.reference, inputs, moved, peers=peers, device=device, short=short
    )


CASES = [
    case(rows, cols, dtype, residual, short=cols == 128)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, cols in ((2048, 128), (4096, 512), (2048, 2048), (2048, 4096))
    for residual in (False, True)
] + [
    case(2**27 // cols, cols, torch.bfloat16, residual, "cuda", short=cols in (4096, 65536))
    for cols in (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    for residual in (False, True)
]
