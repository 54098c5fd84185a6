"""Selective scan (Gu and Dao, 2023, arXiv:2312.00752), forward and backward; the maths is in its op's module.

A program takes a few channels of one sequence through their chunks of CHUNK steps. The steps of a chunk are combined in
parallel: h_t = a_t h_t-1 + x_t is an associative scan over the pairs (a, x) (Blelloch, 1990), on a tile of channels x
steps x states that stays in registers. Where there are too few channels to fill the device, a long sequence is cut into
segments that run side by side: a first pass finds what each does to the state that enters it, a short one hands the
states on, and then every segment starts from its own.

Documents: `starts` and `ends` hold, for every step, the document that begins or ends with it, or -1.
"""

import torch
import triton
import triton.language as tl

from . import device
from .scan_math import decay_of, sigmoid, softplus

CHUNK = 64
# Per architecture, forward and backward: elements of a tile, and elements per warp.
TILES = {
    "sm_90": ((4096, 1024), (1024, 128)),
    "sm_80": ((4096, 1024), (1024, 128)),
    "sm_86": ((4096, 1024), (1024, 128)),
    device.INTERPRETER: ((16384, 4096), (16384, 4096)),
}
SEGMENT = 8 * CHUNK  # steps, where a sequence is cut


@triton.jit
def _combine(a_left, x_left, a_right, x_right):
    return a_right * a_left, a_right * x_left + x_right


@triton.jit
def _block(ptr, batch, channel, step, i, t, stride_b, stride_d, stride_t):
    """Pointers to channels `channel` + i and steps `step` + t of a (batch, channels, length) tensor. Only where the
    block begins needs 64 bits."""
    begin = batch * stride_b + channel * stride_d + tl.cast(step, tl.int64) * stride_t
    return ptr + begin + (i * stride_d + t * stride_t)


@triton.jit
def _states_block(ptr, batch, group, step, n, t, stride_b, stride_g, stride_n, stride_t):
    """Pointers to states n and steps `step` + t of a (batch, groups, states, length) tensor."""
    begin = batch * stride_b + group * stride_g + tl.cast(step, tl.int64) * stride_t
    return ptr + begin + (n * stride_n + t * stride_t)


