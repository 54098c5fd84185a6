"""KVCache: the keys and values of the tokens generated so far, so that each step computes only its own."""

import torch
from torch import Tensor


class KVCache:
    """Room for `max_length` tokens of every layer, allocated once.

    Args:
        num_layers, batch_size, max_length: sizes. num_key_value_heads: K. head_dim: D.
        dtype, device: of the keys and values.

    `length` counts the tokens that all layers hold; the model advances it after each call.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_length: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, batch_size, max_length, num_key_value_heads, head_dim)
        self.k_LBTKD = torch.empty(shape, dtype=dtype, device=device)
        self.v_LBTKD = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, T_new, K, D) behind what `layer` holds; returns all it holds, (B, length + T_new, K, D)."""
        if k.shape[0] != self.k_LBTKD.shape[1]:
            raise ValueError(f"KVCache: a batch of {k.shape[0]} was given; it was made for {self.k_LBTKD.shape[1]}.")
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("KVCache: what it holds cannot be differentiated; call the model under torch.no_grad().")
        end = self.length + k.shape[1]
        if end > self.k_LBTKD.shape[2]:
            raise ValueError(f"KVCache: {end} tokens do not fit; it was made for {self.k_LBTKD.shape[2]}.")
        self.k_LBTKD[layer, :, self.length : end] = k
        self.v_LBTKD[layer, :, self.length : end] = v
        return self.k_LBTKD[layer, :, :end], self.v_LBTKD[layer, :, :end]
