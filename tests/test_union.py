"""The union tile's index against sets, and the union tile alone at tiles of every size."""

import emulator
import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from strategies import Dims, attend, make_call, seeds
from tiers import tiered

from hsa_tl.kernels_tilelang import compile
from hsa_tl.kernels_tilelang.config import config_of
from hsa_tl.kernels_tilelang.union_index import UnionIndexConfig
from hsa_tl.problem import Problem
from hsa_tl.testing import assert_attention


def _union(rows: list[list[int]], num_chunks: int) -> list[int]:
    """Ascending chunks, each as often as one row holds it most."""
    keys = {(c, row[:i].count(c)) for row in rows for i, c in enumerate(row) if 0 <= c < num_chunks}
    return [c for c, _ in sorted(keys)]


@pytest.mark.parametrize("device_type", tiered(["cpu", "cuda"], quick=["cpu"]))
@pytest.mark.parametrize(
    "G, K, block_M",
    tiered(
        [(1, 2, 64), (3, 3, 64), (4, 5, 192), (16, 4, 192), (16, 2, 192), (5, 1, 128)],
        quick=[(3, 3, 64), (4, 5, 192)],
        rows=True,
    ),
)
@hypothesis.given(B=st.integers(1, 2), T=st.integers(1, 70), H=st.integers(1, 2), N=st.integers(1, 9), seed=seeds)
@hypothesis.settings(max_examples=10)
def test_index(device_type, G, K, block_M, B, T, H, N, seed):
    """-1, indices out of range, duplicates, a last tile that is not full."""
    problem = Problem(B=B, T=T, N=N, HQ=G * H, H=H, D=16, S=16, K=K, device_type=device_type)
    tile = block_M // G
    tiles = -(-T // tile)
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, N + 1, (B, T, H, K), generator=g, dtype=torch.int32)
    order, chunks = torch.full_like(indices, -7), indices.new_full((B, tiles, H, tile * K), -7)
    lengths = indices.new_full((B, tiles, H), -7)
    groups = torch.full_like(chunks, -7)
    with emulator.attached():
        kernel = compile.kernel("union_index", problem, UnionIndexConfig(block_M=block_M))
    kernel(indices, N, order, chunks, groups, lengths)

    key = torch.where((indices >= 0) & (indices < N), indices, N)
    assert torch.equal(order.long(), key.sort(dim=-1, stable=True).indices)
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in lengths.shape)).tolist():
        rows = indices[b, i * tile : (i + 1) * tile, h].tolist()
        union = chunks[b, i, h, : lengths[b, i, h]].tolist()
        assert union == _union(rows, N)
        for i_u, c in enumerate(union):
            again = union[:i_u].count(c)
            who = {t * G // 64 for t, row in enumerate(rows) if row.count(c) > again}
            assert groups[b, i, h, i_u] == sum(1 << g for g in who)


@pytest.mark.parametrize("block_M, q_registers", [(64, 0), (128, 1), (192, 0)])
@pytest.mark.parametrize("per_head", tiered([False, True], quick=[True]))
def test_any_block_gives_the_same_output(block_M, q_registers, per_head):
    """Tiles of 21, 42 and 64 tokens: the last one is not full, rows pad the others."""
    call = make_call(Dims(T=50, T_kv=90, per_head=per_head))
    config = {"block_M": block_M, "q_registers": q_registers}
    out = attend("tilelang")(*call[:5], chunk_size=16, config={"hsa_fwd_union": config})
    assert_attention({"out": out}, call, chunk_size=16)


@pytest.mark.parametrize("program", ("hsa_fwd_union", "selected_fwd_union"))
def test_a_tile_writes_its_own_tokens(program):
    """The first tile alone, of 21 tokens in 64 rows: the row that pads it would be the next one's."""
    T, tile, K = 30, 21, 3
    q, kv, chunk_len = torch.randn(1, T, 1, 3, 16), torch.randn(1, 3, 16, 1, 16), torch.full((3,), 16).int()
    indices = torch.full((1, T, 1, K), -1).int()
    chunks, none = torch.zeros(1, 1, 1, tile * K).int(), torch.zeros(1, 1, 1).int()
    weights, results = [torch.ones(1, T, 1, 1, K)], [torch.full_like(q, torch.nan)]
    if program == "selected_fwd_union":
        weights, results = [], [*results, torch.full((1, T, 1, 3), torch.nan)]
    problem = Problem(B=1, T=T, N=3, HQ=3, H=1, D=16, S=16, K=K, dtype=torch.float32, device_type="cpu")
    kernel = compile.kernel(program, problem, config_of(program)(block_M=64))
    kernel(q, kv, kv, *weights, indices, indices + 1, chunks, chunks, none, chunk_len, 1.0, *results)
    for x in results:
        assert not x[:, :tile].isnan().any() and x[:, tile:].isnan().all()


def test_full_selection_is_one_walk_over_all_chunks():
    """The dense mode: every token chooses every chunk, so the union is all chunks, once."""
    call = make_call(Dims(T=20, T_kv=80, K=5))
    call = call._replace(indices=torch.arange(5).int().expand_as(call.indices).contiguous())
    out = attend("tilelang-union")(*call[:5], chunk_size=16)
    assert_attention({"out": out}, call, chunk_size=16)
