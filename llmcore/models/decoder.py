"""Decoder: a causal language model of attention and Mamba layers by a pattern, with Llama's parameter names.

Touvron et al., "LLaMA", 2023 (arXiv:2302.13971); Gu and Dao, "Mamba", 2023 (arXiv:2312.00752); Dao and Gu, Mamba-2's
"Transformers are SSMs", 2024 (arXiv:2405.21060). Each block:
    x = x + mixer(rms_norm(x))      x = x + mlp(rms_norm(x)), which a layer of Mamba alone has not
where mlp is one SwiGLU or experts of such (Shazeer et al., 2017, arXiv:1701.06538).
The additions run inside the next norm: a block hands on its last output and the residual stream, still apart.
Training can drop elements (Srivastava et al., "Dropout", 2014) of the embedding's output and of what each attention and
mlp adds to the stream, as GPT-2 does (Radford et al., 2019), which drops attention's probabilities besides.

B batch, T time, C hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from llmcore.models.cache import Cache
from llmcore.models.config import ModelConfig
from llmcore.models.generation import generate_tokens
from llmcore.nn import Attention, KVCache, Mamba, Mamba2, MoE, RMSNorm, RotaryEmbedding, SwiGLU
from llmcore.nn.moe import Experts, Routing


def _outside(tokens: Tensor, vocab_size: int) -> int:
    return int(tokens[(tokens < 0) | (tokens >= vocab_size)][0])


def _dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    return F.dropout(x, probability) if training and probability else x


@dataclass
class DecoderOutput:
    """logits (B, T, V), None when the loss was asked for; loss: mean over targets, a float32 scalar, or None; in
    training with what balances the experts, routing_loss, added."""

    logits: Tensor | None = None
    loss: Tensor | None = None
    routing_loss: Tensor | None = None


def _mamba(c: ModelConfig) -> Mamba:
    return Mamba(c.hidden_size, c.mamba_state_size, c.mamba_conv_width, c.mamba_expand, c.mamba_dt_rank)


def _mamba2(c: ModelConfig) -> Mamba2:
    low, high = c.mamba2_step_limit or (0.0, math.inf)
    return Mamba2(
        c.hidden_size, c.mamba2_state_size, c.mamba_conv_width, c.mamba_expand, c.mamba2_head_dim, c.mamba2_num_groups,
        (low, high), c.rms_norm_eps,
    )  # fmt: skip


def _feed_forward(c: ModelConfig, layer: int) -> SwiGLU | MoE | None:
    if not c.has_feed_forward(layer):
        return None
    if not c.has_experts(layer):
        return SwiGLU(c.hidden_size, c.intermediate_size)
    assert c.moe_intermediate_size is not None
    return MoE(
        c.hidden_size, c.moe_intermediate_size, c.num_experts, c.num_experts_per_tok, c.num_shared_experts,
        scoring=c.scoring_func, normalize=c.norm_topk_prob, num_groups=c.num_expert_groups,
        top_groups=c.num_groups_per_tok, scale=c.routed_scaling_factor, jitter=c.router_jitter,
        balance_loss=c.router_balance_loss, z_loss=c.router_z_loss, bias_rate=c.router_bias_rate,
    )  # fmt: skip


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C = config.hidden_size
        kind, self.dropout = config.mixer(layer), config.dropout
        self.residual_in_fp32 = config.residual_in_fp32
        self.is_mamba = kind != "attention"
        # among the layers that keep the same of the past
        self.number = sum((config.mixer(i) != "attention") == self.is_mamba for i in range(layer))
        if self.is_mamba:
            self.mixer = _mamba(config) if kind == "mamba" else _mamba2(config)
        else:
            self.self_attn = Attention(
                C, config.num_attention_heads, config.num_key_value_heads, config.head_dim, layer=self.number,
                qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
            )  # fmt: skip
        self.mlp = _feed_forward(config, layer)
        self.input_layernorm = RMSNorm(C, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(C, config.rms_norm_eps) if self.mlp is not None else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotary: RotaryEmbedding | None,
        positions: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """x: the last sublayer's output, residual: the stream before it (None in the first layer) -> the same pair, and
        what the routing of a layer with experts did."""
        if residual is None:
            wide = torch.promote_types(x.dtype, torch.float32) if self.residual_in_fp32 else x.dtype
            y, residual = self.input_layernorm(x), x.to(wide)
        else:
            y, residual = self.input_layernorm(x, residual)
        if self.is_mamba:
            x = self.mixer(y, None if cache is None else cache.states[self.number])
        else:
            x = self.self_attn(y, rotary, positions, None if cache is None else cache.kv)
        x = _dropout(x, self.dropout, self.training)
        if self.mlp is None or self.post_attention_layernorm is None:
            return x, residual, None
        y, residual = self.post_attention_layernorm(x, residual)
        x, routing = self.mlp(y) if isinstance(self.mlp, MoE) else (self.mlp(y), None)
        return _dropout(x, self.dropout, self.training), residual, routing


class Backbone(nn.Module):
    """Embedding, blocks and the final norm: token ids (B, T) -> hidden states (B, T, C), and the experts' routings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        assert config.head_dim is not None
        # A model that does not attend has no use for a table as long as its longest sequence.
        attends = any(config.mixer(i) == "attention" for i in range(config.num_hidden_layers))
        self.rotary = (
            RotaryEmbedding(config.head_dim, config.max_position_embeddings, config.rope_theta) if attends else None
        )
        self.dropout = config.dropout
        self.draws_in_layers = config.dropout > 0 or config.router_jitter > 0
        self.checkpointed_layers = 0

    def forward(self, input_ids: Tensor, positions: Tensor | None, cache: Cache | None) -> tuple[Tensor, list[Routing]]:
        routings = []
        x, residual = _dropout(self.embed_tokens(input_ids), self.dropout, self.training), None
        checkpointed = self.checkpointed_layers if self.training and torch.is_grad_enabled() and cache is None else 0
        for i, layer in enumerate(self.layers):
            if i < checkpointed:
                # What a layer draws at random, the second run has to draw again.
                x, residual, routing = checkpoint(
                    layer, x, residual, self.rotary, positions, None, use_reentrant=False,
                    preserve_rng_state=self.draws_in_layers,
                )  # fmt: skip
            else:
                x, residual, routing = layer(x, residual, self.rotary, positions, cache)
            if routing is not None:
                routings.append(routing)
        y, _ = self.norm(x, residual)
        return y, routings


