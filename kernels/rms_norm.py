"""RMSNorm (Zhang & Sennrich, 2019, arXiv:1910.07467), forward and backward, with an optional fused residual add.

    s = x + residual, rounded to its dtype   rstd = 1 / sqrt(mean(s^2) + eps)   y = s * rstd * (weight + weight_offset)

    g = dy * (weight + weight_offset),  xh = s * rstd:
    dx = dresidual = rstd * (g - xh * mean(g * xh)) + ds        dweight = sum over rows of dy * xh

Every tensor is (rows, C) or (C,), the last stride is 1. A row stays in registers up to MAX_RESIDENT columns; a wider
one is read twice, the second time from the L2 cache. The weight's gradient is summed by a fixed number of programs,
each of which strides over the rows, and one reduction of their partial sums: no atomics, the same result every time.
"""

import torch
import triton
import triton.language as tl

from . import device

# Per architecture, the elements of a tile of whole rows (forward, backward), of a piece of a wide row, and of a tile of
# the last reduction (rows, columns).
TILES = {
    "sm_90": (4096, 4096, 16384, (64, 32)),
    "sm_80": (4096, 4096, 8192, (64, 32)),
    "sm_86": (4096, 4096, 8192, (64, 32)),
    device.INTERPRETER: (16384, 16384, 8192, (256, 1024)),
}
MAX_RESIDENT = 16384
# The backward holds the weight in registers beside its gradient up to this width, and fetches it for every row beyond.
MAX_KEPT_WEIGHT = 8192
FWD_ELEMENTS_PER_WARP, BWD_ELEMENTS_PER_WARP = 1024, 512
# Shared memory of a multiprocessor that the backward may fill with rows on their way.
PREFETCH_BYTES = {"sm_90": 200 * 1024, "sm_80": 144 * 1024, "sm_86": 80 * 1024, device.INTERPRETER: 0}


