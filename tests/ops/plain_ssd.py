"""ssd as it is written in plain PyTorch: chunks of matrix products (Dao and Gu, 2024, section 6), autograd's gradients.

What a kernel is allowed in error follows from this one's: the same algorithm in the same dtypes.
"""

import functools
import math

import torch
import torch.nn.functional as F

from llmcore.ops import _documents


def plain_ssd(products):
    """ssd in float32, in chunks of several sizes. Matrix products take operands rounded to `products`, as tensor cores do;
    None: not rounded. Where they are, dt multiplies x or B before: the error of a sum of few numbers is luck, and the
    furthest off of two would often be too near."""
    if products in (None, torch.float32):
        return [functools.partial(_ssd, products, chunk, True) for chunk in (64, 24)]
    return [functools.partial(_ssd, products, chunk, of_x) for chunk in (64, 24, 3) for of_x in (True, False)]


def _ssd(
    products, chunk, of_x, x, dt, A, B, C, chunk_size=256, D=None, z=None, dt_bias=None, initial_states=None, dt_softplus=False,
    dt_limit=(0.0, math.inf), return_final_states=False, *, cu_seqlens=None, seq_idx=None,
):  # fmt: skip
    H = x.shape[2]

    def product(equation, *operands):
        if products is not None:
            operands = [t.to(products).float() for t in operands]
        return torch.einsum(equation, *operands)

    def scan(x, dt, B, C, h):
        """x (R, L, H, P), dt (R, L, H), B, C (R, L, H, N), h (R, H, P, N)"""
        ys = []
        for first in range(0, x.shape[1], chunk):
            now = slice(first, first + chunk)
            logs = (dt[:, now] * A.float()).transpose(1, 2)
            Q = logs.shape[-1]
            below = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril(-1)
            between = logs[..., None].expand(*logs.shape, Q).masked_fill(~below, 0).cumsum(-2)
            decay = between.masked_fill(below.T, -math.inf).exp()
            from_start, to_end = logs.cumsum(-1).exp().transpose(1, 2), decay[:, :, -1].transpose(1, 2)
            left, right = x[:, now], B[:, now]
            if of_x:
                left = left * dt[:, now, :, None]
            else:
                right = right * dt[:, now, :, None]
            weights = decay * product("rthn,rshn->rhts", C[:, now], right)
            y = product("rhts,rshp->rthp", weights, left)
            ys.append(y + product("rthn,rhpn->rthp", C[:, now], h) * from_start[..., None])
            gained = product("rshp,rshn->rhpn", left * to_end[..., None], right)
            h = from_start[:, -1, :, None, None] * h + gained
        return torch.cat(ys, 1), h

    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    x_wide, (B, C) = x.float(), (t.float().repeat_interleave(H // t.shape[2], 2) for t in (B, C))
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    start = x_wide.new_zeros(rows, *x.shape[2:], B.shape[3]) if initial_states is None else initial_states.float()
    if cu_seqlens is None and seq_idx is None:
        y, final = scan(x_wide, step, B, C, start)
    else:
        pieces, finals = [[] for _ in x], list(start)
        for at, initial, last in _documents.spans(x, cu_seqlens, seq_idx):
            h = torch.zeros_like(start[:1]) if initial is None else start[initial]
            y, h = scan(x_wide[at], step[at], B[at], C[at], h)
            pieces[at[0].start].append(y)
            if last is not None:
                finals[last.start] = h[0]
        y, final = torch.cat([torch.cat(row, 1) for row in pieces]), torch.stack(finals)
    if products is not None and y.requires_grad:
        y.register_hook(lambda dy: dy.to(products).float())  # an operand of the backward's products
    y = y if D is None else y + D.float().reshape(H, -1) * x_wide
    y = (y if z is None else y * F.silu(z.float())).to(x.dtype)
    return (y, final) if return_final_states else y
