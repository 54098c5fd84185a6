"""The functions of causal-conv1d 1.6."""

import torch
from torch import Tensor

from llmcore import ops


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `ops.causal_conv1d`; final_states_out (B, D, W - 1), if given, is written to and returned."""
    result = ops.causal_conv1d(
        x, weight, bias, activation, initial_state=initial_states, return_final_state=return_final_states,
        seq_idx=seq_idx,
    )  # fmt: skip
    if isinstance(result, Tensor) or final_states_out is None:
        return result
    y, last = result
    with torch.no_grad():
        final_states_out.copy_(last)
    return y, final_states_out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """See `ops.causal_conv1d_update`.

    Args:
        cache_seqlens: (B,), the tokens so far: conv_state is then a ring, whose next place is that modulo its length.
        conv_state_indices: (B,), the row of conv_state that each row of x belongs to.
    """
    if conv_state_indices is not None:
        rows = conv_state[conv_state_indices]
        y = causal_conv1d_update(x, rows, weight, bias, activation, cache_seqlens)
        conv_state[conv_state_indices] = rows
        return y
    if cache_seqlens is None:
        return ops.causal_conv1d_update(x, conv_state, weight, bias, activation)
    inputs = x.unsqueeze(-1) if x.dim() == 2 else x
    before = _ring(conv_state, cache_seqlens, range(1 - weight.shape[1], 0))
    result = ops.causal_conv1d(inputs, weight, bias, activation, initial_state=conv_state.gather(2, before).to(x.dtype))
    assert isinstance(result, Tensor)
    conv_state.scatter_(2, _ring(conv_state, cache_seqlens, range(inputs.shape[2])), inputs.to(conv_state.dtype))
    return result.view(x.shape)


def _ring(conv_state: Tensor, cache_seqlens: Tensor, steps: range) -> Tensor:
    """(B, D, len(steps)) places in the ring of the tokens that many steps from the present."""
    step = torch.arange(steps.start, steps.stop, device=conv_state.device)
    place = (cache_seqlens.long()[:, None] + step) % conv_state.shape[2]
    return place[:, None].expand(-1, conv_state.shape[1], -1)
