"""On the CPU the products are PyTorch's own, a matrix product for each group: eager is the same written out."""

import torch

from bench.ops import Case, name_of
from llmcore import ops


def eager(x, w, group_sizes):
    return torch.cat([part @ weight.T for part, weight in zip(x.split(group_sizes.tolist()), w, strict=True)])


def grouped_mm():
    def call(x, w, group_sizes):
        return torch._grouped_mm(x, w.transpose(1, 2), offs=group_sizes.cumsum(0).int())

    return call


def case(T: int, C: int, F: int, E: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    """Groups of uneven sizes, as a router makes them."""

    def inputs(device, T=T, C=C, F=F):
        tensors = {"x": torch.randn(T, C, device=device).to(dtype), "w": torch.randn(E, F, C, device=device).to(dtype)}
        sizes = torch.bincount(torch.multinomial(torch.rand(E) + 0.2, T, replacement=True), minlength=E)
        return {**{n: t.requires_grad_() for n, t in tensors.items()}, "group_sizes": sizes.to(device)}

    size = dtype.itemsize
    forward = (T * C + T * F + E * F * C) * size
    return Case(
        f"T{T} C{C} F{F} E{E} {name_of(dtype)}", ops.grouped_gemm, eager, ops.grouped_gemm.reference, inputs,
        (forward, forward + (T * C + T * F + E * F * C) * size), (2 * T * C * F, 4 * T * C * F),
        peers={"torch._grouped_mm": grouped_mm},
        check=lambda device: inputs(device, min(T, 256), min(C, 64), min(F, 64)),
        facts={"dtype": name_of(dtype), "groups": E}, device=device, short=short,
    )  # fmt: skip


SIZES = (32, 128, 512)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(256, size, size, 8, dtype, device)


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return []


CASES = [
    case(T, C, F, E, dtype, short=E == 8)
    for dtype in (torch.float32, torch.bfloat16)
    for T, C, F, E in ((4096, 512, 512, 8), (8192, 512, 1024, 64))
] + [
    case(262144, 2048, 1536, 128, torch.bfloat16, "cuda", short=True),
    case(65536, 4096, 4096, 8, torch.bfloat16, "cuda"),
]
