"""attention: out = softmax(scale * q k^T + mask) v, never holding the (T_q, T_k) matrix.

Dao, "FlashAttention-2", 2023 (arXiv:2307.08691); online softmax: Milakov and Gimelshein, 2018 (arXiv:1805.02867).
    S_ij = scale * q_i . k_j      lse_i = log sum_j exp(S_ij)      P_ij = exp(S_ij - lse_i)      out_i = sum_j P_ij v_j
Backward from lse, with delta_i = dout_i . out_i - dlse_i:
    dv_j = sum_i P_ij dout_i      dS_ij = P_ij (dout_i . v_j - delta_i)
    dq_i = scale * sum_j dS_ij k_j      dk_j = scale * sum_i dS_ij q_i
Visible keys of query i, with shift = T_k - T_q (bottom-right aligned):
    i + shift - window_left <= j <= i + shift + window_right        (-1: no limit; causal sets window_right = 0)

B batch, T_q and T_k time, H query heads, K key-value heads (H a multiple of K), D head size, Dv value head size.
"""

from typing import Any

import torch
from torch import Tensor

from llmcore.ops import _checks, _native
from llmcore.ops._dispatch import Op, resolve
from llmcore.ops._library import operator, public

OP = Op("attention", kernels=("triton", "cpu"))

Result = Tensor | tuple[Tensor, Tensor]


def _visible(T_q: int, T_k: int, window_left: int, window_right: int, device: torch.device) -> Tensor | None:
    """(T_q, T_k) mask of the keys each query sees, or None when all see all."""
    if window_left < 0 and window_right < 0:
        return None
    i = torch.arange(T_q, device=device)[:, None] + (T_k - T_q)
    j = torch.arange(T_k, device=device)[None, :]
    visible = torch.ones(T_q, T_k, dtype=torch.bool, device=device)
    if window_left >= 0:
        visible &= j >= i - window_left
    if window_right >= 0:
        visible &= j <= i + window_right
    return visible


def _scores(q: Tensor, k: Tensor, softmax_scale: float, window_left: int, window_right: int) -> Tensor:
    """(B, H, T_q, T_k) scaled scores, -inf where a key is not seen. q, k: (B, T, H, D) with as many heads."""
    S = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    visible = _visible(q.shape[1], k.shape[1], window_left, window_right, q.device)
    return S if visible is None else S.masked_fill(~visible, -torch.inf)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Result:
    _not_yet(window_size, softcap, sinks, dropout_p)
    H = q.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (t.repeat_interleave(H // t.shape[2], 2) for t in (k, v))
    S = _scores(q, k, scale, -1, 0 if causal else -1).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    lse = torch.logsumexp(S, -1)
    # Rows that see no key: P would be exp(-inf + inf).
    P = torch.exp(S - lse.masked_fill(lse.isneginf(), 0)[..., None])
    out = torch.einsum("bhij,bjhd->bihd", P.to(v.dtype), v)
    return (out, lse) if return_lse else out


def _not_yet(window_size: tuple[int, int], softcap: float, sinks: Tensor | None, dropout_p: float) -> None:
    for name, given, neutral in (
        ("window_size", tuple(window_size) if isinstance(window_size, list) else window_size, (-1, -1)),
        ("softcap", softcap, 0.0),
        ("sinks", sinks, None),
        ("dropout_p", dropout_p, 0.0),
    ):
        if given is not neutral and (isinstance(given, Tensor) or given != neutral):
            shown = "a tensor" if isinstance(given, Tensor) else given
            raise NotImplementedError(f"attention: {name} = {shown} is not supported yet; allowed: {name} = {neutral}.")


@public(reference)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Result:
    """Scaled dot-product attention (Dao, 2023), full or causal, with grouped queries.

    Args:
        q: (B, T_q, H, D), float32, bfloat16 or float16 (float64 on the torch backend). D from 16 to 256, by 8.
        k: (B, T_k, K, D), H a multiple of K; query head h reads key-value head h // (H // K).
        v: (B, T_k, K, Dv), Dv from 16 to 256, by 8.
        causal: query i sees keys j <= i + T_k - T_q (bottom-right aligned).
        softmax_scale: D ** -0.5 when None.
        return_lse: also return lse (B, H, T_q), float32, natural logarithm, scale included; its gradient flows.
        deterministic: every backend is deterministic; the argument is accepted for later ones that are not.
        window_size, softcap, sinks, dropout_p, dropout_seed: not supported yet.

    Under autocast q, k and v are cast to its dtype. A row that sees no key gives zeros, lse -inf and zero gradients.

    Returns:
        out (B, T_q, H, Dv) in q's dtype, or (out, lse).

    Raises:
        ValueError: shapes, devices or head sizes that do not fit. TypeError: a dtype that is not allowed.
        NotImplementedError: a feature that is not supported yet.
    """
    _not_yet(window_size, softcap, sinks, dropout_p)
    for name, tensor, dims in (("q", q, "(B, T_q, H, D)"), ("k", k, "(B, T_k, K, D)"), ("v", v, "(B, T_k, K, Dv)")):
        _checks.floating("attention", name, tensor)
        _checks.rank("attention", name, tensor, dims, 4)
    q, k, v = _checks.autocast(q, k, v)
    B, _, H, D = q.shape
    _, T_k, K, _ = k.shape
    for name, tensor in (("k", k), ("v", v)):
        _checks.like("attention", name, tensor, "q", q)
    _checks.shape("attention", "k", k, "(B, T_k, K, D)", (B, T_k, K, D))
    _checks.shape("attention", "v", v, "(B, T_k, K, Dv)", (B, T_k, K, v.shape[3]))
    if K == 0 or H % K:
        raise ValueError(f"attention: q has {H} heads and k has {K}; q's must be a multiple of k's.")
    for name, size in (("q and k", D), ("v", v.shape[3])):
        if size < 16 or size > 256 or size % 8:
            raise ValueError(f"attention: the head size of {name} is {size}; allowed: 16 to 256 in steps of 8.")
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    _checks.number("attention", "softmax_scale", scale)
    out, lse = _attention(q, k, v, scale, -1, 0 if causal else -1, resolve("attention", q))
    return (out, lse) if return_lse else out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window_left: int, window_right: int, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "torch":
        return _forward_torch(q, k, v, softmax_scale, window_left, window_right)
    q, k, v = _native.unit_stride(q), _native.unit_stride(k), _native.unit_stride(v)
    if backend == "triton":
        from llmcore.kernels import attention as kernel

        return kernel.attention_fwd(q, k, v, softmax_scale, window_left, window_right)
    (B, T_q, H, D), (_, T_k, K, Dv) = q.shape, v.shape
    out = q.new_empty((B, T_q, H, Dv))
    lse = q.new_empty((B, H, T_q), dtype=torch.float32)
    _native.module(backend).attention_fwd(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), B, H, K, T_q, T_k, D, Dv,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], softmax_scale, window_left, window_right, _native.code(q),
        *_native.stream(backend, q),
    )  # fmt: skip
    return out, lse


