import torch
import torch.nn.functional as F

from bench.ops import Case, name_of
from llmcore import ops


def eager(x, w_gate, w_up):
    return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)


def apart():
    return lambda x, w_gate, w_up: ops.swiglu(F.linear(x, w_gate), F.linear(x, w_up))


def case(M: int, C: int, inner: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    def inputs(device, M=M, C=C, inner=inner):
        tensors = {
            "x": torch.randn(M, C, device=device), "w_gate": torch.randn(inner, C, device=device) * C**-0.5,
            "w_up": torch.randn(inner, C, device=device) * C**-0.5,
        }  # fmt: skip
        return {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}

    size, flops = dtype.itemsize, 4 * M * C * inner
    forward = (M * C + 2 * inner * C + M * inner) * size
    return Case(
        f"M{M} C{C} F{inner} {name_of(dtype)}", ops.fused_swiglu, eager, ops.fused_swiglu.reference, inputs,
        (forward, forward + (M * C + 2 * inner * C + 2 * M * inner) * size), (flops, 2 * flops),
        peers={"ops.swiglu after two products": apart},
        check=lambda device: inputs(device, min(M, 256), min(C, 256), min(inner, 256)),
        facts={"dtype": name_of(dtype), "width": C}, device=device, short=short,
    )  # fmt: skip


SIZES = (32, 128, 512)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(64, size, size, dtype, device)


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return []


CASES = [
    case(M, C, inner, dtype, short=C == 128)
    for dtype in (torch.float32, torch.bfloat16)
    for M, C, inner in ((2048, 128, 384), (2048, 1024, 2816))
] + [
    case(16384, 4096, 11008, torch.bfloat16, "cuda", short=True),
    case(32768, 2048, 5632, torch.bfloat16, "cuda"),
]
