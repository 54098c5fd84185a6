import torch
import torch.nn.functional as F

from bench.ops import Case, name_of
from llmcore import ops


def eager(gate, up):
    return F.silu(gate) * up


def liger():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def flash_linear_attention():
    from fla.modules.activations import swiglu

    return lambda gate, up: swiglu(gate, up)


GPU_PEERS = {"Liger": liger, "flash-linear-attention": flash_linear_attention}


def case(rows: int, cols: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    def inputs(device):
        return {n: torch.randn(rows, cols, device=device).to(dtype).requires_grad_() for n in ("gate", "up")}

    tensor = rows * cols * dtype.itemsize
    return Case(
        f"{rows}x{cols} {name_of(dtype)}", ops.swiglu, eager, ops.swiglu.reference, inputs, (3 * tensor, 5 * tensor),
        (5 * rows * cols, 12 * rows * cols),
        peers=GPU_PEERS if device == "cuda" else {}, facts={"dtype": name_of(dtype), "width": cols}, device=device,
        short=short,
    )  # fmt: skip


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return [case(B * T, config.intermediate_size, dtype, device)]


SIZES = (128, 1024, 4096, 16384)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(64, size, dtype, device)


CASES = [
    case(rows, cols, dtype, short=cols == 384)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, cols in ((2048, 384), (4096, 1536), (2048, 5632), (2048, 11008))
] + [
    case(2**27 // 2048, 2048, torch.bfloat16, "cuda"),
    case(16384, 8192, torch.bfloat16, "cuda"),
    case(16384, 11008, torch.bfloat16, "cuda", short=True),
]