@triton.jit
def _wide(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _place(channels, groups, BLOCK_D: tl.constexpr):
    """Of this program: sequence, group, first channel; its channels from there on (BLOCK_D, 1), and which there are."""
    per_group = channels // groups
    blocks = tl.cdiv(per_group, BLOCK_D)
    group = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_D
    i = tl.arange(0, BLOCK_D)[:, None]
    return (
        tl.program_id(1).to(tl.int64),
        group.to(tl.int64),
        (group * per_group + first).to(tl.int64),
        i,
        first + i < per_group,
    )


@triton.jit(do_not_specialize=["length", "segment"])
def selective_scan_fwd_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, entering_ptr, starts_ptr, ends_ptr,
    y_ptr, last_ptr, saved_ptr, leaving_ptr, decay_ptr, channels, length, states, groups, segment,
    u_stride_b, u_stride_d, u_stride_t, delta_stride_b, delta_stride_d, delta_stride_t,
    B_stride_b, B_stride_g, B_stride_n, B_stride_t, C_stride_b, C_stride_g, C_stride_n, C_stride_t,
    z_stride_b, z_stride_d, z_stride_t, y_stride_b, y_stride_d, y_stride_t,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Steps of one segment. Without y_ptr only what the segment does to the state is found: it leaves `leaving` from a
    state of zeros, and `decay` of the state that enters. `entering` (batch, segments, channels, states) are the states
    that the segments start from; without it there is one segment, which starts from `initial`."""
    batch, group, channel, i, there = _place(channels, groups, BLOCK_D)
    state = tl.arange(0, BLOCK_N)[None, :]
    known = there & (state < states)
    own = i * states + state
    of_channels = channel * states  # where the states of this program's channels begin
    A = tl.load(A_ptr + of_channels + own, mask=known, other=0.0)
    h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    rows = (batch * tl.num_programs(2) + tl.program_id(2)) * channels * states + of_channels
    if entering_ptr is not None:
        h = tl.load(entering_ptr + rows + own, mask=known, other=0.0)
    elif initial_ptr is not None and starts_ptr is None and y_ptr is not None:
        h = tl.load(initial_ptr + (batch * channels * states + of_channels) + own, mask=known, other=0.0)
    bias = tl.zeros((BLOCK_D, 1), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel + i, mask=there, other=0.0)
    through = tl.full((BLOCK_D, BLOCK_N), 1.0, tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    begin = tl.program_id(2) * segment
    for first in range(begin, tl.minimum(begin + segment, length), CHUNK):
        if saved_ptr is not None:
            row = ((batch * chunks + first // CHUNK) * states * channels + channel) + (state * channels + i)
            tl.store(saved_ptr + row, h, mask=known)
        t = tl.arange(0, CHUNK)[None, :]
        step = first + t
        mask = there & (step < length)
        dt = (
            _wide(_block(delta_ptr, batch, channel, first, i, t, delta_stride_b, delta_stride_d, delta_stride_t), mask)
            + bias
        )
        if SOFTPLUS:
            dt = softplus(dt)
        dt = tl.where(mask, dt, 0.0)  # a step beyond the end leaves the state as it is
        u = _wide(_block(u_ptr, batch, channel, first, i, t, u_stride_b, u_stride_d, u_stride_t), mask)
        time = first + tl.arange(0, CHUNK)[:, None]
        of_states = (time < length) & (state < states)
        B = _wide(
            _states_block(
                B_ptr,
                batch,
                group,
                first,
                state,
                tl.arange(0, CHUNK)[:, None],
                B_stride_b,
                B_stride_g,
                B_stride_n,
                B_stride_t,
            ),
            of_states,
        )
        a = decay_of(dt[:, :, None] * A[:, None, :])
        x = (dt * u)[:, :, None] * B[None, :, :]
        if starts_ptr is not None:
            document = tl.load(starts_ptr + step, mask=step < length, other=-1)[:, :, None]
            if initial_ptr is not None:
                row = document.to(tl.int64) * channels * states + (of_channels + own)[:, None, :]
                x += a * tl.load(initial_ptr + row, mask=(document >= 0) & known[:, None, :], other=0.0)
            a = tl.where(document >= 0, 0.0, a)
        a, x = tl.associative_scan((a, x), 1, _combine)
        all_h = x + a * h[:, None, :]
        is_last = (tl.arange(0, CHUNK) == CHUNK - 1)[None, :, None]
        h = tl.sum(tl.where(is_last, all_h, 0.0), 1)
        if decay_ptr is not None:
            through *= tl.sum(tl.where(is_last, a, 0.0), 1)
        if y_ptr is not None:
            if ends_ptr is not None:
                document = tl.load(ends_ptr + step, mask=step < length, other=-1)[:, :, None]
                row = document.to(tl.int64) * channels * states + (of_channels + own)[:, None, :]
                tl.store(last_ptr + row, all_h, mask=(document >= 0) & known[:, None, :])
            C = _wide(
                _states_block(
                    C_ptr,
                    batch,
                    group,
                    first,
                    state,
                    tl.arange(0, CHUNK)[:, None],
                    C_stride_b,
                    C_stride_g,
                    C_stride_n,
                    C_stride_t,
                ),
                of_states,
            )
            y = tl.sum(all_h * C[None, :, :], 2)
            if D_ptr is not None:
                y += tl.load(D_ptr + channel + i, mask=there, other=0.0) * u
            if z_ptr is not None:
                z = _wide(_block(z_ptr, batch, channel, first, i, t, z_stride_b, z_stride_d, z_stride_t), mask)
                y *= z * sigmoid(z)
            place = _block(y_ptr, batch, channel, first, i, t, y_stride_b, y_stride_d, y_stride_t)
            tl.store(place, y.to(y_ptr.dtype.element_ty), mask=mask)
    if leaving_ptr is not None:
        tl.store(leaving_ptr + rows + own, h, mask=known)
        tl.store(decay_ptr + rows + own, through, mask=known)
    if last_ptr is not None and ends_ptr is None and tl.program_id(2) == tl.num_programs(2) - 1:
        tl.store(last_ptr + (batch * channels * states + of_channels) + own, h, mask=known)


@triton.jit(do_not_specialize=["segments"])
def selective_scan_carry_kernel(
    first_ptr, leaving_ptr, decay_ptr, entering_ptr, segments, size, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    """entering[s] = leaving[s - 1] + decay[s - 1] entering[s - 1], from `first` (batch, size) or zeros; BACKWARD goes
    from the last segment to the first."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.zeros((BLOCK,), tl.float32)
    if first_ptr is not None:
        h = tl.load(first_ptr + batch * size + i, mask=i < size, other=0.0)
    for j in range(segments):
        s = segments - 1 - j if BACKWARD else j
        row = (batch * segments + s) * size + i
        tl.store(entering_ptr + row, h, mask=i < size)
        h = tl.load(leaving_ptr + row, mask=i < size, other=0.0) + h * tl.load(
            decay_ptr + row, mask=i < size, other=0.0
        )


@triton.jit(do_not_specialize=["length", "segment"])
def selective_scan_bwd_kernel(
    dy_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, dlast_ptr, entering_ptr,
    starts_ptr, ends_ptr, saved_ptr, du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr,
    dinitial_ptr, leaving_ptr, decay_ptr, channels, length, states, groups, segment,
    dy_stride_b, dy_stride_d, dy_stride_t, u_stride_b, u_stride_d, u_stride_t,
    delta_stride_b, delta_stride_d, delta_stride_t,
    B_stride_b, B_stride_g, B_stride_n, B_stride_t, C_stride_b, C_stride_g, C_stride_n, C_stride_t,
    z_stride_b, z_stride_d, z_stride_t, du_stride_b, du_stride_d, du_stride_t,
    ddelta_stride_b, ddelta_stride_d, ddelta_stride_t, dz_stride_b, dz_stride_d, dz_stride_t,
    SOFTPLUS: tl.constexpr, ATOMIC: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Steps of one segment, the last chunk first; e_t = a_t dh_t is the gradient of the state before step t. Without
    du_ptr only what the segment does to the gradient is found: `leaving` and `decay`, as in the forward. dA, dD, dbias
    (batch, segments, ...); dB, dC (batch, groups, states, length), to which programs add; one each without ATOMIC."""
    batch, group, channel, i, there = _place(channels, groups, BLOCK_D)
    state = tl.arange(0, BLOCK_N)[None, :]
    known = there & (state < states)
    own = i * states + state
    of_channels = channel * states  # where the states of this program's channels begin
    A = tl.load(A_ptr + of_channels + own, mask=known, other=0.0)
    segments = tl.num_programs(2)
    part = batch * segments + tl.program_id(2)
    e = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if entering_ptr is not None:
        e = tl.load(entering_ptr + (part * channels * states + of_channels) + own, mask=known, other=0.0)
    elif dlast_ptr is not None and starts_ptr is None and du_ptr is not None:
        e = tl.load(dlast_ptr + (batch * channels * states + of_channels) + own, mask=known, other=0.0)
    bias = tl.zeros((BLOCK_D, 1), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel + i, mask=there, other=0.0)
    skip = tl.zeros((BLOCK_D, 1), tl.float32)
    if D_ptr is not None:
        skip = tl.load(D_ptr + channel + i, mask=there, other=0.0)
    through = tl.full((BLOCK_D, BLOCK_N), 1.0, tl.float32)
    dA = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    dD = tl.zeros((BLOCK_D, 1), tl.float32)
    dbias = tl.zeros((BLOCK_D, 1), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    begin = tl.program_id(2) * segment
    end = tl.minimum(begin + segment, length)
    count = tl.cdiv(end - begin, CHUNK)
    for done in range(count):
        first = begin + (count - 1 - done) * CHUNK
        t = tl.arange(0, CHUNK)[None, :]
        step = first + t
        mask = there & (step < length)
        at_delta = _block(delta_ptr, batch, channel, first, i, t, delta_stride_b, delta_stride_d, delta_stride_t)
        raw = _wide(at_delta, mask) + bias
        after = _wide(at_delta + delta_stride_t, there & (step + 1 < length)) + bias
        before = _wide(at_delta - delta_stride_t, there & (step > first) & (step <= length)) + bias
        dt = raw
        if SOFTPLUS:
            dt, after, before = softplus(raw), softplus(after), softplus(before)
        dt = tl.where(mask, dt, 0.0)
        time = first + tl.arange(0, CHUNK)[:, None]
        of_states = (time < length) & (state < states)
        at_B = _states_block(
            B_ptr,
            batch,
            group,
            first,
            state,
            tl.arange(0, CHUNK)[:, None],
            B_stride_b,
            B_stride_g,
            B_stride_n,
            B_stride_t,
        )
        C = _wide(
            _states_block(
                C_ptr,
                batch,
                group,
                first,
                state,
                tl.arange(0, CHUNK)[:, None],
                C_stride_b,
                C_stride_g,
                C_stride_n,
                C_stride_t,
            ),
            of_states,
        )
        dout = _wide(_block(dy_ptr, batch, channel, first, i, t, dy_stride_b, dy_stride_d, dy_stride_t), mask)
        dy = dout
        if z_ptr is not None:
            z = _wide(_block(z_ptr, batch, channel, first, i, t, z_stride_b, z_stride_d, z_stride_t), mask)
            dy = dout * z * sigmoid(z)

        # dh_t = C_t dy_t + a_t+1 dh_t+1, from the last step back, to which the chunk after this one adds its e
        dh = dy[:, :, None] * C[None, :, :]
        a_after = decay_of(tl.where(step + 1 < length, after, 0.0)[:, :, None] * A[:, None, :])
        is_last = (tl.arange(0, CHUNK) == CHUNK - 1)[None, :, None]
        is_first = (tl.arange(0, CHUNK) == 0)[None, :, None]
        a_after = tl.where(is_last, 1.0, a_after)
        if ends_ptr is not None:
            document = tl.load(ends_ptr + step, mask=step < length, other=-1)[:, :, None]
            if dlast_ptr is not None:
                row = document.to(tl.int64) * channels * states + (of_channels + own)[:, None, :]
                dh += tl.load(dlast_ptr + row, mask=(document >= 0) & known[:, None, :], other=0.0)
            a_after = tl.where(document >= 0, 0.0, a_after)
        a_after, dh = tl.associative_scan((a_after, dh), 1, _combine, reverse=True)
        dh += a_after * e[:, None, :]

        a = decay_of(dt[:, :, None] * A[:, None, :])
        if starts_ptr is not None:
            start = tl.load(starts_ptr + step, mask=step < length, other=-1)[:, :, None]
        e_all = a * dh
        if starts_ptr is not None:
            if dinitial_ptr is not None and du_ptr is not None:
                row = start.to(tl.int64) * channels * states + (of_channels + own)[:, None, :]
                tl.store(dinitial_ptr + row, e_all, mask=(start >= 0) & known[:, None, :])
            e = tl.sum(tl.where(is_first & (start < 0), e_all, 0.0), 1)
        else:
            e = tl.sum(tl.where(is_first, e_all, 0.0), 1)
        if decay_ptr is not None:
            whole = a * a_after
            if starts_ptr is not None:
                whole = tl.where(start < 0, whole, 0.0)
            through *= tl.sum(tl.where(is_first, whole, 0.0), 1)

        if du_ptr is not None:
            u = _wide(_block(u_ptr, batch, channel, first, i, t, u_stride_b, u_stride_d, u_stride_t), mask)
            B = _wide(at_B, of_states)

            # The states before each step: those of the forward, one step later, so that the first is the saved one.
            at_u = _block(u_ptr, batch, channel, first - 1, i, t, u_stride_b, u_stride_d, u_stride_t)
            u_before = _wide(at_u, there & (step > first) & (step <= length))
            B_before = _wide(at_B - B_stride_t, (time > first) & (time <= length) & (state < states))
            before = tl.where((step > first) & (step <= length), before, 0.0)
            a_before = decay_of(before[:, :, None] * A[:, None, :])
            x = (before * u_before)[:, :, None] * B_before[None, :, :]
            row = ((batch * chunks + first // CHUNK) * states * channels + channel) + (state * channels + i)
            saved = tl.load(saved_ptr + row, mask=known & (first > 0), other=0.0)
            if initial_ptr is not None and starts_ptr is None:
                row = (batch * channels * states + of_channels) + own
                saved += tl.load(initial_ptr + row, mask=known & (first == 0), other=0.0)
            x = tl.where(is_first, saved[:, None, :], x)
            if starts_ptr is not None:
                initial = tl.zeros((BLOCK_D, CHUNK, BLOCK_N), tl.float32)
                if initial_ptr is not None:
                    row = start.to(tl.int64) * channels * states + (of_channels + own)[:, None, :]
                    initial = tl.load(initial_ptr + row, mask=(start >= 0) & known[:, None, :], other=0.0)
                x = tl.where(start >= 0, initial, x)
                a_before = tl.where(start >= 0, 0.0, a_before)
            _, h_before = tl.associative_scan((a_before, x), 1, _combine)
            gain = tl.sum(dh * B[None, :, :], 2)
            slope = e_all * h_before
            dA += tl.sum(slope * dt[:, :, None], 1)
            ddt = tl.sum(slope * A[:, None, :], 2) + gain * u
            if SOFTPLUS:
                ddt *= sigmoid(raw)
            ddt = tl.where(mask, ddt, 0.0)
            dbias += tl.sum(ddt, 1, keep_dims=True)
            dD += tl.sum(dy * u, 1, keep_dims=True)
            at_du = _block(du_ptr, batch, channel, first, i, t, du_stride_b, du_stride_d, du_stride_t)
            tl.store(at_du, (gain * dt + skip * dy).to(du_ptr.dtype.element_ty), mask=mask)
            at_ddelta = _block(
                ddelta_ptr, batch, channel, first, i, t, ddelta_stride_b, ddelta_stride_d, ddelta_stride_t
            )
            tl.store(at_ddelta, ddt.to(ddelta_ptr.dtype.element_ty), mask=mask)
            h = a * h_before + (dt * u)[:, :, None] * B[None, :, :]
            if z_ptr is not None:
                p = sigmoid(z)
                y = tl.sum(h * C[None, :, :], 2) + skip * u
                dz = dout * y * p * (1 + z * (1 - p))
                at_dz = _block(dz_ptr, batch, channel, first, i, t, dz_stride_b, dz_stride_d, dz_stride_t)
                tl.store(at_dz, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            dB = tl.sum(dh * (dt * u)[:, :, None], 0)
            dC = tl.sum(h * dy[:, :, None], 0)
            row = batch * groups + group
            if not ATOMIC:
                blocks = tl.cdiv(channels // groups, BLOCK_D)
                row = (tl.program_id(0) % blocks) * tl.num_programs(1) * groups + row
            row = (row * states * length + first) + (state * length + tl.arange(0, CHUNK)[:, None])
            if ATOMIC:
                tl.atomic_add(dB_ptr + row, dB, mask=of_states, sem="relaxed")
                tl.atomic_add(dC_ptr + row, dC, mask=of_states, sem="relaxed")
            else:
                tl.store(dB_ptr + row, dB, mask=of_states)
                tl.store(dC_ptr + row, dC, mask=of_states)
    if leaving_ptr is not None:
        tl.store(leaving_ptr + (part * channels * states + of_channels) + own, e, mask=known)
        tl.store(decay_ptr + (part * channels * states + of_channels) + own, through, mask=known)
    if du_ptr is not None:
        tl.store(dA_ptr + (part * channels * states + of_channels) + own, dA, mask=known)
        if dD_ptr is not None:
            tl.store(dD_ptr + (part * channels + channel) + i, dD, mask=there)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + (part * channels + channel) + i, dbias, mask=there)
        if dinitial_ptr is not None and starts_ptr is None and tl.program_id(2) == 0:
            tl.store(dinitial_ptr + (batch * channels * states + of_channels) + own, e, mask=known)


def _config(A: torch.Tensor, groups: int, backward: bool) -> dict[str, int]:
    channels, states = A.shape
    tile, per_warp = TILES[device.architecture(A.device)][backward]
    block_n = triton.next_power_of_2(states)
    block_d = max(1, min(tile // (CHUNK * block_n), triton.next_power_of_2(channels // groups)))
    warps = min(max(block_d * CHUNK * block_n // per_warp, 1), 16)
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "CHUNK": CHUNK, "num_warps": warps}


def _grid(batch: int, length: int, A: torch.Tensor, groups: int, block_d: int) -> tuple[int, int, int]:
    """Programs for channel blocks, sequences and segments: one segment, unless there is too little to do at once."""
    blocks = groups * triton.cdiv(A.shape[0] // groups, block_d)
    few = blocks * batch < 2 * device.multiprocessors(A.device)
    return blocks, batch, triton.cdiv(length, SEGMENT) if few else 1


def _documents(cu_seqlens: torch.Tensor | None, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """For every step the document that begins, and the one that ends with it, or -1. Nothing waits for the GPU."""
    if cu_seqlens is None:
        return None, None
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    empty = begin == end
    number = torch.arange(begin.shape[0], dtype=torch.int32, device=cu_seqlens.device)
    marks = torch.full((2, length + 1), -1, dtype=torch.int32, device=cu_seqlens.device)
    marks[0].scatter_(0, begin.masked_fill(empty, length), number)
    marks[1].scatter_(0, (end - 1).masked_fill(empty, length), number)
    return marks[0], marks[1]


def _strides(tensor: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()


def _carry(first: torch.Tensor | None, leaving: torch.Tensor, decay: torch.Tensor, backward: bool) -> torch.Tensor:
    """The states that enter the segments; leaving, decay: (batch, segments, channels, states)."""
    batch, segments, channels, states = leaving.shape
    entering, size = torch.empty_like(leaving), channels * states
    selective_scan_carry_kernel[(triton.cdiv(size, 256), batch)](
        first, leaving, decay, entering, segments, size, BACKWARD=backward, BLOCK=256, num_warps=4
    )
    return entering


def selective_scan_fwd(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    delta_softplus: bool,
    y: torch.Tensor,
    last: torch.Tensor,
    saved: torch.Tensor | None,
) -> None:
    """Fills y, last and saved, which the caller has allocated; shapes are the op's, with B and C (B, G, N, L)."""
    batch, channels, length = u.shape
    states, groups = A.shape[1], B.shape[1]
    config = _config(A, groups, False)
    grid = _grid(batch, length, A, groups, config["BLOCK_D"])
    starts, ends = _documents(cu_seqlens, length)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    scalars = (
        channels, length, states, groups, SEGMENT if grid[2] > 1 else length, *u.stride(), *delta.stride(), *B.stride(),
        *C.stride(), *_strides(z, 3), *y.stride(), delta_softplus,
    )  # fmt: skip
    with device.current(u.device):
        entering = None
        if grid[2] > 1:
            leaving = A.new_empty(batch, grid[2], channels, states)
            decay = torch.empty_like(leaving)
            selective_scan_fwd_kernel[grid](
                *inputs, None, starts, ends, None, None, None, leaving, decay, *scalars, **config
            )
            entering = _carry(initial_state if cu_seqlens is None else None, leaving, decay, False)
        selective_scan_fwd_kernel[grid](*inputs, entering, starts, ends, y, last, saved, None, None, *scalars, **config)


def selective_scan_bwd(
    dy: torch.Tensor,
    dlast: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    saved: torch.Tensor,
    delta_softplus: bool,
    dinitial: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """du, ddelta, dA, dB, dC, dD, dz, ddelta_bias; dinitial is filled, where a document has steps."""
    batch, channels, length = u.shape
    states, groups = A.shape[1], B.shape[1]
    config = _config(A, groups, True)
    grid = _grid(batch, length, A, groups, config["BLOCK_D"])
    starts, ends = _documents(cu_seqlens, length)
    atomic = not torch.are_deterministic_algorithms_enabled()
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = None if z is None else torch.empty_like(z)
    dA = A.new_empty(batch * grid[2], channels, states)
    dD, dbias = (None if t is None else A.new_empty(batch * grid[2], channels) for t in (D, delta_bias))
    if atomic:
        dB, dC = (A.new_zeros(batch, groups, states, length) for _ in range(2))
    else:
        dB, dC = (A.new_empty(grid[0] // groups, batch, groups, states, length) for _ in range(2))
    inputs = (dy, u, delta, A, B, C, D, z, delta_bias, initial_state, dlast)
    outputs = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    scalars = (
        channels, length, states, groups, SEGMENT if grid[2] > 1 else length, *dy.stride(), *u.stride(),
        *delta.stride(), *B.stride(), *C.stride(), *_strides(z, 3), *du.stride(), *ddelta.stride(), *_strides(dz, 3),
        delta_softplus, atomic,
    )  # fmt: skip
    with device.current(u.device):
        entering = None
        if grid[2] > 1:
            leaving = A.new_empty(batch, grid[2], channels, states)
            decay = torch.empty_like(leaving)
            selective_scan_bwd_kernel[grid](
                *inputs, None, starts, ends, saved, *(None,) * 9, leaving, decay, *scalars, **config
            )
            entering = _carry(dlast if cu_seqlens is None else None, leaving, decay, True)
        selective_scan_bwd_kernel[grid](
            *inputs, entering, starts, ends, saved, *outputs, None, None, *scalars, **config
        )
    dB, dC = (d if atomic else d.sum(0) for d in (dB, dC))
    dD, dbias = (None if d is None else d.sum(0) for d in (dD, dbias))
    return du, ddelta, dA.sum(0), dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias
