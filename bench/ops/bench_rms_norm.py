import functools

import torch
import torch.nn.functional as F

from bench.ops import Case, name_of
from llmcore import ops


def eager(x, weight, residual=None):
    s = x if residual is None else x + residual
    y = F.rms_norm(s, weight.shape, weight, 1e-6)
    return y if residual is None else (y, s)


def liger(residual: bool):
    def load():
        if residual:
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

            return lambda x, weight, residual: LigerFusedAddRMSNormFunction.apply(
                x, residual, weight, 1e-6, 0.0, "llama", False
            )
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)

    return load


def flash_linear_attention():
    from fla.modules.norm.layernorm import rms_norm

    return lambda x, weight, residual=None: rms_norm(x, weight, None, residual, 1e-6, prenorm=residual is not None)


def mamba_ssm():
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    return lambda x, weight, residual=None: rms_norm_fn(
        x, weight, None, residual=residual, eps=1e-6, prenorm=residual is not None
    )


def transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    @functools.cache
    def norm(cols):
        return LlamaRMSNorm(cols, 1e-6)

    def call(x, weight, residual=None):
        s = x if residual is None else x + residual
        y = torch.func.functional_call(norm(len(weight)), {"weight": weight}, (s,))
        return y if residual is None else (y, s)

    return call


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
    flops = ((4 + residual) * rows * cols, (10 + residual) * rows * cols)
    peers: dict = {"transformers": transformers}
    if device == "cuda":
        peers |= {"Liger": liger(residual), "flash-linear-attention": flash_linear_attention, "mamba-ssm": mamba_ssm}
    facts = {"dtype": name_of(dtype), "width": cols, "residual": residual}
    return Case(
        title, ops.rms_norm, eager, ops.rms_norm.reference, inputs, moved, flops, peers=peers, facts=facts,
        device=device, short=short,
    )  # fmt: skip


def of_model(config, B: int, T: int, dtype: torch.dtype, device: str) -> list[Case]:
    return [case(B * T, config.hidden_size, dtype, residual, device) for residual in (False, True)]


SIZES = (128, 1024, 4096, 16384, 65536)


def of_size(size: int, dtype: torch.dtype, device: str) -> Case:
    return case(64, size, dtype, True, device)


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