class Decoder(nn.Module):
    """The language model. Parameters are named as in Hugging Face's Llama, those of a Mamba mixer as in its Mamba."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        self.tie_weights()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation initializer_range, norms at one; Mamba mixers as in their paper."""
        mixers = [module for module in self.modules() if isinstance(module, Mamba | Mamba2)]
        for mixer in mixers:
            mixer.reset_parameters(self.config.num_hidden_layers)
        inside = {module for mixer in mixers for module in mixer.modules()}
        for module in self.modules():
            if module in inside:
                continue
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            elif isinstance(module, Experts):
                nn.init.normal_(module.gate_up_proj, std=self.config.initializer_range)
                nn.init.normal_(module.down_proj, std=self.config.initializer_range)
            elif isinstance(module, RMSNorm):
                nn.init.constant_(module.weight, 1.0 - module.weight_offset)

    def reset_buffers(self, device: torch.device) -> None:
        """Computes the rotary tables again, on `device`: after a model was built on the meta device. Biases of experts
        that have no numbers yet begin at zero."""
        if self.model.rotary is not None:
            self.model.rotary.reset_buffers(device)
        for layer in self.expert_layers():
            layer.reset_buffers(device)

    def expert_layers(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]

    def expert_load(self) -> Tensor | None:
        """(layers with experts, E) float32: the pairs of a token and an expert that each got in training since the last
        `balance_experts`; None without experts."""
        layers = self.expert_layers()
        return torch.stack([layer.load for layer in layers]) if layers else None

    def balance_experts(self, load: Tensor) -> None:
        """Once a step of training: moves the biases of the experts by their load, as `expert_load` gives it, of all
        ranks, and begins to count anew."""
        for layer, its_load in zip(self.expert_layers(), load, strict=True):
            layer.balance(its_load)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def checkpoint_layers(self, n: int) -> None:
        """Makes training keep only the inputs of the first n layers, which the backward pass then runs again.

        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (arXiv:1604.06174). Loss and gradients keep
        their bits (for a forced backend see `llmcore.backend`). 0 recomputes nothing.
        """
        layers = self.config.num_hidden_layers
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= layers:
            raise ValueError(f"Decoder: checkpoint_layers is {n!r}; allowed: 0 to num_hidden_layers = {layers}.")
        self.model.checkpointed_layers = n

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> DecoderOutput:
        """Logits of the next token, or the mean loss.

        Args:
            input_ids: (B, T) integer tokens.
            targets: (B, T), already shifted (targets[t] follows input_ids[t]); -100 is ignored.
            positions: (B, T) or (T,); counted from the cache's length when None.
            cache: holds the earlier tokens; it is extended by these.
            cu_seqlens: packed documents, not supported yet.

        Returns:
            logits without targets, otherwise loss (float32) with logits None.
        """
        self._check(input_ids, targets, cu_seqlens, cache)
        if cache is not None and positions is None:
            positions = torch.arange(cache.length, cache.length + input_ids.shape[1], device=input_ids.device)
        x, routings = self.model(input_ids, positions, cache)
        if cache is not None:
            cache.kv.length += input_ids.shape[1]
        if self.training and torch.is_grad_enabled():
            for layer, routing in zip(self.expert_layers() if routings else [], routings, strict=True):
                assert routing.load is not None  # in training
                layer.load += routing.load
        logits = self.lm_head(x)
        if targets is None:
            return DecoderOutput(logits=logits)
        targets = targets.flatten().long()
        total = F.cross_entropy(logits.flatten(0, -2).float(), targets, ignore_index=-100, reduction="sum")
        loss = total / (targets != -100).sum().clamp(min=1)
        costs = [routing.loss for routing in routings if routing.loss is not None]
        if not costs:
            return DecoderOutput(loss=loss)
        routing_loss = torch.stack(costs).sum()
        return DecoderOutput(loss=loss + routing_loss, routing_loss=routing_loss)

    def _check(self, input_ids: Tensor, targets: Tensor | None, cu_seqlens: Tensor | None, cache: Cache | None) -> None:
        if cu_seqlens is not None:
            raise NotImplementedError("Decoder: cu_seqlens (packed documents) is not supported yet; allowed: None.")
        for name, tokens in (("input_ids", input_ids), ("targets", targets)):
            if not isinstance(tokens, Tensor) and not (tokens is None and name == "targets"):
                raise TypeError(f"Decoder: {name} must be a tensor, but a {type(tokens).__name__} was given.")
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"Decoder: input_ids must be (B, T) of int64 or int32, "
                f"but it is {tuple(input_ids.shape)} of {str(input_ids.dtype).removeprefix('torch.')}."
            )
        if targets is not None and targets.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"Decoder: targets must be int64 or int32, but they are {targets.dtype}.")
        V = self.config.vocab_size
        for name, tokens in (("input_ids", input_ids), ("targets", targets)):
            # Values can be read from real tensors only: not while compiling, not from FakeTensors.
            if type(tokens) is Tensor and tokens.device.type == "cpu" and not is_compiling():
                seen = tokens if name == "input_ids" else tokens[tokens != -100]
                if seen.numel() and (seen.amin() < 0 or seen.amax() >= V):
                    raise ValueError(
                        f"Decoder: {name} holds {_outside(seen, V)}; allowed: 0 to {V - 1}, the vocabulary."
                    )
        if targets is not None and targets.shape != input_ids.shape:
            raise ValueError(
                f"Decoder: targets must have input_ids' shape {tuple(input_ids.shape)}, "
                f"but it is {tuple(targets.shape)}."
            )
        length = input_ids.shape[1] + (0 if cache is None else cache.length)
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"Decoder: {length} tokens were given; allowed: max_position_embeddings = "
                f"{self.config.max_position_embeddings}."
            )

    def new_cache(self, batch_size: int, max_length: int, dtype: torch.dtype | None = None) -> Cache:
        """What this model keeps before the first token: room for max_length keys and values in each attention layer, a
        state of fixed size in each Mamba layer. dtype is the weights' when None."""
        weight, c = self.lm_head.weight, self.config
        assert c.num_key_value_heads is not None and c.head_dim is not None
        attention = sum(c.mixer(i) == "attention" for i in range(c.num_hidden_layers))
        kv = KVCache(
            attention, batch_size, max_length, c.num_key_value_heads, c.head_dim, dtype=dtype or weight.dtype,
            device=weight.device,
        )  # fmt: skip
        mixers = [module for module in self.modules() if isinstance(module, Mamba | Mamba2)]
        return Cache(kv, [mixer.new_state(batch_size, dtype) for mixer in mixers])

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        eos_token_id: int | None = None,
        stream: bool = False,
    ) -> Tensor | Iterator[Tensor]:
        """Continues input_ids (B, T) by up to max_new_tokens, with a KV cache.

        Args:
            temperature: divides the logits; 0 is greedy.
            top_k, top_p: sample only from the k likeliest tokens, from the likeliest of total probability p.
            repetition_penalty: above 1 makes tokens already present less likely (Keskar et al., 2019).
            no_repeat_ngram_size: no n-gram of this size occurs twice; 0 allows all.
            eos_token_id: a row that emits it is finished and padded with it.
            stream: return an iterator over the new tokens, (B,) each, instead.

        Returns:
            (B, T + new) prompt and new tokens.
        """
        self._check(input_ids, None, None, None)
        tokens = generate_tokens(
            self, input_ids, max_new_tokens, temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size,
            eos_token_id,
        )  # fmt: skip
        if stream:
            return tokens
        return torch.cat([input_ids, *(t[:, None] for t in tokens)], 1)

    def num_parameters(self) -> int:
        """Number of parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, sequence_length: int, training: bool = True) -> float:
        """Model FLOPs per token; see ModelConfig.flops_per_token."""
        return self.config.flops_per_token(sequence_length, training)


def build(config: ModelConfig) -> Decoder:
    """The model that `config` describes, freshly initialised from PyTorch's random state."""
    if not isinstance(config, ModelConfig):
        raise TypeError(f"build: config must be a ModelConfig, but a {type(config).__name__} was given.")
    return Decoder(config)
