"""One step of the selective scan, for decoding, in place on the state; the maths is in its op's module.

A program takes a few channels of one head of one sequence with all their states, and sums over these by itself: the
same result every time. The time is memory's. Each state is read and written once, 2 B H P N elements, and the rest is
small beside them: A has H P N, which the cache keeps from one sequence to the next, or one a head where it is expanded
(stride 0), so that the states of a channel share their decay too; x, dt, z and y have B H P each, B and C B G N.
Mamba-2's 80 heads x 64 channels x 128 states of float32, beside bfloat16, are 5.24 MB a sequence of 5.27.
"""

import torch
import triton
import triton.language as tl

from . import device
from .scan_math import decay_of, sigmoid, softplus
from .selective_scan import _wide

# Per architecture: elements of a program's tile, and of a warp. 128 float32 are 16 bytes a thread.
TILES = {
    "sm_90": (512, 128),
    "sm_80": (512, 128),
    "sm_86": (512, 128),
    device.INTERPRETER: (4096, 1024),
}


@triton.jit
def _at(ptr, batch, head, channel, stride_b, stride_h, stride_p):
    return ptr + (batch * stride_b + head * stride_h) + channel * stride_p


@triton.jit
def selective_state_update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, heads, channels, states, group_heads,
    state_stride_b, state_stride_h, state_stride_p, state_stride_n, x_stride_b, x_stride_h, x_stride_p,
    dt_stride_b, dt_stride_h, dt_stride_p, A_stride_h, A_stride_p, A_stride_n, B_stride_b, B_stride_g, B_stride_n,
    C_stride_b, C_stride_g, C_stride_n, D_stride_h, D_stride_p, z_stride_b, z_stride_h, z_stride_p,
    bias_stride_h, bias_stride_p,
    SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """y is contiguous. BLOCK_A: BLOCK_N, or 1 where the states of a channel share their A."""
    blocks = tl.cdiv(channels, BLOCK_P)
    batch = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    there = channel < channels
    known = there & (n < states)
    dt = _wide(_at(dt_ptr, batch, head, channel, dt_stride_b, dt_stride_h, dt_stride_p), there)
    if bias_ptr is not None:
        dt += _wide(_at(bias_ptr, batch, head, channel, 0, bias_stride_h, bias_stride_p), there)
    if SOFTPLUS:
        dt = softplus(dt)
    x = _wide(_at(x_ptr, batch, head, channel, x_stride_b, x_stride_h, x_stride_p), there)
    a = tl.arange(0, BLOCK_A)[None, :].to(tl.int64)
    at_A = _at(A_ptr, batch, head, channel, 0, A_stride_h, A_stride_p) + a * A_stride_n
    decay = decay_of(dt * _wide(at_A, there & (a < states)))
    group = head // group_heads
    B = _wide(_at(B_ptr, batch, group, n, B_stride_b, B_stride_g, B_stride_n), n < states)
    C = _wide(_at(C_ptr, batch, group, n, C_stride_b, C_stride_g, C_stride_n), n < states)
    place = _at(state_ptr, batch, head, channel, state_stride_b, state_stride_h, state_stride_p) + n * state_stride_n
    new = decay * _wide(place, known) + (dt * x) * B
    y = tl.sum(tl.where(known, new * C, 0.0), 1, keep_dims=True)  # an infinite x leaves no number beyond the states
    if D_ptr is not None:
        y += _wide(_at(D_ptr, batch, head, channel, 0, D_stride_h, D_stride_p), there) * x
    if z_ptr is not None:
        z = _wide(_at(z_ptr, batch, head, channel, z_stride_b, z_stride_h, z_stride_p), there)
        y *= z * sigmoid(z)
    tl.store(y_ptr + (batch * heads + head) * channels + channel, y.to(y_ptr.dtype.element_ty), mask=there)
    tl.debug_barrier()  # an x that is a view of the state has been read by all threads
    tl.store(place, new.to(state_ptr.dtype.element_ty), mask=known)


def _strides(t: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if t is None else t.stride()


def _config(channels: int, states: int, tied: bool, at: torch.device) -> dict[str, int]:
    tile, per_warp = TILES[device.architecture(at)]
    block_n = triton.next_power_of_2(states)
    block_p = min(max(tile // block_n, 1), triton.next_power_of_2(channels))
    warps = max(block_p * block_n // per_warp, 1)
    return {"BLOCK_P": block_p, "BLOCK_N": block_n, "BLOCK_A": 1 if tied else block_n, "num_warps": warps}


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    y: torch.Tensor,
) -> None:
    """Changes state and fills y, which is contiguous; shapes are the op's per head, of any strides."""
    batch, heads, channels, states = state.shape
    config = _config(channels, states, A.stride(2) == 0, x.device)
    with device.current(x.device):
        selective_state_update_kernel[(batch * heads * triton.cdiv(channels, config["BLOCK_P"]),)](
            state, x, dt, A, B, C, D, z, dt_bias, y, heads, channels, states, heads // B.shape[1],
            *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), *_strides(D, 2),
            *_strides(z, 3), *_strides(dt_bias, 2), SOFTPLUS=dt_softplus, **config,
        )  # fmt: skip
