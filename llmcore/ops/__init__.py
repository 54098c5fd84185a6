"""The operators: what each one means, and which kernel runs it.

Every op is one module that holds its maths, its plain-PyTorch reference, its argument checks, its fake implementation,
its backward and its kernels' entry points. The function is exported under the module's name, so importing is eager.
"""

from llmcore.ops._dispatch import BACKENDS, Op, backend, registry
from llmcore.ops.apply_rotary import apply_rotary
from llmcore.ops.attention import attention
from llmcore.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from llmcore.ops.fused_swiglu import fused_swiglu
from llmcore.ops.grouped_gemm import grouped_gemm
from llmcore.ops.moe_mlp import moe_mlp
from llmcore.ops.moe_route import moe_route
from llmcore.ops.rms_norm import rms_norm
from llmcore.ops.selective_scan import selective_scan
from llmcore.ops.selective_state_update import selective_state_update
from llmcore.ops.ssd import ssd
from llmcore.ops.swiglu import swiglu

__all__ = [
    "BACKENDS",
    "Op",
    "apply_rotary",
    "attention",
    "backend",
    "causal_conv1d",
    "causal_conv1d_update",
    "fused_swiglu",
    "grouped_gemm",
    "moe_mlp",
    "moe_route",
    "registry",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "swiglu",
]
