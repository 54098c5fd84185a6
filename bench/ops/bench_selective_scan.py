"""eager is the scan that PyTorch does best without a kernel: chunks whose steps are combined in log2 rounds, one chunk
after the other. The loop over single steps is what Hugging Face's models run without mamba-ssm."""

import torch
import torch.nn.functional as F

from bench.ops import Case, name_of
from llmcore import ops

CHUNK = 64


def eager(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True):
    """One group, softplus, every optional input."""
    dt = F.softplus(delta.float() + delta_bias[:, None])
    decay = torch.exp(dt[..., None] * A[:, None])
    state = (dt * u.float())[..., None] * B.float().transpose(1, 2)[:, None]
    h, ys = None, []
    for first in range(0, u.shape[2], CHUNK):
        a, x = decay[:, :, first : first + CHUNK], state[:, :, first : first + CHUNK]
        step = 1
        while step < a.shape[2]:
            x = torch.cat((x[:, :, :step], x[:, :, step:] + a[:, :, step:] * x[:, :, :-step]), 2)
            a = torch.cat((a[:, :, :step], a[:, :, step:] * a[:, :, :-step]), 2)
            step *= 2
        x = x if h is None else x + a * h[:, :, None]
        h = x[:, :, -1]
        ys.append(torch.einsum("bdtn,bnt->bdt", x, C[:, :, first : first + CHUNK].float()))
    y = torch.cat(ys, 2) + D[:, None] * u.float()
    return (y * F.silu(z.float())).to(u.dtype)


def loop():
    return ops.selective_scan.reference


def mamba_ssm():
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn


def case(B: int, D: int, N: int, L: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    def inputs(device, B=B, D=D, L=L):
        def randn(*shape):
            return torch.randn(*shape, device=device)

        wide = {n: randn(B, D, L).to(dtype) for n in ("u", "z")}
        parameters = {"A": -torch.rand(D, N, device=device) * N, "D": randn(D), "delta_bias": randn(D) - 4}
        given = {n: randn(B, N, L).to(dtype) for n in ("B", "C")}
        tensors = {**wide, "delta": randn(B, D, L).to(dtype), **parameters, **given}
        return {**{n: t.requires_grad_() for n, t in tensors.items()}, "delta_softplus": True}

    tensor, elements = B * D * L * dtype.itemsize, B * D * L * N
    return Case(
        f"B{B} D{D} N{N} L{L} {name_of(dtype)}", ops.selective_scan, eager, ops.selective_scan.reference, inputs,
        (4 * tensor, 7 * tensor), (7 * elements, 20 * elements),
        peers={"loop": loop} if device == "cpu" else {"mamba-ssm": mamba_ssm},
        check=lambda device: inputs(device, 1, min(D, 64), min(L, 200)), facts={"dtype": name_of(dtype), "length": L},
        device=device, short=short,
    )  # fmt: skip


SIZES = (16, 64, 256, 1024)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(1, 64, 16, size, dtype, device)


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return []


CASES = [
    case(B, D, 16, L, dtype, short=D == 256)
    for dtype in (torch.float32, torch.bfloat16)
    for B, D, L in ((8, 256, 256), (2, 1536, 2048))
] + [
    case(8, 2048, 16, 2048, torch.bfloat16, "cuda"),
    case(2, 4096, 16, 8192, torch.bfloat16, "cuda", short=True),
]
