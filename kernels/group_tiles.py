"""What products of groups of rows share: which tile a program takes, how the operands are loaded, and the tiles' sizes.

Rows are sorted by group; group e has rows offsets[e] to offsets[e + 1]. A tile's rows are of one group, its last tile
has fewer. Nothing is padded and nothing about the groups is known on the host: programs stride over the tiles, whose
number each one finds from the offsets.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import device

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, programs) by architecture and kind of product: "half" is bf16 and fp16,
# fp32 is "ieee" or "tf32". programs: how many run at once on a multiprocessor, by their registers and shared memory. Of
# a product with two sums, as the gate's and the up's, each has half of BLOCK_N.
ROWS = {
    ("sm_90", "half"): (128, 256, 64, 8, 4, 1),
    ("sm_90", "half few"): (64, 256, 64, 4, 4, 1),
    ("sm_90", "tf32"): (128, 128, 32, 8, 4, 1),
    ("sm_90", "ieee"): (64, 64, 16, 4, 2, 3),
    ("sm_80", "half"): (128, 128, 64, 8, 3, 1),
    ("sm_80", "half few"): (64, 128, 64, 4, 3, 2),
    ("sm_80", "tf32"): (128, 128, 32, 8, 3, 1),
    ("sm_80", "ieee"): (64, 64, 16, 4, 2, 3),
    ("sm_86", "half"): (128, 128, 32, 8, 4, 1),
    ("sm_86", "half few"): (64, 128, 32, 4, 4, 2),
    ("sm_86", "tf32"): (64, 128, 32, 8, 3, 1),
    ("sm_86", "ieee"): (64, 64, 16, 4, 2, 3),
    (device.INTERPRETER, "half"): (32, 64, 64, 4, 1, 1),
    (device.INTERPRETER, "ieee"): (32, 64, 64, 4, 1, 1),
    (device.INTERPRETER, "tf32"): (32, 64, 64, 4, 1, 1),
}
# Groups of fewer rows than this, on the average, go through in the tiles that are for few.
FEW = 96


@triton.jit
def tiles_of_groups(offsets_ptr, groups, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """For each group its first row, its rows and the first tile after its own: three vectors."""
    g = tl.arange(0, BLOCK_G)
    begin = tl.load(offsets_ptr + g, mask=g < groups, other=0)
    count = tl.load(offsets_ptr + g + 1, mask=g < groups, other=0) - begin
    return begin, count, tl.cumsum((count + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def my_rows(tile, begin, count, end_tile, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """Of a tile its group, its first row and the rows from there to the group's end."""
    g = tl.arange(0, BLOCK_G)
    group = tl.sum((end_tile <= tile).to(tl.int32), 0)
    mine = g == group
    rows = tl.sum(tl.where(mine, count, 0), 0)
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    skipped = (tile - (tl.sum(tl.where(mine, end_tile, 0), 0) - tiles)) * BLOCK_M
    return group, tl.sum(tl.where(mine, begin, 0), 0) + skipped, rows - skipped


