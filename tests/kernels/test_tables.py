"""The tables of configurations answer for every device, dtype and head size that the ops accept."""

import pytest
import torch

pytest.importorskip("triton")

from llmcore.kernels import (  # noqa: E402
    apply_rotary,
    attention_bwd,
    attention_fwd,
    attention_tiles,
    causal_conv1d,
    device,
    expert_plan,
    group_tiles,
    grouped_gemm,
    moe_mlp,
    moe_route,
    rms_norm,
    selective_scan,
    selective_state_update,
    ssd_tiles,
    swiglu,
)

ARCHITECTURES = {
    0: device.INTERPRETER, 75: "sm_86", 80: "sm_80", 86: "sm_86", 87: "sm_80", 89: "sm_86", 90: "sm_90", 100: "sm_90",
    103: "sm_90", 120: "sm_86",
}  # fmt: skip


@pytest.fixture(params=ARCHITECTURES)
def architecture(request, monkeypatch) -> str:
    monkeypatch.setattr(device, "capability", lambda _: request.param)
    assert device.architecture(torch.device("cpu")) == ARCHITECTURES[request.param]
    return ARCHITECTURES[request.param]


@pytest.fixture(params=["highest", "high"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


def test_row_kernels(architecture):
    row_kernels = (rms_norm.TILES, rms_norm.PREFETCH_BYTES, swiglu.PIECES, apply_rotary.TILES)
    experts = (moe_route.TILES, expert_plan.BLOCKS, moe_mlp.PIECES)
    for table in (*row_kernels, *experts, causal_conv1d.TILES, selective_scan.TILES, selective_state_update.TILES):
        assert architecture in table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention(architecture, precision, dtype):
    for size in range(8, 257, 8):
        q = torch.empty(1, 4, 1, size, dtype=dtype)
        for v in (torch.empty(1, 4, 1, 8, dtype=dtype), torch.empty(1, 1, 1, 8, dtype=dtype).expand(1, 4, 1, 8)):
            plan = attention_tiles.plan(q, q, v, (), 1.0, -1, 0)
            for table in (attention_fwd.CONFIGS, attention_bwd.DKDV_CONFIGS, attention_bwd.DQ_CONFIGS):
                block_m, block_n, keywords = plan.tiles(table)
                assert block_m >= 16 and block_n >= 16 and attention_bwd.QUERY_MULTIPLE % block_m == 0
                assert keywords["BLOCK_D"] >= size and keywords["BLOCK_DV"] == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [8, 8 * group_tiles.FEW])
def test_products_of_groups(architecture, precision, dtype, rows):
    plan = group_tiles.plan(torch.empty(1, 8, dtype=dtype), rows, 8)
    block_m, block_n, block_k = plan.tile
    assert min(block_m, block_n // 2, block_k) >= 16, "a product with two sums has half of BLOCK_N"
    assert min(grouped_gemm.PAIRS[plan.arch, plan.kind][:3]) >= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ssd(architecture, dtype):
    for P, N in ((1, 1), (64, 128), (80, 16), (3, 256), (256, 256)):
        plan = ssd_tiles.plan(torch.empty(2, 300, 4, P, dtype=dtype), torch.empty(2, 300, 2, N, dtype=dtype), None)
        chunk, block, slab, *_ = plan.tile
        assert chunk % block == 0 and min(block, slab) >= 16 and plan.num_chunks == 2 * -(-300 // chunk)


def test_chunks_end_where_documents_end():
    """The table that the kernels read, from the documents of two sequences; the last rows are for chunks there are none of."""
    documents = torch.tensor([[0, 0, 70, 0, -1], [0, 70, 100, -1, 0], [1, 0, 0, 1, -1], [1, 0, 100, -1, 1]])
    plan = ssd_tiles.plan(torch.empty(2, 100, 1, 4), torch.empty(2, 100, 1, 4), documents)
    assert plan.chunks is not None and plan.documents is not None and plan.tile.chunk == 64
    expected = [[0, 0, 64], [0, 64, 6], [0, 70, 30], [1, 0, 64], [1, 64, 36]]
    assert (
        plan.chunks[:5].tolist() == expected and plan.chunks[5:, 2].eq(0).all() and len(plan.chunks) == plan.num_chunks
    )
    assert plan.documents.tolist() == [[0, 2, 0, -1], [2, 1, -1, 0], [3, 0, 1, -1], [3, 2, -1, 1]]


@pytest.mark.parametrize("Tq, Tk", [(1, 9), (9, 1), (7, 7), (5, 11)])
def test_limits_that_limit_nothing_are_dropped(Tq, Tk):
    m, n = torch.arange(Tq)[:, None] + Tk - Tq, torch.arange(Tk)
    for window in range(12):
        left, right = attention_tiles.limits(window, window, Tq, Tk)
        assert left == (-1 if (n >= m - window).all() else window)
        assert right == (-1 if (n <= m + window).all() else window)
