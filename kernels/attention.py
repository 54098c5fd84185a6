"""Attention: softmax(softmax_scale * Q K^T) V over the visible keys, and its gradients, with no T x T matrix in memory.

The forward is in attention_fwd.py, the backward in attention_bwd.py, what they share in attention_tiles.py.
"""

from .attention_bwd import attention_bwd
from .attention_fwd import attention_fwd

__all__ = ["attention_bwd", "attention_fwd"]
