"""The peer of `llmcore.models.Decoder`: the same architecture and parameter names in plain PyTorch.

F.rms_norm, F.scaled_dot_product_attention, F.silu and F.cross_entropy, written as one would write it today; it loads
llmcore's state_dict, so that both start from the same weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore.models import ModelConfig
from llmcore.models.decoder import DecoderOutput


class PlainAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        assert D is not None and config.num_key_value_heads is not None
        self.D, self.grouped = D, config.num_key_value_heads != config.num_attention_heads
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.D)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class PlainMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, F_, bias=False)
        self.up_proj = nn.Linear(C, F_, bias=False)
        self.down_proj = nn.Linear(F_, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class PlainLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = PlainAttention(config), PlainMLP(config)
        self.input_layernorm = PlainNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = PlainNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainBackbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = PlainNorm(config.hidden_size, config.rms_norm_eps)
        D = config.head_dim
        assert D is not None
        frequency = config.rope_theta ** (-torch.arange(0, D, 2) / D)
        angle = torch.arange(config.max_position_embeddings)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    cos: Tensor
    sin: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        x, T = self.embed_tokens(input_ids), input_ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        return self.norm(x)


class PlainDecoder(nn.Module):
    """forward(input_ids, targets) -> mean cross-entropy."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = PlainBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(self.model(input_ids)).flatten(0, -2).float(), targets.flatten())


class PlainTwin(nn.Module):
    """A PlainDecoder with these weights that answers a training loop as llmcore's Decoder does."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.decoder = PlainDecoder(config)
        self.decoder.load_state_dict(weights)

    def forward(self, input_ids: Tensor, targets: Tensor) -> DecoderOutput:
        return DecoderOutput(loss=self.decoder(input_ids, targets))

    def expert_load(self) -> None:
        """It has no experts."""