def _warps(elements: int, per_warp: int) -> int:
    return min(max(elements // per_warp, 4), 16)


def _whole_rows(cols: int, elements: int, per_warp: int) -> dict[str, int]:
    """The tile that holds whole rows and about `elements` elements."""
    block_cols = triton.next_power_of_2(cols)
    block_rows = max(1, elements // block_cols)
    return {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "num_warps": _warps(block_rows * block_cols, per_warp)}


def _programs_and_stages(device_: torch.device, elements: int, bytes_per_element: int) -> tuple[int, int]:
    """Programs that stride over the rows, as many as run at once; their stages, one more than tiles on their way."""
    per_multiprocessor = 2 if elements <= 4096 else 1
    budget = PREFETCH_BYTES[device.architecture(device_)] // per_multiprocessor
    stages = 1 + min(budget // (elements * bytes_per_element), 3)
    return per_multiprocessor * device.multiprocessors(device_), stages


@triton.jit(do_not_specialize=["rows"])
def rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, s_ptr, rstd_ptr, rows, cols, x_row_stride, residual_row_stride,
    eps, weight_offset, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < rows) & (col < cols)
    s = tl.load(x_ptr + row * x_row_stride + col, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + row * residual_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row * cols + col, rounded, mask=mask)
        s = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) / cols + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = s * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32) + weight_offset
    tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, s_ptr, rstd_ptr, cols, x_row_stride, residual_row_stride,
    eps, weight_offset, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row_stride
    y_ptr += row * cols
    offsets = tl.arange(0, BLOCK_COLS)
    squares = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, cols, BLOCK_COLS):
        col = start + offsets
        s = tl.load(x_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if residual_ptr is not None:
            residual = residual_ptr + row * residual_row_stride + col
            s += tl.load(residual, mask=col < cols, other=0.0, eviction_policy="evict_first").to(tl.float32)
            rounded = s.to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + row * cols + col, rounded, mask=col < cols)
            s = rounded.to(tl.float32)
        squares += s * s
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / cols + eps)
    tl.store(rstd_ptr + row, rstd)
    if residual_ptr is not None:
        tl.debug_barrier()  # the second pass reads what other threads of this program have just written
    for start in range(0, cols, BLOCK_COLS):
        col = start + offsets
        if residual_ptr is not None:
            s = tl.load(s_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        else:
            s = tl.load(x_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = s * rstd
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last")
            y *= weight.to(tl.float32) + weight_offset
        tl.store(y_ptr + col, y.to(y_ptr.dtype.element_ty), mask=col < cols)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_bwd_kernel(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dweight_partial_ptr, rows, cols,
    dy_row_stride, ds_row_stride, s_row_stride, weight_offset,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, KEEP_WEIGHT: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_COLS)[None, :]
    if weight_ptr is not None and KEEP_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first = tl.program_id(0) * BLOCK_ROWS
    for start in tl.range(first, rows, tl.num_programs(0) * BLOCK_ROWS, num_stages=NUM_STAGES):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (col < cols)
        dy = tl.load(dy_ptr + row * dy_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row * s_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        xh = s * rstd
        if dweight_partial_ptr is not None:
            dweight += dy * xh
        g = dy
        if weight_ptr is not None:
            if not KEEP_WEIGHT:
                weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0)
            g *= weight.to(tl.float32) + weight_offset
        t = rstd * (g - xh * (tl.sum(g * xh, axis=1, keep_dims=True) / cols))
        if ds_ptr is not None:
            t += tl.load(ds_ptr + row * ds_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * cols + col, t.to(dx_ptr.dtype.element_ty), mask=mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + row * cols + col, t.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if dweight_partial_ptr is not None:
        partial = dweight_partial_ptr + tl.program_id(0).to(tl.int64) * cols + col
        tl.store(partial, tl.sum(dweight, axis=0, keep_dims=True), mask=col < cols)


@triton.jit
def rms_norm_bwd_wide_kernel(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr, cols,
    dy_row_stride, ds_row_stride, s_row_stride, weight_offset, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * dy_row_stride
    s_ptr += row * s_row_stride
    rstd = tl.load(rstd_ptr + row)
    offsets = tl.arange(0, BLOCK_COLS)
    products = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, cols, BLOCK_COLS):
        col = start + offsets
        g = tl.load(dy_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
        s = tl.load(s_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last")
            g *= weight.to(tl.float32) + weight_offset
        products += g * (s * rstd)
    mean = tl.sum(products, axis=0) / cols
    for start in range(0, cols, BLOCK_COLS):
        col = start + offsets
        g = tl.load(dy_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_first").to(tl.float32)
        s = tl.load(s_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last")
            g *= weight.to(tl.float32) + weight_offset
        t = rstd * (g - s * rstd * mean)
        if ds_ptr is not None:
            t += tl.load(ds_ptr + row * ds_row_stride + col, mask=col < cols, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * cols + col, t.to(dx_ptr.dtype.element_ty), mask=col < cols)
        if dresidual_ptr is not None:
            dresidual = t.to(dresidual_ptr.dtype.element_ty)
            tl.store(dresidual_ptr + row * cols + col, dresidual, mask=col < cols)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_bwd_weight_kernel(
    dy_ptr, s_ptr, rstd_ptr, dweight_partial_ptr, rows, cols, dy_row_stride, s_row_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums of dy * xh for a band of columns: program (i, j) takes every num_programs(1)-th block of rows."""
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    first = tl.program_id(1) * BLOCK_ROWS
    for start in tl.range(first, rows, tl.num_programs(1) * BLOCK_ROWS, num_stages=NUM_STAGES):
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (col < cols)
        dy = tl.load(dy_ptr + row * dy_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row * s_row_stride + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        dweight += dy * (s * rstd)
    partial = dweight_partial_ptr + tl.program_id(1).to(tl.int64) * cols + col
    tl.store(partial, tl.sum(dweight, axis=0, keep_dims=True), mask=col < cols)


@triton.jit(do_not_specialize=["partials"])
def rms_norm_bwd_reduce_kernel(
    partial_ptr, dweight_ptr, partials, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, partials, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < partials) & (col < cols)
        total += tl.load(partial_ptr + row.to(tl.int64) * cols + col, mask=mask, other=0.0)
    dweight = tl.sum(total, axis=0, keep_dims=True).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + col, dweight, mask=col < cols)


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """x, residual: (rows, C); weight: (C,). Returns y in x's dtype, s (None without a residual), rstd (rows,) fp32."""
    rows, cols = x.shape
    y = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    s, residual_stride = None, 0
    if residual is not None:
        s = torch.empty((rows, cols), dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
        residual_stride = residual.stride(0)
    if rows == 0:
        return y, s, rstd
    tile, _, piece, _ = TILES[device.architecture(x.device)]
    scalars = (cols, x.stride(0), residual_stride, float(eps), float(weight_offset))
    with device.current(x.device):
        if cols <= MAX_RESIDENT:
            config = _whole_rows(cols, tile, FWD_ELEMENTS_PER_WARP)
            grid = (triton.cdiv(rows, config["BLOCK_ROWS"]),)
            rms_norm_fwd_kernel[grid](x, residual, weight, y, s, rstd, rows, *scalars, **config)
        else:
            rms_norm_fwd_wide_kernel[(rows,)](
                x, residual, weight, y, s, rstd, *scalars,
                BLOCK_COLS=piece, num_warps=_warps(piece, FWD_ELEMENTS_PER_WARP),
            )  # fmt: skip
    return y, s, rstd


def rms_norm_bwd(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns dx, dresidual (None when it is dx, or there is no residual), dweight (None when not wanted).

    dy: (rows, C) in x's dtype; ds: the same shape in s's dtype, or None; s: what the forward returned, or x.
    """
    rows, cols = s.shape
    dx = torch.empty((rows, cols), dtype=x_dtype, device=s.device)
    dresidual = None
    if residual_dtype is not None and residual_dtype != x_dtype:
        dresidual = torch.empty((rows, cols), dtype=residual_dtype, device=s.device)
    dweight = None
    if need_dweight and weight is not None:
        dweight = torch.empty((cols,), dtype=weight.dtype, device=s.device)
    if rows == 0:
        return dx, dresidual, None if dweight is None else dweight.zero_()
    inputs = (dy, ds, s, weight, rstd)
    strides = (dy.stride(0), 0 if ds is None else ds.stride(0), s.stride(0))
    with device.current(s.device):
        backward = _bwd_resident if cols <= MAX_RESIDENT else _bwd_wide
        partial = backward(inputs, (dx, dresidual), strides, float(weight_offset), dweight is not None)
        if dweight is not None and partial is not None:
            block_rows, block_cols = TILES[device.architecture(s.device)][3]
            rms_norm_bwd_reduce_kernel[(triton.cdiv(cols, block_cols),)](
                partial, dweight, partial.shape[0], cols, BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, num_warps=4
            )
    return dx, dresidual, dweight


def _bwd_resident(inputs, outputs, strides, weight_offset, need_partial) -> torch.Tensor | None:
    dy, ds, s, weight, _ = inputs
    rows, cols = s.shape
    config = _whole_rows(cols, TILES[device.architecture(s.device)][1], BWD_ELEMENTS_PER_WARP)
    keep_weight = config["BLOCK_COLS"] <= MAX_KEPT_WEIGHT
    streamed = [dy, s, ds, None if keep_weight else weight]
    bytes_per_element = sum(tensor.element_size() for tensor in streamed if tensor is not None)
    programs, stages = _programs_and_stages(s.device, config["BLOCK_ROWS"] * config["BLOCK_COLS"], bytes_per_element)
    programs = min(programs, triton.cdiv(rows, config["BLOCK_ROWS"]))
    partial = torch.empty((programs, cols), dtype=torch.float32, device=s.device) if need_partial else None
    rms_norm_bwd_kernel[(programs,)](
        *inputs, *outputs, partial, rows, cols, *strides, weight_offset,
        KEEP_WEIGHT=keep_weight, NUM_STAGES=stages, **config,
    )  # fmt: skip
    return partial


def _bwd_wide(inputs, outputs, strides, weight_offset, need_partial) -> torch.Tensor | None:
    dy, _, s, _, rstd = inputs
    rows, cols = s.shape
    _, tile, piece, _ = TILES[device.architecture(s.device)]
    rms_norm_bwd_wide_kernel[(rows,)](
        *inputs, *outputs, cols, *strides, weight_offset,
        BLOCK_COLS=piece, num_warps=_warps(piece, FWD_ELEMENTS_PER_WARP),
    )  # fmt: skip
    if not need_partial:
        return None
    block_rows, block_cols = 4, tile // 4
    programs, stages = _programs_and_stages(s.device, tile, dy.element_size() + s.element_size())
    bands = triton.cdiv(cols, block_cols)
    programs = min(triton.cdiv(programs, bands), triton.cdiv(rows, block_rows))
    partial = torch.empty((programs, cols), dtype=torch.float32, device=s.device)
    rms_norm_bwd_weight_kernel[(bands, programs)](
        dy, s, rstd, partial, rows, cols, strides[0], strides[2],
        BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, NUM_STAGES=stages, num_warps=_warps(tile, BWD_ELEMENTS_PER_WARP),
    )  # fmt: skip
    return partial
