"""The causal convolution over time in front of a state-space model (Gu & Dao, 2023, arXiv:2312.00752).

    pre_t = bias + sum_k weight_k x_t-(W-1)+k       y_t = pre_t or silu(pre_t), each channel by itself
    g_t = dy_t act'(pre_t)    dx_t = sum_k weight_k g_t+(W-1)-k    dweight_k = sum g_t x_t-(W-1)+k    dbias = sum g_t

x and y: (B, D, L) of any strides. A program holds a tile of channels and steps, long in the direction that is
contiguous in memory, and loads it once for every tap: but for the first time it is in the cache. In the same way the
backward computes g at a step and at those after it that have read it. Sums over steps are partial sums of fixed parts
of a sequence, which PyTorch adds up: no atomics, the same result every time.

Inputs outside a step's own document, [begin, end), are the document's state or nothing. Documents are a sequence each;
or lie between the offsets of cu_seqlens, where each step looks for its own; or are runs of equal numbers in seq_idx,
whose begin and end are looked for as far as a filter reaches.
"""

# Kernels gather a filter's taps in tuples, one by one.
# mypy: disable-error-code=assignment

import torch
import triton
import triton.language as tl

from . import device

# Per architecture and contiguous direction, the tile (channels, steps) of the forward and of the backward.
TILES = {
    "sm_90": {"channels": ((64, 16), (64, 4)), "steps": ((2, 512), (1, 256))},
    "sm_80": {"channels": ((64, 16), (64, 4)), "steps": ((2, 512), (1, 256))},
    "sm_86": {"channels": ((64, 16), (64, 4)), "steps": ((2, 512), (1, 256))},
    device.INTERPRETER: {"channels": ((64, 256), (64, 256)), "steps": ((64, 256), (64, 256))},
}
WARPS = 4
PART = 512  # steps whose gradients of the filter are one partial sum
CHANNELS = 128  # of a program that deals with states


@triton.jit
def _document_of(step, cu_seqlens_ptr, documents, rounds):
    """The document of each step, by bisection: the last that begins no later."""
    low = tl.zeros_like(step)
    high = low + documents
    for _ in range(rounds):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens_ptr + middle) <= step
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def _span(
    step, batch, length, cu_seqlens_ptr, documents, rounds, seq_idx_ptr, seq_idx_stride_b, seq_idx_stride_t,
    REACH: tl.constexpr,
):  # fmt: skip
    """(begin, end, row of the states) of each step's document; an empty one where there is no step."""
    inside = step < length
    begin = tl.zeros_like(step)
    end = tl.where(inside, length, 0)
    row = begin + batch
    if cu_seqlens_ptr is not None:
        row = _document_of(step, cu_seqlens_ptr, documents, rounds)
        begin = tl.load(cu_seqlens_ptr + row, mask=inside, other=0)
        end = tl.load(cu_seqlens_ptr + row + 1, mask=inside, other=0)
    if seq_idx_ptr is not None:
        numbers = seq_idx_ptr + batch.to(tl.int64) * seq_idx_stride_b
        own = tl.load(numbers + step.to(tl.int64) * seq_idx_stride_t, mask=inside, other=0)
        begin = step
        end = tl.where(inside, step + 1, 0)
        back = inside
        ahead = inside
        for i in tl.static_range(1, REACH + 1):
            back = back & (step >= i)
            earlier = tl.load(numbers + (step - i).to(tl.int64) * seq_idx_stride_t, mask=back, other=0)
            back = back & (earlier == own)
            begin -= back.to(tl.int32)
            ahead = ahead & (step + i < length)
            later = tl.load(numbers + (step + i).to(tl.int64) * seq_idx_stride_t, mask=ahead, other=0)
            ahead = ahead & (later == own)
            end += ahead.to(tl.int32)
    return begin, end, row


@triton.jit
def _input(x_ptr, x_stride_t, state_ptr, state_stride_b, state_stride_t, step, begin, end, row, mask, before):
    """x at each step, the state's inputs before `begin`; x_ptr and state_ptr are at the channels."""
    inside = (step >= begin) & (step < end) & mask
    x = tl.load(x_ptr + step.to(tl.int64) * x_stride_t, mask=inside, other=0.0).to(tl.float32)
    if state_ptr is not None:
        place = state_ptr + row.to(tl.int64) * state_stride_b + (step - begin + before) * state_stride_t
        early = (step < begin) & (step >= begin - before) & mask
        x += tl.load(place, mask=early, other=0.0).to(tl.float32)
    return x


