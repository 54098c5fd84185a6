"""SwiGLU's activation (Shazeer, 2020, arXiv:2002.05202), forward and backward.

    y = silu(gate) * up,  silu(g) = g * sigmoid(g)
    dgate = dy * up * sigmoid(g) * (1 + g * (1 - sigmoid(g)))        dup = dy * silu(g)

gate, up, dy: (rows, F) with last stride 1; nothing but gate and up is saved for the backward. One pass over memory each
way. Where all rows follow each other without gaps the tensor is one long row.
"""

import torch
import triton
import triton.language as tl

from . import device

# (elements of a program's piece of a row, warps)
PIECES = {
    "sm_90": (2048, 4),
    "sm_80": (2048, 4),
    "sm_86": (2048, 4),
    device.INTERPRETER: (8192, 4),
}


@triton.jit(do_not_specialize=["pieces_per_row"])
def swiglu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, cols, gate_row_stride, up_row_stride, pieces_per_row, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) // pieces_per_row).to(tl.int64)
    start = (tl.program_id(0) % pieces_per_row).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    mask = offset < cols - start
    gate = tl.load(gate_ptr + (row * gate_row_stride + start) + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_row_stride + start) + offset, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + (row * cols + start) + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pieces_per_row"])
def swiglu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, cols, dy_row_stride, gate_row_stride, up_row_stride, pieces_per_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // pieces_per_row).to(tl.int64)
    start = (tl.program_id(0) % pieces_per_row).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    mask = offset < cols - start
    dy = tl.load(dy_ptr + (row * dy_row_stride + start) + offset, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + (row * gate_row_stride + start) + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_row_stride + start) + offset, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    # The derivative of silu first: it is at most 1.1, so that no product of two large numbers meets a zero.
    dgate = dy * (sigmoid * (1.0 + gate * (1.0 - sigmoid))) * up
    dup = dy * (gate * sigmoid)
    out = (row * cols + start) + offset
    tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + out, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _pieces(inputs: tuple[torch.Tensor, ...]) -> tuple[int, int, tuple[int, ...]]:
    """(rows, columns, row strides), one row where the inputs have no gaps."""
    rows, cols = inputs[0].shape
    strides = tuple(tensor.stride(0) for tensor in inputs)
    if all(stride == cols for stride in strides):
        return 1, rows * cols, (0,) * len(inputs)
    return rows, cols, strides


def swiglu_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    rows, cols, strides = _pieces((gate, up))
    block, warps = PIECES[device.architecture(gate.device)]
    pieces = triton.cdiv(cols, block)
    with device.current(gate.device):
        swiglu_fwd_kernel[(rows * pieces,)](gate, up, y, cols, *strides, pieces, BLOCK=block, num_warps=warps)
    return y


def swiglu_bwd(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dgate, dup."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return dgate, dup
    rows, cols, strides = _pieces((dy, gate, up))
    block, warps = PIECES[device.architecture(gate.device)]
    pieces = triton.cdiv(cols, block)
    with device.current(gate.device):
        swiglu_bwd_kernel[(rows * pieces,)](
            dy, gate, up, dgate, dup, cols, *strides, pieces, BLOCK=block, num_warps=warps
        )
    return dgate, dup
