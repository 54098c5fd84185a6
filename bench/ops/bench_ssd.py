"""eager is the scan as plain PyTorch has it at its best: matrix products of all chunks at once, and a loop over their
states."""

import torch
import torch.nn.functional as F

from bench.ops import Case, name_of
from llmcore import ops

CHUNK = 64


def eager(x, dt, A, B, C, D, z, dt_bias, dt_softplus=True):
    """One group, softplus, a length of whole chunks, every optional input."""
    step = F.softplus(dt.float() + dt_bias)
    wide, step, B, C = (t.unflatten(1, (-1, CHUNK)) for t in (x.float(), step, B[:, :, 0].float(), C[:, :, 0].float()))
    sums = (step * A).cumsum(2).permute(0, 1, 3, 2)  # (B, K, H, Q)
    above = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).triu(1)
    decay = (sums[..., None] - sums[..., None, :]).masked_fill(above, -torch.inf).exp()
    gain = step[..., None] * wide
    weights = decay * torch.einsum("bktn,bksn->bkts", C, B)[:, :, None]
    y = torch.einsum("bkhts,bkshp->bkthp", weights, gain)
    gains = torch.einsum("bkhs,bkshp,bksn->bkhpn", decay[..., -1, :], gain, B)
    whole = sums[..., -1, None, None].exp()
    h, before = torch.zeros_like(gains[:, 0]), []
    for k in range(gains.shape[1]):
        before.append(h)
        h = whole[:, k] * h + gains[:, k]
    y = y + torch.einsum("bktn,bkhpn,bkht->bkthp", C, torch.stack(before, 1), sums.exp())
    y = y.flatten(1, 2) + D[:, None] * x.float()
    return (y * F.silu(z.float())).to(x.dtype)


def mamba_ssm():
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return lambda **inputs: mamba_chunk_scan_combined(**inputs, chunk_size=256)


def case(B: int, L: int, H: int, P: int, N: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    """One group."""

    def inputs(device, B=B, L=L, H=H):
        def randn(*shape):
            return torch.randn(*shape, device=device)

        wide = {n: randn(B, L, H, P).to(dtype) for n in ("x", "z")}
        parameters = {"A": -torch.rand(H, device=device) * 15 - 1, "D": randn(H), "dt_bias": randn(H) - 4}
        given = {n: randn(B, L, 1, N).to(dtype) for n in ("B", "C")}
        tensors = {**wide, "dt": randn(B, L, H).to(dtype), **parameters, **given}
        return {**{n: t.requires_grad_() for n, t in tensors.items()}, "dt_softplus": True}

    # Products with the states, and those inside a chunk; backward some of the forward's are computed again.
    tensor, elements = B * L * H * P * dtype.itemsize, B * L * H * P
    return Case(
        f"B{B} L{L} H{H} P{P} N{N} {name_of(dtype)}", ops.ssd, eager, ops.ssd.reference, inputs,
        (3 * tensor, 6 * tensor), (elements * (4 * N + CHUNK), elements * (12 * N + 3 * CHUNK)),
        peers={} if device == "cpu" else {"mamba-ssm": mamba_ssm},
        check=lambda device: inputs(device, 1, min(L, 192), min(H, 4)), facts={"dtype": name_of(dtype), "length": L},
        device=device, short=short,
    )  # fmt: skip


SIZES = (64, 256, 1024)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(1, size, 4, 32, 32, dtype, device)


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return []


CASES = [
    case(B, L, H, 64, 128, dtype, short=H == 4)
    for dtype in (torch.float32, torch.bfloat16)
    for B, L, H in ((2, 256, 4), (2, 2048, 24))
] + [
    case(8, 2048, 32, 64, 128, torch.bfloat16, "cuda"),
    case(2, 8192, 64, 64, 128, torch.bfloat16, "cuda", short=True),
]