@triton.jit
def _tap(weight_ptr, weight_stride_d, weight_stride_w, channel, channels, k: tl.constexpr):
    return tl.load(weight_ptr + channel * weight_stride_d + k * weight_stride_w, mask=channel < channels, other=0.0).to(
        tl.float32
    )


@triton.jit
def _bias(bias_ptr, bias_stride, channel, channels):
    bias = tl.zeros(channel.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel * bias_stride, mask=channel < channels, other=0.0).to(tl.float32)
    return bias


@triton.jit(do_not_specialize=["documents", "rounds"])
def causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, cu_seqlens_ptr, seq_idx_ptr, y_ptr, channels, length, documents, rounds,
    x_stride_b, x_stride_d, x_stride_t, y_stride_b, y_stride_d, y_stride_t,
    weight_stride_d, weight_stride_w, bias_stride,
    initial_stride_b, initial_stride_d, initial_stride_t, seq_idx_stride_b, seq_idx_stride_t,
    W: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, BLOCK_T)
    bands = tl.cdiv(channels, BLOCK_D)
    batch = tl.program_id(0) // (tiles * bands)
    channel = ((tl.program_id(0) // tiles) % bands).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    step = (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    begin, end, row = _span(
        step, batch, length, cu_seqlens_ptr, documents, rounds, seq_idx_ptr, seq_idx_stride_b, seq_idx_stride_t, W - 1
    )
    mask = (channel < channels) & (step < length)
    x_ptr += batch.to(tl.int64) * x_stride_b + channel * x_stride_d
    if initial_ptr is not None:
        initial_ptr += channel * initial_stride_d
    pre = tl.zeros((BLOCK_D, BLOCK_T), tl.float32) + _bias(bias_ptr, bias_stride, channel, channels)
    for k in tl.static_range(W):
        x = _input(
            x_ptr, x_stride_t, initial_ptr, initial_stride_b, initial_stride_t, step - (W - 1 - k), begin, end, row,
            mask, W - 1,
        )  # fmt: skip
        pre += _tap(weight_ptr, weight_stride_d, weight_stride_w, channel, channels, k) * x
    if SILU:
        pre *= tl.sigmoid(pre)
    y = y_ptr + batch.to(tl.int64) * y_stride_b + channel * y_stride_d + step.to(tl.int64) * y_stride_t
    tl.store(y, pre.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["documents", "rounds"])
def causal_conv1d_bwd_kernel(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, cu_seqlens_ptr, seq_idx_ptr, dx_ptr, partial_ptr,
    channels, length, documents, rounds,
    dy_stride_b, dy_stride_d, dy_stride_t, dfinal_stride_b, dfinal_stride_d, dfinal_stride_t,
    x_stride_b, x_stride_d, x_stride_t, dx_stride_b, dx_stride_d, dx_stride_t,
    weight_stride_d, weight_stride_w, bias_stride, initial_stride_b, initial_stride_d, initial_stride_t,
    seq_idx_stride_b, seq_idx_stride_t,
    W: tl.constexpr, SILU: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(length, PART)
    bands = tl.cdiv(channels, BLOCK_D)
    batch = tl.program_id(0) // (parts * bands)
    part = tl.program_id(0) % parts
    channel = ((tl.program_id(0) // parts) % bands).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    x_ptr += batch.to(tl.int64) * x_stride_b + channel * x_stride_d
    dy_ptr += batch.to(tl.int64) * dy_stride_b + channel * dy_stride_d
    dx = dx_ptr + batch.to(tl.int64) * dx_stride_b + channel * dx_stride_d
    if initial_ptr is not None:
        initial_ptr += channel * initial_stride_d
    bias = _bias(bias_ptr, bias_stride, channel, channels)
    taps = ()
    sums = (tl.zeros((BLOCK_D, BLOCK_T), tl.float32),)
    for k in tl.static_range(W):
        taps = taps + (_tap(weight_ptr, weight_stride_d, weight_stride_w, channel, channels, k),)
        sums = sums + (tl.zeros((BLOCK_D, BLOCK_T), tl.float32),)
    for start in range(part * PART, min((part + 1) * PART, length), BLOCK_T):
        step = start + tl.arange(0, BLOCK_T)[None, :]
        begin, end, row = _span(
            step, batch, length, cu_seqlens_ptr, documents, rounds, seq_idx_ptr, seq_idx_stride_b, seq_idx_stride_t,
            W - 1,
        )  # fmt: skip
        mask = (channel < channels) & (step < length)
        inputs = ()
        for i in tl.static_range(2 * W - 1):  # those that the steps from `step` to W - 1 later read
            if SILU or i < W:
                x = _input(
                    x_ptr, x_stride_t, initial_ptr, initial_stride_b, initial_stride_t, step + (i - (W - 1)), begin,
                    end, row, mask, W - 1,
                )  # fmt: skip
                inputs = inputs + (x,)
        gradient = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
        for later in tl.static_range(W):
            own = (step + later < end) & mask
            g = tl.load(dy_ptr + (step + later).to(tl.int64) * dy_stride_t, mask=own, other=0.0).to(tl.float32)
            if SILU:
                pre = tl.zeros((BLOCK_D, BLOCK_T), tl.float32) + bias
                for k in tl.static_range(W):
                    pre += taps[k] * inputs[later + k]
                sigmoid = tl.sigmoid(pre)
                g = tl.where(own, g * (sigmoid * (1.0 + pre * (1.0 - sigmoid))), 0.0)
            gradient += taps[W - 1 - later] * g
            if later == 0:
                added = (sums[0] + g,)
                for k in tl.static_range(W):
                    added = added + (sums[k + 1] + g * inputs[k],)
                sums = added
        if dfinal_ptr is not None:
            kept = step - (end - (W - 1))
            place = dfinal_ptr + row.to(tl.int64) * dfinal_stride_b + channel * dfinal_stride_d + kept * dfinal_stride_t
            gradient += tl.load(place, mask=mask & (kept >= 0), other=0.0).to(tl.float32)
        tl.store(dx + step.to(tl.int64) * dx_stride_t, gradient.to(dx_ptr.dtype.element_ty), mask=mask)
    # (parts of all sequences, W + 1, channels), the bias last
    partial = partial_ptr + (batch * parts + part).to(tl.int64) * (W + 1) * channels + channel
    tl.store(partial + W * channels, tl.sum(sums[0], axis=1, keep_dims=True), mask=channel < channels)
    for k in tl.static_range(W):
        tl.store(partial + k * channels, tl.sum(sums[k + 1], axis=1, keep_dims=True), mask=channel < channels)


@triton.jit
def causal_conv1d_final_kernel(
    x_ptr, initial_ptr, cu_seqlens_ptr, final_ptr, channels, length,
    x_stride_b, x_stride_d, x_stride_t, initial_stride_b, initial_stride_d, initial_stride_t,
    W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The last inputs of every document, for a row of contiguous final states and a band of channels."""
    row = tl.program_id(0)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    batch = row
    begin = 0
    end = length
    if cu_seqlens_ptr is not None:
        batch = 0
        begin = tl.load(cu_seqlens_ptr + row)
        end = tl.load(cu_seqlens_ptr + row + 1)
    x_ptr += tl.cast(batch, tl.int64) * x_stride_b + channel * x_stride_d
    if initial_ptr is not None:
        initial_ptr += channel * initial_stride_d
    place = tl.arange(0, 4)[None, :]
    mask = (channel < channels) & (place < W - 1)
    x = _input(
        x_ptr, x_stride_t, initial_ptr, initial_stride_b, initial_stride_t, end - (W - 1) + place, begin, end, row,
        mask, W - 1,
    )  # fmt: skip
    final = final_ptr + (row.to(tl.int64) * channels + channel) * (W - 1) + place
    tl.store(final, x.to(final_ptr.dtype.element_ty), mask=mask)


@triton.jit
def causal_conv1d_bwd_initial_kernel(
    dy_ptr, dfinal_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, cu_seqlens_ptr, dinitial_ptr, channels, length,
    dy_stride_b, dy_stride_d, dy_stride_t, dfinal_stride_b, dfinal_stride_d, dfinal_stride_t,
    x_stride_b, x_stride_d, x_stride_t, weight_stride_d, weight_stride_w, bias_stride,
    initial_stride_b, initial_stride_d, initial_stride_t,
    W: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a row of contiguous initial states, for a band of channels: dx before the first step."""
    row = tl.program_id(0)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = row
    begin = 0
    end = length
    if cu_seqlens_ptr is not None:
        batch = 0
        begin = tl.load(cu_seqlens_ptr + row)
        end = tl.load(cu_seqlens_ptr + row + 1)
    mask = channel < channels
    x_ptr += tl.cast(batch, tl.int64) * x_stride_b + channel * x_stride_d
    dy_ptr += tl.cast(batch, tl.int64) * dy_stride_b + channel * dy_stride_d
    initial_ptr += channel * initial_stride_d
    zeros = tl.zeros((BLOCK_D,), tl.float32)
    bias = _bias(bias_ptr, bias_stride, channel, channels)
    taps = ()
    gs = ()
    for k in tl.static_range(W):
        taps = taps + (_tap(weight_ptr, weight_stride_d, weight_stride_w, channel, channels, k),)
    for i in tl.static_range(W - 1):
        step = begin + i
        own = mask & (step < end)
        g = tl.load(dy_ptr + tl.cast(step, tl.int64) * dy_stride_t, mask=own, other=0.0).to(tl.float32)
        if SILU:
            pre = zeros + bias
            for k in tl.static_range(W):
                at = tl.zeros((BLOCK_D,), tl.int32) + (step - (W - 1) + k)
                pre += taps[k] * _input(
                    x_ptr, x_stride_t, initial_ptr, initial_stride_b, initial_stride_t, at, begin, end, row, mask, W - 1
                )
            sigmoid = tl.sigmoid(pre)
            g = tl.where(own, g * (sigmoid * (1.0 + pre * (1.0 - sigmoid))), 0.0)
        gs = gs + (g,)
    for j in tl.static_range(W - 1):
        gradient = zeros
        for k in tl.static_range(j + 1):
            gradient += taps[k] * gs[j - k]
        if dfinal_ptr is not None:
            kept = j - (end - begin)
            place = dfinal_ptr + row.to(tl.int64) * dfinal_stride_b + channel * dfinal_stride_d + kept * dfinal_stride_t
            gradient += tl.load(place, mask=mask & (kept >= 0), other=0.0).to(tl.float32)
        dinitial = dinitial_ptr + (row.to(tl.int64) * channels + channel) * (W - 1) + j
        tl.store(dinitial, gradient.to(dinitial_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["steps"])
def causal_conv1d_update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr, channels, steps, remembered,
    x_stride_b, x_stride_d, x_stride_t, state_stride_b, state_stride_d, state_stride_t,
    y_stride_b, y_stride_d, y_stride_t,
    weight_stride_d, weight_stride_w, bias_stride,
    W: tl.constexpr, SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    mask = channel < channels
    x_ptr += batch * x_stride_b + channel * x_stride_d
    state = state_ptr + batch * state_stride_b + channel * state_stride_d
    y = y_ptr + batch * y_stride_b + channel * y_stride_d
    bias = _bias(bias_ptr, bias_stride, channel, channels)
    for t in range(steps):
        pre = bias
        for k in tl.static_range(W):
            at = tl.zeros((BLOCK_D, 1), tl.int32) + (t - (W - 1) + k)
            x = _input(x_ptr, x_stride_t, state, 0, state_stride_t, at, 0, steps, batch, mask, remembered)
            pre += _tap(weight_ptr, weight_stride_d, weight_stride_w, channel, channels, k) * x
        if SILU:
            pre *= tl.sigmoid(pre)
        tl.store(y + t * y_stride_t, pre.to(y_ptr.dtype.element_ty), mask=mask)
    place = tl.arange(0, BLOCK_N)[None, :]
    at = steps - remembered + place
    kept = _input(x_ptr, x_stride_t, state, 0, state_stride_t, at, 0, steps, batch, mask, remembered)
    tl.debug_barrier()  # all threads of this program have read the state before one of them writes it
    kept = kept.to(state_ptr.dtype.element_ty)
    tl.store(state + place * state_stride_t, kept, mask=mask & (place < remembered))


def _strides(t: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if t is None else t.stride()


def _filter_strides(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, ...]:
    return (*weight.stride(), *_strides(bias, 1))


def _tile(x: torch.Tensor, direction: int) -> dict[str, int]:
    """direction: 0 forward, 1 backward."""
    layout = "channels" if x.stride(1) == 1 and x.stride(2) != 1 else "steps"
    block_d, block_t = TILES[device.architecture(x.device)][layout][direction]
    return {"BLOCK_D": block_d, "BLOCK_T": block_t, "num_warps": WARPS}


def _documents(cu_seqlens: torch.Tensor | None) -> tuple[int, int]:
    """(number, halvings that single one out)"""
    count = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return count, max(count - 1, 0).bit_length()


def causal_conv1d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    silu: bool,
    y: torch.Tensor,
    final: torch.Tensor | None,
) -> None:
    """Fills y, of any strides, and the contiguous final states; cu_seqlens is contiguous."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    with device.current(x.device):
        if y.numel():
            tile = _tile(x, 0)
            grid = (batch * triton.cdiv(channels, tile["BLOCK_D"]) * triton.cdiv(length, tile["BLOCK_T"]),)
            causal_conv1d_fwd_kernel[grid](
                x, weight, bias, initial, cu_seqlens, seq_idx, y, channels, length, *_documents(cu_seqlens),
                *x.stride(), *y.stride(), *_filter_strides(weight, bias), *_strides(initial, 3), *_strides(seq_idx, 2),
                W=width, SILU=silu, **tile,
            )  # fmt: skip
        if final is not None and final.numel():
            causal_conv1d_final_kernel[(final.shape[0], triton.cdiv(channels, CHANNELS))](
                x, initial, cu_seqlens, final, channels, length, *x.stride(), *_strides(initial, 3),
                W=width, BLOCK_D=CHANNELS, num_warps=WARPS,
            )  # fmt: skip


def causal_conv1d_bwd(
    dy: torch.Tensor,
    dfinal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    silu: bool,
    dx: torch.Tensor,
    dinitial: torch.Tensor | None,
) -> torch.Tensor:
    """Fills dx, of any strides, and the contiguous dinitial. Returns the gradients of the taps and, last, of the bias:
    (parts, W + 1, D) in float32, to be summed over the parts."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    parts = triton.cdiv(length, PART)
    partial = torch.empty((batch * parts, width + 1, channels), dtype=torch.float32, device=x.device)
    filter_strides = _filter_strides(weight, bias)
    with device.current(x.device):
        if dx.numel():
            tile = _tile(x, 1)
            causal_conv1d_bwd_kernel[(batch * triton.cdiv(channels, tile["BLOCK_D"]) * parts,)](
                dy, dfinal, x, weight, bias, initial, cu_seqlens, seq_idx, dx, partial, channels, length,
                *_documents(cu_seqlens), *dy.stride(), *_strides(dfinal, 3), *x.stride(), *dx.stride(), *filter_strides,
                *_strides(initial, 3), *_strides(seq_idx, 2), W=width, SILU=silu, PART=PART, **tile,
            )  # fmt: skip
        if dinitial is not None and dinitial.numel():
            causal_conv1d_bwd_initial_kernel[(dinitial.shape[0], triton.cdiv(channels, CHANNELS))](
                dy, dfinal, x, weight, bias, initial, cu_seqlens, dinitial, channels, length, *dy.stride(),
                *_strides(dfinal, 3), *x.stride(), *filter_strides, *_strides(initial, 3),
                W=width, SILU=silu, BLOCK_D=CHANNELS, num_warps=WARPS,
            )  # fmt: skip
    return partial


def causal_conv1d_update(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool, y: torch.Tensor
) -> None:
    """x, y: (B, D, T); state: (B, D, N), brought up to date in place. Any strides."""
    batch, channels, steps = x.shape
    remembered = state.shape[2]
    block_n = triton.next_power_of_2(remembered)
    block_d = max(1, 512 // block_n)
    with device.current(x.device):
        causal_conv1d_update_kernel[(batch, triton.cdiv(channels, block_d))](
            x, state, weight, bias, y, channels, steps, remembered, *x.stride(), *state.stride(), *y.stride(),
            *_filter_strides(weight, bias), W=weight.shape[1], SILU=silu, BLOCK_D=block_d, BLOCK_N=block_n,
            num_warps=WARPS,
        )  # fmt: skip
