import torch
import torch.nn.functional as F

from bench.ops import Case, name_of
from llmcore import ops


def eager(gate, up):
    return F.silu(gate) * up


def liger():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def case(rows: int, cols: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    def inputs(device):
        return {n: torch.randn(rows, cols, device=device).to(dtype).requires_grad_() for n in ("gate", "up")}

    tensor = rows * cols * dtype.itemsize
    return Case(
        f"{rows}x{cols} {name_of(dtype)}", ops.swiglu, eager, ops.swiglu.reference, inputs, (3 * tensor, 5 * tensor),
        peers={"Liger": liger} if device == "cuda" else {}, device=device, short=short,
    )  # fmt: skip


CASES = [
    case(rows, cols, dtype, short=cols == 384)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, cols in ((2048, 384), (4096, 1536), (2048, 5632), (2048, 11008))
] + [
    case(2**27 // 2048, 2048, torch.bfloat16, "cuda"),
    case(16384, 8192, torch.bfloat16, "cuda"),
    case(16384, 11008, torch.bfloat16, "cuda", short=True),
]