@triton.jit
def tokens_of(order_ptr, start, count, top_k, BLOCK: tl.constexpr):
    """(pairs, tokens) of the places start .. start + BLOCK - 1; zeros from `count` on."""
    i = tl.arange(0, BLOCK)
    pair = tl.load(order_ptr + start + i, mask=i < count, other=0)
    return pair, (pair // top_k).to(tl.int64)


@triton.jit
def load_rows(a, rows, exists, start, k, K, stride, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """A tile (BLOCK_M, BLOCK_K) of a: by a descriptor from the row `start` on, or by pointer these rows, zeros where
    one does not exist. A descriptor also brings rows of the next group, whose sums are not stored."""
    if TMA:
        return a.load([start, k])
    else:
        column = k + tl.arange(0, BLOCK_K)
        mask = exists[:, None] & (column < K)[None, :]
        return tl.load(a + rows[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_weight(
    w, group, n, k, N, K, stride_g, stride_n, stride_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_CONTIGUOUS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_K, BLOCK_N) of the group's weight, zeros beyond it."""
    if TMA:
        if K_CONTIGUOUS:
            return tl.trans(tl.reshape(w.load([group, n, k]), (BLOCK_N, BLOCK_K)))
        else:
            return tl.reshape(w.load([group, k, n]), (BLOCK_K, BLOCK_N))
    else:
        i = (k + tl.arange(0, BLOCK_K))[:, None]
        j = (n + tl.arange(0, BLOCK_N))[None, :]
        pointers = w + group.to(tl.int64) * stride_g + i.to(tl.int64) * stride_k + j.to(tl.int64) * stride_n
        return tl.load(pointers, mask=(i < K) & (j < N), other=0.0)


def dense(w: torch.Tensor) -> torch.Tensor:
    """w (..., N, K) with rows or columns without gaps, as load_weight reads them."""
    return w if 1 in w.stride()[-2:] else w.contiguous()


def describable(tensor: torch.Tensor) -> bool:
    """Bulk copies want rows that begin at multiples of 16 bytes, the last dimension contiguous."""
    *strides, last = tensor.stride()
    aligned = all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in strides)
    return last == 1 and aligned and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0


@dataclass(frozen=True)
class Plan:
    """How products of rows of one dtype are launched."""

    arch: str
    kind: str
    few: bool

    @property
    def bulk_copies(self) -> bool:
        # Exact products read their operands from registers.
        return self.arch in ("sm_90", device.INTERPRETER) and self.kind != "ieee"

    @property
    def tile(self) -> tuple[int, int, int]:
        return self._entry[:3]

    @property
    def _entry(self) -> tuple[int, int, int, int, int, int]:
        few = (self.arch, f"{self.kind} few")
        return ROWS[few if self.few and few in ROWS else (self.arch, self.kind)]

    def options(self) -> dict[str, Any]:
        block_m, block_n, block_k, warps, stages, _ = self._entry
        return {
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages,
            "PRECISION": "tf32" if self.kind == "tf32" else "ieee",
        }  # fmt: skip

    def rows(self, tensor: torch.Tensor) -> torch.Tensor | TensorDescriptor:
        """What load_rows takes for rows that follow each other."""
        block_m, _, block_k = self.tile
        if self.bulk_copies and describable(tensor):
            return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [block_m, block_k])
        return tensor

    def weights(
        self, w: torch.Tensor, block_n: int, second_half: int = 0
    ) -> tuple[torch.Tensor | TensorDescriptor, bool]:
        """What load_weight takes for w (G, N, K), one of whose last two strides is 1, and whether that is K's. Tiles
        begin at multiples of block_n, and those of a second half at such beyond `second_half`."""
        block_k = self.tile[2]
        k_contiguous = w.stride(2) == 1
        memory = w if k_contiguous else w.transpose(1, 2)
        box = [1, block_n, block_k] if k_contiguous else [1, block_k, block_n]
        aligned = k_contiguous or second_half * w.element_size() % 16 == 0
        if self.bulk_copies and aligned and describable(memory):
            return TensorDescriptor(memory, list(memory.shape), list(memory.stride()), box), k_contiguous
        return w, k_contiguous

    def programs(self, rows: int, groups: int, columns: int, block_n: int, device_: torch.device) -> int:
        """As many as there can be tiles, or as run at once."""
        block_m, at_once = self.tile[0], self._entry[-1]
        tiles = (rows // block_m + min(groups, rows)) * triton.cdiv(columns, block_n)
        return max(min(tiles, device.multiprocessors(device_) * at_once), 1)


def plan(x: torch.Tensor, rows: int, groups: int) -> Plan:
    kind = "half"
    if x.dtype == torch.float32:
        # Exact, unless PyTorch has been told otherwise.
        kind = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return Plan(device.architecture(x.device), kind, rows < FEW * groups)
