"""ssd, backward, without atomics: the same bits every time.

The states before each chunk are computed again, then the gradients of those after it, in the same way in reverse. With
M_ts = sum over the heads of a group of L_ts (dy_t x_s) dt_s, dB and dC of a chunk are
    dC_t = sum_s M_ts B_s + sum_h L_tb dy_t h_b        dB_s = sum_t M_ts C_t + sum_h dt_s L_es x_s dh_e
so one kernel goes through the heads for blocks of M; a head's share in it, times C_t B_s, is what dl takes sums of.
The maths is in the op's module, what a chunk is in ssd_tiles.py.
"""

import torch
import triton
import triton.language as tl

from . import device
from .scan_math import decay_of, sigmoid
from .ssd_fwd import find_outputs, per_element
from .ssd_tiles import (
    CARRIED,
    chunk_of,
    find_states,
    find_steps,
    load_rows,
    log_sums,
    padded,
    pair_decays,
    plan,
    product,
    step_sizes,
    strides,
)


@triton.jit(do_not_specialize=["length", "slices"])
def ssd_bwd_pairs_kernel(
    dy_ptr, x_ptr, B_ptr, C_ptr, steps_ptr, chunks_ptr, M_ptr, sums_ptr, length, heads, groups, slices,
    dy_stride_b, dy_stride_t, dy_stride_h, x_stride_b, x_stride_t, x_stride_h,
    B_stride_b, B_stride_t, B_stride_g, C_stride_b, C_stride_t, C_stride_g,
    KIND: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of M (K, G, slices, CHUNK, CHUNK), of a slice of a group's heads; and for each head the pairs' shares in
    dl, in sums (K, H, blocks of t, blocks of s, 2, BLOCK_T): summed over s, and over t; of a block on the diagonal,
    whose pairs end where others begin, its part of dl itself."""
    tiles: tl.constexpr = CHUNK // BLOCK_T
    start_t = tl.program_id(0) // tiles % tiles * BLOCK_T
    start_s = tl.program_id(0) % tiles * BLOCK_T
    slice_of_all = tl.program_id(0) // (tiles * tiles)
    k = slice_of_all // (slices * groups)
    sequence, first, count = chunk_of(chunks_ptr, k, length, CHUNK)
    if (start_s > start_t) | (start_t >= count):
        return
    group = (slice_of_all // slices % groups).to(tl.int64)
    per_group = heads // groups
    per_slice = tl.cdiv(per_group, slices)
    begin = slice_of_all % slices * per_slice
    end = tl.minimum(begin + per_slice, per_group)
    dy_of_chunk = dy_ptr + sequence * dy_stride_b + first * dy_stride_t
    x_of_chunk = x_ptr + sequence * x_stride_b + first * x_stride_t
    B_of_group = B_ptr + sequence * B_stride_b + first * B_stride_t + group * B_stride_g
    C_of_group = C_ptr + sequence * C_stride_b + first * C_stride_t + group * C_stride_g
    i = tl.arange(0, BLOCK_T)
    t = start_t + i
    s = start_s + i
    C = load_rows(C_of_group, start_t, count, C_stride_t, N, BLOCK_T, BLOCK_N)
    B = load_rows(B_of_group, start_s, count, B_stride_t, N, BLOCK_T, BLOCK_N)
    zeros = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    products = product(C, tl.trans(B), zeros, KIND)
    M = zeros
    for member in range(begin, end):
        h = group * per_group + member
        row = k.to(tl.int64) * heads + h
        dy = load_rows(dy_of_chunk + h * dy_stride_h, start_t, count, dy_stride_t, P, BLOCK_T, BLOCK_P)
        x = load_rows(x_of_chunk + h * x_stride_h, start_s, count, x_stride_t, P, BLOCK_T, BLOCK_P)
        crossed = product(dy, tl.trans(x), zeros, KIND)
        high_t, low_t = log_sums(steps_ptr, row, t, CHUNK)
        high_s, low_s = log_sums(steps_ptr, row, s, CHUNK)
        crossed *= pair_decays(t[:, None], s[None, :], high_t[:, None], low_t[:, None], high_s[None, :], low_s[None, :])
        crossed *= step_sizes(steps_ptr, row, s, CHUNK)[None, :]
        M += crossed
        shares = crossed * products
        to = sums_ptr + ((row * tiles + start_t // BLOCK_T) * tiles + start_s // BLOCK_T) * (2 * BLOCK_T)
        if start_t == start_s:
            through = tl.cumsum(shares, 1)
            inside = tl.sum(tl.where(i[:, None] > i[None, :], through, 0.0), 0)
            tl.store(to + (i + 1) % BLOCK_T, inside)  # from s to the step after it; of the last step nothing is later
        else:
            tl.store(to + i, tl.sum(shares, 1))
            tl.store(to + BLOCK_T + i, tl.sum(shares, 0))
    to = M_ptr + (slice_of_all.to(tl.int64) * CHUNK + t[:, None]) * CHUNK + s[None, :]
    tl.store(to, M.to(M_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "slices"])
def ssd_bwd_dbc_kernel(
    own_ptr, other_ptr, x_ptr, M_ptr, steps_ptr, states_ptr, chunks_ptr, d_ptr, inner_ptr,
    length, heads, groups, slices, d_stride_slice, own_stride_b, own_stride_t, own_stride_g,
    other_stride_b, other_stride_t, other_stride_g, x_stride_b, x_stride_t, x_stride_h,
    OF_C: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """A block of dB, of one slice of a group's heads, from B, C, x and dh; or OF_C of dC, from C, B, dy and h. In the
    first or second row of inner (K, H, 3, CHUNK): what of C_t dC_t or B_s dB_s of a head comes from the states."""
    tiles: tl.constexpr = CHUNK // BLOCK_T
    start = tl.program_id(0) % tiles * BLOCK_T
    slice_of_all = tl.program_id(0) // tiles
    k = slice_of_all // (slices * groups)
    sequence, first, count = chunk_of(chunks_ptr, k, length, CHUNK)
    if start >= count:
        return
    group = (slice_of_all // slices % groups).to(tl.int64)
    per_group = heads // groups
    per_slice = tl.cdiv(per_group, slices)
    of_group = slice_of_all % slices
    begin = of_group * per_slice
    end = tl.minimum(begin + per_slice, per_group)
    own_of_group = own_ptr + sequence * own_stride_b + first * own_stride_t + group * own_stride_g
    other_of_group = other_ptr + sequence * other_stride_b + first * other_stride_t + group * other_stride_g
    x_of_chunk = x_ptr + sequence * x_stride_b + first * x_stride_t
    M_of_slice = M_ptr + slice_of_all.to(tl.int64) * CHUNK * CHUNK
    i = tl.arange(0, BLOCK_T)
    t = start + i
    n = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if OF_C:
        for at in range(0, start + BLOCK_T, BLOCK_T):
            M = tl.load(M_of_slice + t[:, None] * CHUNK + (at + i)[None, :])
            B = load_rows(other_of_group, at, count, other_stride_t, N, BLOCK_T, BLOCK_N)
            acc = product(M, B, acc, KIND)
    else:
        for at in range(start, count, BLOCK_T):
            M = tl.load(M_of_slice + (at + i)[:, None] * CHUNK + t[None, :])
            C = load_rows(other_of_group, at, count, other_stride_t, N, BLOCK_T, BLOCK_N)
            acc = product(tl.trans(M), C, acc, KIND)
    for member in range(begin, end):
        h = group * per_group + member
        row = k.to(tl.int64) * heads + h
        high, low = log_sums(steps_ptr, row, t, CHUNK)
        if OF_C:
            weight = tl.exp(high + low)
        else:
            high_e, low_e = log_sums(steps_ptr, row, CHUNK - 1, CHUNK)
            weight = tl.exp((high_e - high) + (low_e - low)) * step_sizes(steps_ptr, row, t, CHUNK)
        across = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for p in tl.static_range(0, BLOCK_P, SLAB):
            x = load_rows(x_of_chunk + h * x_stride_h, start, count, x_stride_t, P, BLOCK_T, SLAB, p)
            states = load_rows(states_ptr + row * (P * N), p, P, N, N, SLAB, BLOCK_N)
            across = product(x, states, across, KIND)
        across *= weight[:, None]
        acc += across
        own = load_rows(own_of_group, start, count, own_stride_t, N, BLOCK_T, BLOCK_N).to(tl.float32)
        inner = inner_ptr + (row * 3 + (0 if OF_C else 1)) * CHUNK
        tl.store(inner + t, tl.sum(across * own, 1))
    at = (((sequence * length + first + t) * groups + group) * N)[:, None] + n[None, :]
    to = d_ptr + of_group.to(tl.int64) * d_stride_slice + at
    tl.store(to, acc.to(d_ptr.dtype.element_ty), mask=(t < count)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["length"])
def ssd_bwd_dx_kernel(
    dy_ptr, dout_ptr, z_ptr, x_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, dstates_ptr, chunks_ptr, dx_ptr, dD_ptr, inner_ptr,
    length, heads, groups, dy_stride_b, dy_stride_t, dy_stride_h, dout_stride_b, dout_stride_t, dout_stride_h,
    z_stride_b, z_stride_t, z_stride_h, x_stride_b, x_stride_t, x_stride_h, B_stride_b, B_stride_t, B_stride_g,
    C_stride_b, C_stride_t, C_stride_g, D_stride_h, D_stride_p,
    KIND: tl.constexpr, P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SLAB: tl.constexpr,
):  # fmt: skip
    """A block of dx; x_s v_s in the third row of inner (K, H, 3, CHUNK); its sums of dy x in dD (K, blocks, H, P), with
    dy from dout and the gate: the one that products take may be rounded."""
    tiles: tl.constexpr = CHUNK // BLOCK_T
    tile = tl.program_id(0) % tiles
    start = tile * BLOCK_T
    h = (tl.program_id(0) // tiles % heads).to(tl.int64)
    k = tl.program_id(0) // (tiles * heads)
    sequence, first, count = chunk_of(chunks_ptr, k, length, CHUNK)
    if start >= count:
        return
    row = k.to(tl.int64) * heads + h
    group = h // (heads // groups)
    dy_of_head = dy_ptr + sequence * dy_stride_b + first * dy_stride_t + h * dy_stride_h
    x_of_head = x_ptr + sequence * x_stride_b + first * x_stride_t + h * x_stride_h
    B_of_group = B_ptr + sequence * B_stride_b + first * B_stride_t + group * B_stride_g
    C_of_group = C_ptr + sequence * C_stride_b + first * C_stride_t + group * C_stride_g
    i = tl.arange(0, BLOCK_T)
    s = start + i
    p = tl.arange(0, BLOCK_P)
    high_s, low_s = log_sums(steps_ptr, row, s, CHUNK)
    high_e, low_e = log_sums(steps_ptr, row, CHUNK - 1, CHUNK)

    acc = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for n in tl.static_range(0, BLOCK_N, SLAB):
        B = load_rows(B_of_group, start, count, B_stride_t, N, BLOCK_T, SLAB, n)
        dstates = load_rows(dstates_ptr + row * (P * N), 0, P, N, N, BLOCK_P, SLAB, n)
        acc = product(B, tl.trans(dstates), acc, KIND)
    acc *= tl.exp((high_e - high_s) + (low_e - low_s))[:, None]
    B = load_rows(B_of_group, start, count, B_stride_t, N, BLOCK_T, BLOCK_N)
    for start_t in range(start, count, BLOCK_T):
        t = start_t + i
        high_t, low_t = log_sums(steps_ptr, row, t, CHUNK)
        C = load_rows(C_of_group, start_t, count, C_stride_t, N, BLOCK_T, BLOCK_N)
        weights = product(B, tl.trans(C), tl.zeros((BLOCK_T, BLOCK_T), tl.float32), KIND)
        weights *= pair_decays(t[None, :], s[:, None], high_t[None, :], low_t[None, :], high_s[:, None], low_s[:, None])
        dy = load_rows(dy_of_head, start_t, count, dy_stride_t, P, BLOCK_T, BLOCK_P)
        acc = product(weights, dy, acc, KIND)

    x = load_rows(x_of_head, start, count, x_stride_t, P, BLOCK_T, BLOCK_P).to(tl.float32)
    tl.store(inner_ptr + (row * 3 + 2) * CHUNK + s, tl.sum(x * acc, 1))
    dx = step_sizes(steps_ptr, row, s, CHUNK)[:, None] * acc
    if D_ptr is not None:
        dout_of_head = dout_ptr + sequence * dout_stride_b + first * dout_stride_t + h * dout_stride_h
        dy = load_rows(dout_of_head, start, count, dout_stride_t, P, BLOCK_T, BLOCK_P).to(tl.float32)
        if z_ptr is not None:
            z_of_head = z_ptr + sequence * z_stride_b + first * z_stride_t + h * z_stride_h
            z = load_rows(z_of_head, start, count, z_stride_t, P, BLOCK_T, BLOCK_P).to(tl.float32)
            dy *= z * sigmoid(z)
        D = tl.load(D_ptr + h * D_stride_h + p * D_stride_p, mask=p < P, other=0.0)
        dx += D[None, :] * dy
        to = dD_ptr + ((k.to(tl.int64) * tiles + tile) * heads + h) * P
        tl.store(to + p, tl.sum(dy * x, 0), mask=p < P)
    at = (((sequence * length + first + s) * heads + h) * P)[:, None] + p[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=(s < count)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["length"])
def ssd_bwd_steps_kernel(
    A_ptr, steps_ptr, sums_ptr, inner_ptr, carried_ptr, chunks_ptr, ddt_ptr, dA_ptr, dbias_ptr, length, heads,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, CARRIED_TILES: tl.constexpr, BLOCK_CARRIED: tl.constexpr,
):  # fmt: skip
    """dl of a chunk and head from its parts, and from it ddt, and the chunk's sums for dA and dbias (K, H)."""
    h = (tl.program_id(0) % heads).to(tl.int64)
    k = tl.program_id(0) // heads
    sequence, first, count = chunk_of(chunks_ptr, k, length, CHUNK)
    if count == 0:
        return
    tiles: tl.constexpr = CHUNK // BLOCK_T
    row = k.to(tl.int64) * heads + h
    j = tl.arange(0, CHUNK)
    i = tl.arange(0, BLOCK_T)
    block = j // BLOCK_T
    sums = sums_ptr + row * (tiles * tiles * 2 * BLOCK_T)
    inner = inner_ptr + row * 3 * CHUNK

    tile = tl.arange(0, BLOCK_CARRIED)
    carried = tl.load(carried_ptr + row * CARRIED_TILES + tile, mask=tile < CARRIED_TILES, other=0.0)
    high, low = log_sums(steps_ptr, row, CHUNK - 1, CHUNK)
    diagonal = (block * tiles + block) * 2 * BLOCK_T + j % BLOCK_T
    dl = tl.load(sums + diagonal, mask=block * BLOCK_T < count, other=0.0) + tl.sum(carried, 0) * decay_of(high + low)
    # A pair counts in every step after s up to t, what enters up to t, and what leaves after s.
    for of in range(0, tl.cdiv(count, BLOCK_T)):
        u = of * BLOCK_T + i
        goes_on = u[:, None] >= j[None, :]
        shares = tl.where(goes_on, tl.load(inner + u)[:, None], tl.load(inner + CHUNK + u)[:, None])
        for earlier in range(0, of):
            over_s = tl.load(sums + (of * tiles + earlier) * 2 * BLOCK_T + i)
            shares += tl.where(goes_on & (block > earlier)[None, :], over_s[:, None], 0.0)
        over_t = tl.zeros((BLOCK_T,), tl.float32)
        for later in range(of + 1, tl.cdiv(count, BLOCK_T)):
            over_t += tl.load(sums + (later * tiles + of) * 2 * BLOCK_T + BLOCK_T + i)
        shares += tl.where(~goes_on & (block == of)[None, :], over_t[:, None], 0.0)
        dl += tl.sum(shares, 0)

    step = step_sizes(steps_ptr, row, j, CHUNK)
    slope = tl.load(steps_ptr + (row * 4 + 3) * CHUNK + j)
    there = j < count
    ddt = (tl.load(inner + 2 * CHUNK + j, mask=there, other=0.0) + tl.load(A_ptr + h) * dl) * slope
    ddt = tl.where(there, ddt, 0.0)
    tl.store(dA_ptr + row, tl.sum(tl.where(there, dl * step, 0.0), 0))
    tl.store(dbias_ptr + row, tl.sum(ddt, 0))
    to = ddt_ptr + (sequence * length + first + j) * heads + h
    tl.store(to, ddt.to(ddt_ptr.dtype.element_ty), mask=there)


def ssd_bwd(
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    documents: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    dinitial: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """dx, ddt, dA, dB, dC, dD, dz, ddt_bias, all contiguous; dinitial is filled, where a document has steps. Inputs are
    as in ssd_fwd, dout's last stride is 1, dfinal is contiguous."""
    p = plan(x, B, documents)
    _, length, heads, P, groups, N = p.sizes
    chunk, block = p.tile.chunk, p.tile.block
    blocks = chunk // block
    block_p, block_n = padded(P), padded(N)
    programs = p.num_chunks * groups * blocks
    slices = min(triton.cdiv(2 * device.multiprocessors(x.device), programs), heads // groups)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    ddt = torch.empty_like(dt, memory_format=torch.contiguous_format)
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    if slices == 1:
        dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (B, C))
    else:
        dB, dC = (A.new_empty(slices, *B.shape) for _ in range(2))
    # Chunks of no steps add nothing to these.
    dA, dbias = (A.new_zeros(p.num_chunks, heads) for _ in range(2))
    dD = None if D is None else A.new_zeros(p.num_chunks * blocks, heads, P)
    M = A.new_empty(p.num_chunks, groups, slices, chunk, chunk, dtype=p.operands)
    sums = A.new_empty(p.num_chunks, heads, blocks, blocks, 2, block)
    inner = A.new_empty(p.num_chunks, heads, 3, chunk)
    with device.current(x.device):
        steps = find_steps(p, dt, A, dt_bias, dt_softplus, dt_min, dt_max)
        states, _ = find_states(p, x, B, steps, initial_states, None)
        dy = dout
        if z is not None:
            dy = torch.empty(x.shape, dtype=p.operands, device=x.device)
            find_outputs(p, x, B, C, D, z, dout, steps, states, None, dz, dy)
        dstates, carried = find_states(p, dout, C, steps, dfinal, dinitial, z=z, other=states)
        ssd_bwd_pairs_kernel[(blocks * blocks * slices * groups * p.num_chunks,)](
            dy, x, B, C, steps, p.chunks, M, sums, length, heads, groups, slices,
            *strides(dy), *strides(x), *strides(B), *strides(C),
            BLOCK_P=block_p, BLOCK_N=block_n, **p.constants, **p.options(many=True),
        )  # fmt: skip
        for own, other, rows, h, d in ((C, B, dy, states, dC), (B, C, x, dstates, dB)):
            ssd_bwd_dbc_kernel[(blocks * slices * groups * p.num_chunks,)](
                own, other, rows, M, steps, h, p.chunks, d, inner, length, heads, groups, slices, B.numel(),
                *strides(own), *strides(other), *strides(rows), OF_C=own is C,
                BLOCK_P=block_p, BLOCK_N=block_n, SLAB=min(p.tile.slab, block_p), **p.constants,
                **p.options(many=True),
            )  # fmt: skip
        ssd_bwd_dx_kernel[(blocks * heads * p.num_chunks,)](
            dy, dout, z, x, B, C, D, steps, dstates, p.chunks, dx, dD, inner, length, heads, groups,
            *strides(dy), *strides(dout), *strides(z), *strides(x), *strides(B), *strides(C), *per_element(D, heads),
            BLOCK_P=block_p, BLOCK_N=block_n, SLAB=min(p.tile.slab, block_n), **p.constants,
            **p.options(),
        )  # fmt: skip
        tiles = triton.cdiv(P * N, CARRIED)
        ssd_bwd_steps_kernel[(heads * p.num_chunks,)](
            A, steps, sums, inner, carried, p.chunks, ddt, dA, dbias, length, heads,
            CHUNK=chunk, BLOCK_T=block, CARRIED_TILES=tiles, BLOCK_CARRIED=triton.next_power_of_2(tiles), num_warps=8,
        )  # fmt: skip
    if slices > 1:
        dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    if D is not None and dD is not None:
        dD = dD.sum(0) if D.dim() == 2 else dD.sum((0, 2))
    return dx, ddt, dA.sum(0), dB, dC, dD, dz, None if dt_bias is None else dbias.sum(0)
