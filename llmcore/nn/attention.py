"""Attention: projections, rotary embedding and `ops.attention` with grouped queries."""

from torch import Tensor, nn

from llmcore import ops
from llmcore.nn.kv_cache import KVCache
from llmcore.nn.rms_norm import RMSNorm
from llmcore.nn.rotary_embedding import RotaryEmbedding


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al., 2023), without biases.

    Args:
        hidden_size: C. num_heads: H query heads. num_kv_heads: K, H a multiple of it; H when None.
        head_dim: D, C // H when None. layer: this layer's place in a KV cache.
        qk_norm_eps: not None: each head's query and key go through an RMSNorm of that eps (Dehghani et al., 2023,
            arXiv:2302.05442; as Qwen3 has it), which all heads share.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        layer: int = 0,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"Attention: num_heads is {num_heads} and num_kv_heads is {num_kv_heads}; "
                "allowed: whole numbers from 1, the first a multiple of the second."
            )
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"Attention: hidden_size = {hidden_size} is not a multiple of num_heads = {num_heads}; "
                "change one of them or give head_dim."
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.layer = layer
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden_size, bias=False)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(self.head_dim, qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(self.head_dim, qk_norm_eps)

    def forward(
        self, x: Tensor, rotary: RotaryEmbedding, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """x: (B, T, C), positions: (B, T) or (T,) -> (B, T, C). With a cache, x are the tokens after those it holds."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary(q, k, positions)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        out = ops.attention(q, k, v, causal=True)
        assert isinstance(out, Tensor)
        return self.o_proj(out.flatten(-2))