def _wide(t: Tensor, heads: int) -> Tensor:
    """In the computing dtype, key-value heads repeated to `heads`."""
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32).repeat_interleave(heads // t.shape[2], 2)


def _forward_torch(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window_left: int, window_right: int
) -> tuple[Tensor, Tensor]:
    H = q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        S = _scores(_wide(q, H), _wide(k, H), softmax_scale, window_left, window_right)
        lse = torch.logsumexp(S, -1)
        P = torch.exp(S - lse.masked_fill(lse.isneginf(), 0)[..., None])
        out = torch.einsum("bhij,bjhd->bihd", P, _wide(v, H))
    return out.to(q.dtype).contiguous(), lse.contiguous()


def _fake(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window_left: int, window_right: int, backend: str
) -> tuple[Tensor, Tensor]:
    B, T_q, H, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((B, T_q, H, v.shape[3])), q.new_empty((B, H, T_q), dtype=wide)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "torch":
        return _backward_torch(dout, dlse, q, k, v, out, lse, softmax_scale, window_left, window_right)
    q, k, v, dout = (_native.unit_stride(t) for t in (q, k, v, dout))
    dlse = None if dlse is None else dlse.contiguous()
    if backend == "triton":
        from llmcore.kernels import attention as kernel

        return kernel.attention_bwd(dout, dlse, q, k, v, out, lse, softmax_scale, window_left, window_right)
    dq, dk, dv = _native.empty_like(q), _native.empty_like(k), _native.empty_like(v)
    (B, T_q, H, D), (_, T_k, K, Dv) = q.shape, v.shape
    _native.module(backend).attention_bwd(
        dout.data_ptr(), _native.ptr(dlse), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(),
        dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), B, H, K, T_q, T_k, D, Dv, *dout.stride()[:3], *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], softmax_scale, window_left, window_right, _native.code(q),
        *_native.stream(backend, q),
    )  # fmt: skip
    return dq, dk, dv


def _backward_torch(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    H = q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        q_w, k_w, v_w, dout_w = (_wide(t, H) for t in (q, k, v, dout))
        S = _scores(q_w, k_w, softmax_scale, window_left, window_right)
        P = torch.exp(S - lse.masked_fill(lse.isneginf(), 0)[..., None])
        delta = (dout_w * out.to(dout_w.dtype)).sum(-1).transpose(1, 2)
        if dlse is not None:
            delta = delta - dlse
        dv = torch.einsum("bhij,bihd->bjhd", P, dout_w)
        dS = P * (torch.einsum("bihd,bjhd->bhij", dout_w, v_w) - delta[..., None]) * softmax_scale
        dq = torch.einsum("bhij,bjhd->bihd", dS, k_w)
        dk = torch.einsum("bhij,bihd->bjhd", dS, q_w)
    dk, dv = (
        d.unflatten(2, (t.shape[2], H // t.shape[2])).sum(3).to(t.dtype).contiguous() for d, t in ((dk, k), (dv, v))
    )
    return dq.to(q.dtype).contiguous(), dk, dv


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _native.empty_like(q), _native.empty_like(k), _native.empty_like(v)
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.softmax_scale, ctx.window_left, ctx.window_right, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *outputs)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * 7
        dout = torch.zeros_like(out)
    grads = _attention_backward(
        dout, dlse, q, k, v, out, lse, ctx.softmax_scale, ctx.window_left, ctx.window_right, ctx.backend
    )
    return (*grads, None, None, None, None)


_attention = operator(
    "attention(Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, int window_right, str backend)"
    " -> (Tensor out, Tensor lse)",
    _forward,
    _fake,
    _save,
    _differentiate,
)
_attention_backward = operator(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float softmax_scale, int window_left, int window_right, str backend) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_fake,
)
