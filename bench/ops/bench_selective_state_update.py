"""A step of decoding: the state is read and written once, the rest is small."""

import torch

from bench.ops import Case, name_of
from llmcore import ops


def eager(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return ops.selective_state_update.reference(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def mamba_ssm():
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return selective_state_update


def case(B: int, D: int, N: int, dtype: torch.dtype, device: str = "cpu", short: bool = False) -> Case:
    def inputs(device):
        def randn(*shape):
            return torch.randn(*shape, device=device)

        step = {"x": randn(B, D).to(dtype), "dt": randn(B, D).to(dtype), "A": -torch.rand(D, N, device=device) * N}
        of_states = {"B": randn(B, N).to(dtype), "C": randn(B, N).to(dtype)}
        others = {"D": randn(D), "z": randn(B, D).to(dtype), "dt_bias": randn(D) - 4, "dt_softplus": True}
        return {"state": randn(B, D, N), **step, **of_states, **others}

    elements = B * D * N
    return Case(
        f"B{B} D{D} N{N} {name_of(dtype)}", ops.selective_state_update, eager, ops.selective_state_update.reference,
        inputs, (8 * elements, 0), (7 * elements, 0), peers={"mamba-ssm": mamba_ssm} if device == "cuda" else {},
        facts={"dtype": name_of(dtype), "width": D}, device=device, short=short,
    )  # fmt: skip


SIZES = (64, 1024)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(2, size, 16, dtype, device)


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return []


CASES = [
    case(B, D, 16, dtype, short=B == 1) for dtype in (torch.float32, torch.bfloat16) for B, D in ((1, 1536), (16, 4096))
] + [case(128, 4096, 16, torch.bfloat16, "cuda", short=True)]
