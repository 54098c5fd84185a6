"""The experts' SwiGLU layers, forward and backward. The maths is in the op's module.

    forward     h = gathered x @ w_gate_up, act from h as it is stored; out = act @ w_down times the weights; y
    backward    da = gathered dy @ w_down; dh, the routing weights' gradient and w act; dx = dh @ w_gate_up summed; both
                matrices' gradients
Tokens are gathered as they are loaded and the pairs of a token summed in the order of its choices: no copy of x in the
experts' order, no atomics.
"""

import torch
import triton
import triton.language as tl

from . import device
from .group_tiles import Plan, dense, load_rows, load_weight, my_rows, plan, tiles_of_groups, tokens_of
from .grouped_gemm import rows_times_rows, rows_times_weights
from .scan_math import sigmoid

# (elements of a row that a program has at a time, warps) where rows are not multiplied.
PIECES = {
    "sm_90": (1024, 4),
    "sm_80": (1024, 4),
    "sm_86": (1024, 4),
    device.INTERPRETER: (4096, 4),
}


@triton.jit(do_not_specialize=["experts"])
def gate_up_kernel(
    x_ptr, w, order_ptr, offsets_ptr, h_ptr, act_ptr, experts, inner, width, top_k, x_stride, w_stride_e, w_stride_n,
    w_stride_k, WEIGHT_TMA: tl.constexpr, K_CONTIGUOUS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    begin, count, end_tile = tiles_of_groups(offsets_ptr, experts, BLOCK_M, BLOCK_G)
    columns = (inner + BLOCK_N - 1) // BLOCK_N
    for tile in range(tl.program_id(0), tl.max(end_tile, 0) * columns, tl.num_programs(0)):
        expert, start, left = my_rows(tile // columns, begin, count, end_tile, BLOCK_M, BLOCK_G)
        n = tile % columns * BLOCK_N
        i = tl.arange(0, BLOCK_M)
        _, token = tokens_of(order_ptr, start, left, top_k, BLOCK_M)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, width, BLOCK_K):
            x = load_rows(x_ptr, token, i < left, start, k, width, x_stride, BLOCK_K, False)
            w_gate = load_weight(
                w, expert, n, k, 2 * inner, width, w_stride_e, w_stride_n, w_stride_k, BLOCK_N, BLOCK_K, K_CONTIGUOUS,
                WEIGHT_TMA,
            )  # fmt: skip
            w_up = load_weight(
                w, expert, inner + n, k, 2 * inner, width, w_stride_e, w_stride_n, w_stride_k, BLOCK_N, BLOCK_K,
                K_CONTIGUOUS, WEIGHT_TMA,
            )  # fmt: skip
            gate = tl.dot(x, w_gate, gate, input_precision=PRECISION)
            up = tl.dot(x, w_up, up, input_precision=PRECISION)
        # What the backward computes again from h is what is computed here.
        rounded_gate = gate.to(act_ptr.dtype.element_ty)
        rounded_up = up.to(act_ptr.dtype.element_ty)
        column = n + tl.arange(0, BLOCK_N)
        mask = (i < left)[:, None] & (column < inner)[None, :]
        row = (start + i).to(tl.int64)[:, None]
        if h_ptr is not None:
            at = h_ptr + row * (2 * inner) + column[None, :]
            tl.store(at, rounded_gate, mask=mask)
            tl.store(at + inner, rounded_up, mask=mask)
        gate = rounded_gate.to(tl.float32)
        act = gate * sigmoid(gate) * rounded_up.to(tl.float32)
        tl.store(act_ptr + row * inner + column[None, :], act.to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["experts"])
def act_bwd_kernel(
    da_ptr, h_ptr, weights_ptr, order_ptr, offsets_ptr, dh_ptr, dweights_ptr, experts, inner, BLOCK: tl.constexpr
):  # fmt: skip
    """Of a row: dh, its weight's gradient, and w act in the place of da."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(offsets_ptr + experts):
        return
    pair = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + pair)
    da_ptr += row * inner
    h_ptr += row * (2 * inner)
    dh_ptr += row * (2 * inner)
    dots = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, inner, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < inner
        da = tl.load(da_ptr + column, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(h_ptr + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + inner + column, mask=mask, other=0.0).to(tl.float32)
        p = sigmoid(gate)
        silu = gate * p
        dots += da * (silu * up)
        tl.store(da_ptr + column, (weight * (silu * up)).to(da_ptr.dtype.element_ty), mask=mask)
        da *= weight
        dgate = da * (p * (1 + gate * (1 - p))) * up
        tl.store(dh_ptr + column, dgate.to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + inner + column, (da * silu).to(dh_ptr.dtype.element_ty), mask=mask)
    tl.store(dweights_ptr + pair, tl.sum(dots, 0))


@triton.jit(do_not_specialize=["top_k"])
def sum_pairs_kernel(out_ptr, place_ptr, y_ptr, width, top_k, BLOCK: tl.constexpr):
    """y[t] = the sum of out over the places of t's pairs; NaN where a pair has none."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(top_k):
        place = tl.load(place_ptr + token * top_k + j).to(tl.int64)
        row = tl.load(out_ptr + place * width + column, mask=(column < width) & (place >= 0), other=float("nan"))
        total += row.to(tl.float32)
    tl.store(y_ptr + token * width + column, total.to(y_ptr.dtype.element_ty), mask=column < width)


def _piece(columns: int, device_: torch.device) -> tuple[int, int]:
    block, warps = PIECES[device.architecture(device_)]
    return min(block, triton.next_power_of_2(columns)), warps


def _sum_pairs(out: torch.Tensor, place: torch.Tensor, y: torch.Tensor) -> None:
    tokens, width = y.shape
    block, warps = _piece(width, y.device)
    sum_pairs_kernel[(tokens, triton.cdiv(width, block))](
        out, place, y, width, out.shape[0] // tokens, BLOCK=block, num_warps=warps
    )


def _weight(p: Plan, w: torch.Tensor, block_n: int, second_half: int = 0) -> tuple[object, dict[str, bool]]:
    """w (E, N, K) as load_weight takes it, and the launch's constants that say how."""
    source, k_contiguous = p.weights(w, block_n, second_half)
    return source, {"WEIGHT_TMA": source is not w, "K_CONTIGUOUS": k_contiguous}


def moe_mlp_fwd(
    x: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor, weights: torch.Tensor, order: torch.Tensor,
    place: torch.Tensor, offsets: torch.Tensor, h: torch.Tensor | None, y: torch.Tensor,
) -> None:  # fmt: skip
    """Fills y (T, C) and, if it is asked for, h (P, 2F). Shapes are the op's; x has rows without gaps between elements,
    weights, order, place, offsets, h and y are contiguous."""
    (tokens, width), (experts, _, inner) = x.shape, w_down.shape
    pairs = order.shape[0]
    if pairs == 0:
        return
    p = plan(x, pairs, experts)
    options = p.options()
    options["BLOCK_N"] = block_n = options["BLOCK_N"] // 2  # there are two products
    w_gate_up, w_down = dense(w_gate_up), dense(w_down)
    act, out = x.new_empty(pairs, inner), x.new_empty(pairs, width)
    top_k = pairs // tokens
    source, constants = _weight(p, w_gate_up, block_n, inner)
    with device.current(x.device):
        gate_up_kernel[(p.programs(pairs, experts, inner, block_n, x.device),)](
            x, source, order, offsets, h, act, experts, inner, width, top_k, x.stride(0), *w_gate_up.stride(),
            BLOCK_G=triton.next_power_of_2(experts), **constants, **options,
        )  # fmt: skip
        rows_times_weights(act, w_down, offsets, out, p, order=order, weights=weights)
        _sum_pairs(out, place, y)


def moe_mlp_bwd(
    dy: torch.Tensor, x: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor, weights: torch.Tensor,
    h: torch.Tensor, order: torch.Tensor, place: torch.Tensor, offsets: torch.Tensor,
    dweights: torch.Tensor, dx: torch.Tensor | None, dw_gate_up: torch.Tensor | None, dw_down: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fills dweights and of dx, dw_gate_up and dw_down those that there are; all are contiguous."""
    (tokens, width), (experts, _, inner) = x.shape, w_down.shape
    pairs = order.shape[0]
    if pairs == 0:
        for dw in (dw_gate_up, dw_down):
            if dw is not None:
                dw.zero_()
        return
    p, top_k = plan(x, pairs, experts), pairs // tokens
    act, dh = x.new_empty(pairs, inner), x.new_empty(pairs, 2 * inner)
    dweights.fill_(float("nan"))  # where an index is no expert
    with device.current(x.device):
        rows_times_weights(dy, w_down.transpose(1, 2), offsets, act, p, order=order, top_k=top_k, gather=True)
        block, warps = _piece(inner, x.device)
        act_bwd_kernel[(pairs,)](
            act, h, weights, order, offsets, dh, dweights, experts, inner, BLOCK=block, num_warps=warps
        )
        if dw_down is not None:
            rows_times_rows(dy, act, offsets, dw_down, order, top_k, gather_a=True)
        if dw_gate_up is not None:
            rows_times_rows(dh, x, offsets, dw_gate_up, order, top_k, gather_b=True)
        if dx is not None:
            dx_pairs = x.new_empty(pairs, width)
            rows_times_weights(dh, w_gate_up.transpose(1, 2), offsets, dx_pairs, p)
            _sum_pairs(dx_pairs, place, dx)
