"""Modules built on `llmcore.ops`: they own parameters and call ops, and know nothing of backends."""

from llmcore.nn.attention import Attention
from llmcore.nn.gated_rms_norm import GatedRMSNorm
from llmcore.nn.kv_cache import KVCache
from llmcore.nn.mamba import Mamba, MambaState
from llmcore.nn.mamba2 import Mamba2
from llmcore.nn.moe import MoE, Routing
from llmcore.nn.rms_norm import RMSNorm
from llmcore.nn.rotary_embedding import RotaryEmbedding
from llmcore.nn.swiglu import SwiGLU

__all__ = [
    "Attention", "GatedRMSNorm", "KVCache", "Mamba", "Mamba2", "MambaState", "MoE", "RMSNorm", "RotaryEmbedding",
    "Routing", "SwiGLU",
]  # fmt: skip
