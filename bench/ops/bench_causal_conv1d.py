import torch
import torch.nn.functional as F

from bench.ops import Case, name_of
from llmcore import ops


def eager(x, weight, bias, activation="silu"):
    """What models run without a kernel: a padded depthwise convolution, cut to the causal part."""
    y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])
    return F.silu(y[..., : x.shape[2]])


def causal_conv1d():
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn


def case(
    B: int, D: int, L: int, W: int, dtype: torch.dtype, device: str = "cpu", short: bool = False, view: bool = False
) -> Case:
    """view: x is a view of (B, L, D)."""

    def inputs(device):
        x = torch.randn(*((B, L, D) if view else (B, D, L)), device=device).to(dtype)
        filter_ = {n: torch.randn(*shape, device=device).to(dtype) for n, shape in (("weight", (D, W)), ("bias", (D,)))}
        tensors = {"x": x.transpose(1, 2) if view else x, **filter_}
        return {**{n: t.requires_grad_() for n, t in tensors.items()}, "activation": "silu"}

    elements = B * D * L
    tensor = elements * dtype.itemsize
    return Case(
        f"B{B} D{D} L{L} W{W} {name_of(dtype)}{' view of BLD' if view else ''}", ops.causal_conv1d, eager,
        ops.causal_conv1d.reference, inputs, (2 * tensor, 3 * tensor),
        ((2 * W + 5) * elements, (6 * W + 12) * elements),
        peers={} if device == "cpu" else {"causal-conv1d": causal_conv1d},
        facts={"dtype": name_of(dtype), "length": L}, device=device, short=short,
    )  # fmt: skip


SIZES = (64, 256, 1024, 4096)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(1, 64, size, 4, dtype, device)


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return []


CASES = [
    case(B, D, L, 4, dtype, short=D == 256 and not view, view=view)
    for dtype in (torch.float32, torch.bfloat16)
    for B, D, L in ((8, 256, 256), (2, 1536, 2048))
    for view in (False, True)
] + [
    case(8, 2048, 2048, 4, torch.bfloat16, "cuda"),
    case(2, 4096, 8192, 4, torch.bfloat16, "cuda", short=True),
    case(2, 4096, 8192, 4, torch.bfloat16, "cuda", view=True),
]
