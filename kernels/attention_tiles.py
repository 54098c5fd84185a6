"""What the forward and the backward of attention share: which tile a program takes, which tiles it visits, how one is loaded.

Letters: B batch, T time, H query heads, K key heads, D head size of q and k, DV of v; m counts queries, n keys.
Query m sees key n when m + shift - window_left <= n <= m + shift + window_right, shift = Tk - Tq.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import device

# A section of heads, whose tiles run at the same time, shares this much of the L2 cache.
SECTION_BYTES = 24 * 1024 * 1024


class TileConfig(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By architecture and kind of product, then by the largest padded head size an entry is for. "half" is bf16 and fp16, which on
# sm_90 may have other tiles when they come by pointers and not by descriptors; fp32 is "ieee" or "tf32".
Table = dict[tuple[str, str], dict[int, tuple[int, int, int, int]]]


def config_of(table: Table, q: torch.Tensor, head_size: int, tma: bool) -> TileConfig:
    """The table's entry for q's device and dtype and a padded head size: the first size that is no smaller."""
    arch = device.architecture(q.device)
    kind = "half" if q.dtype.itemsize == 2 else dot_precision(q.dtype)
    if not tma and (arch, f"{kind} by pointer") in table:
        kind = f"{kind} by pointer"
    sizes = table[arch, kind]
    return TileConfig(*sizes[min(size for size in sizes if size >= head_size)])


@triton.jit
def my_tile(num_tiles, num_heads, heads_per_section, LAST_FIRST: tl.constexpr):
    """(tile, head) of this program.

    Heads come in sections whose keys and values fit the L2 cache together; within one, programs that visit many tiles (the
    last, when attention is causal) start first, so that the short ones fill the gaps at the end.
    """
    pid = tl.program_id(0)
    section = pid // (num_tiles * heads_per_section)
    first_head = section * heads_per_section
    heads = tl.minimum(heads_per_section, num_heads - first_head)
    rest = pid - first_head * num_tiles
    tile = rest // heads
    if LAST_FIRST:
        tile = num_tiles - 1 - tile
    return tile, first_head + rest % heads


@triton.jit
def visited(
    start, end, shift, reach_back, reach_ahead, length, LIMIT_BACK: tl.constexpr, LIMIT_AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which blocks of 0 .. length - 1 the rows start .. end - 1 are paired with, when row is paired with the positions
    row + shift - reach_back .. row + shift + reach_ahead.

    Returns (a, b, c, d): blocks are visited from a up to d; those that begin in [b, c) are paired entirely with every row.
    """
    a = 0
    b = 0
    c = length
    d = length
    if LIMIT_BACK:
        a = tl.maximum(start + shift - reach_back, 0) // BLOCK * BLOCK
        b = tl.maximum(end - 1 + shift - reach_back, 0)
    if LIMIT_AHEAD:
        c = tl.minimum(start + shift + reach_ahead + 1, length)
        d = tl.minimum(end + shift + reach_ahead, length)
    return a, b, c - (BLOCK - 1), d


@triton.jit
def is_visible(
    m, n, shift, window_left, window_right, Tk, LIMIT_LEFT: tl.constexpr, LIMIT_RIGHT: tl.constexpr
):
    visible = n < Tk
    if LIMIT_LEFT:
        visible = visible & (n - (shift - window_left) >= m)
    if LIMIT_RIGHT:
        visible = visible & (n - (shift + window_right) <= m)
    return visible


@triton.jit
def load_tile(
    source, b, h, start, length, stride_t,
    BLOCK_T: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TMA: tl.constexpr,
):
    """Rows start .. start + BLOCK_T - 1 of one head, zeros outside the tensor.

    source is a tensor descriptor (TMA), or a pointer to the head's first row.
    """
    if TMA:
        tile = tl.reshape(source.load([b, h, start, 0]), (BLOCK_T, BLOCK_SIZE))
    else:
        t = tl.arange(0, BLOCK_T)[:, None]
        d = tl.arange(0, BLOCK_SIZE)[None, :]
        mask = t < length - start
        if SIZE < BLOCK_SIZE:
            mask = mask & (d < SIZE)
        pointers = source + tl.cast(start, tl.int64) * stride_t + (t.to(tl.int64) * stride_t + d)
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def head_of(source, b, h, stride_b, stride_h, TMA: tl.constexpr):
    """What load_tile takes as source: the descriptor itself, or the pointer to a head's first row."""
    if TMA:
        return source
    else:
        return source + (tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h)


def describable(arch: str, precision: str, *tensors: torch.Tensor) -> bool:
    """Whether bulk copies by tensor descriptor can read these (B, T, H, D) and pay.

    They want 16-byte alignment and no broadcast dimension. Exact fp32 products read their operands from registers, where the
    layout of such copies costs spills.
    """
    if arch not in ("sm_90", device.INTERPRETER) or (precision == "ieee" and tensors[0].dtype == torch.float32):
        return False
    for tensor in tensors:
        strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]
        if tensor.data_ptr() % 16 or any(stride <= 0 or stride * tensor.element_size() % 16 for stride in strides):
            return False
    return True


def descriptor(tensor: torch.Tensor, block_t: int, block_size: int) -> TensorDescriptor:
    """One head's rows in a tile. Only because the dimensions of size one lead does the compiler see a plain matrix."""
    heads_first = tensor.transpose(1, 2)
    # The stride of a dimension of size one is arbitrary, and may be unaligned.
    strides = [stride if size > 1 else 64 for size, stride in zip(heads_first.shape, heads_first.stride(), strict=True)]
    return TensorDescriptor(tensor, list(heads_first.shape), [*strides[:3], 1], [1, 1, block_t, block_size])


def padded(size: int) -> int:
    return max(triton.next_power_of_2(size), 16)


def heads_per_section(bytes_per_head: int, num_heads: int, group: int) -> int:
    """Query heads that run together: whole groups, at least one, as many as fit the cache."""
    return min(max(SECTION_BYTES // max(bytes_per_head, 1), 1) * group, num_heads)


def limits(window_left: int, window_right: int, Tq: int, Tk: int) -> tuple[int, int]:
    """The window with -1 where it limits nothing: no key is farther back than Tk - 1, or ahead than Tq - 1."""
    left = window_left if 0 <= window_left < Tk - 1 else -1
    right = window_right if 0 <= window_right < Tq - 1 else -1
    return left, right


def scale_of_powers_of_two(softmax_scale: float) -> float:
    """The kernels compute exp2(scale * s) with a positive scale (the sign goes to q).

    One too small for a difference stands for zero: masked scores are -inf, and -inf * 0 is no number.
    """
    return max(abs(float(softmax_scale)) * math.log2(math.e), 1e-30)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are exact unless PyTorch has been told otherwise."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
