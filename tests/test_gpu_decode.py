"""On a Hopper GPU: decode against the float64 oracle, in a captured graph, and from offloaded pages."""

import pytest
import torch
from strategies import Dims
from test_decode import laid_out

from hsa_tl import fusion_weights, hsa_decode, landmark_bounds, retrieve_chunks, retrieve_decode, selected_decode
from hsa_tl.model import MemorySpec, PagedMemory
from hsa_tl.testing import SelectedInputs, assert_attention

pytestmark = pytest.mark.gpu

S = 64
HALF = (torch.bfloat16, torch.float16)
DIMS = {
    "paper": Dims(B=1, T=1, T_kv=128 * S, HQ=16, D=128, S=S, K=64),
    "batch": Dims(B=40, T=1, T_kv=20 * S, HQ=32, H=2, D=64, S=S, K=16),
    "tokens": Dims(B=3, T=4, T_kv=9 * S, HQ=6, H=2, D=96, S=S, K=7, per_head=True),
    "g1": Dims(B=2, T=2, T_kv=9 * S, HQ=4, H=4, D=128, S=S, K=1),
}


def make(d: Dims, dtype):
    """Arguments of hsa_decode on the GPU: empty slots and duplicates anywhere, nan in the pages that none names."""
    pages = d.B * d.N + 3
    table = torch.randperm(pages)[: d.B * d.N].view(d.B, d.N).int()
    table[1:, 0] = table[0, 0]
    indices = torch.randint(-1, d.N, (d.B, d.T, d.H, d.K), dtype=torch.int32)
    named = table.gather(1, indices.flatten(1).clamp(min=0).long())[indices.flatten(1) >= 0].long()
    k, v = (torch.full((pages, S, d.H, d.D), torch.nan) for _ in range(2))
    k[named], v[named] = (torch.randn(len(named), S, d.H, d.D) for _ in range(2))
    q = torch.randn(d.B, d.T, d.HQ, d.D)
    weights = torch.randn(d.B, d.T, d.HQ if d.per_head else d.H, d.K)
    q, k, v = (x.to("cuda", dtype) for x in (q, k, v))
    return q, k, v, weights.cuda(), indices.cuda(), table.cuda()


@pytest.mark.parametrize("impl", ("auto", "reference", "tilelang", "triton"))
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_equals_the_oracle(impl, dtype, dims):
    call = make(dims, dtype)
    assert_attention({"out": hsa_decode(*call, impl=impl)}, laid_out(*call), chunk_size=S)


@pytest.mark.parametrize("impl", ("auto", "reference", "tilelang", "triton"))
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_selected_equals_the_oracle(impl, dtype, dims):
    q, k, v, weights, indices, table = make(dims, dtype)
    out, lse = selected_decode(q, k, v, indices, table, impl=impl)
    call = laid_out(q, k, v, weights, indices, table)
    call = SelectedInputs(*call[:3], call.indices, call.do, lse)
    assert_attention({"out": out, "lse": lse}, call, chunk_size=S)


@pytest.mark.parametrize("impl", ("tilelang", "triton", "reference"))
@pytest.mark.device  # on a CPU it raises
def test_out_of_range_is_an_empty_slot(impl):
    q, k, v, weights, indices, table = make(DIMS["batch"], torch.bfloat16)
    bad = torch.where(indices < 2, torch.tensor([-5, 20, 2**31 - 1, -1], device="cuda").repeat(4).int(), indices)
    good = torch.where(indices < 2, -1, indices)
    table[0] = 1 << 30
    good[0] = -1
    run = lambda i: hsa_decode(q, k, v, weights, i, table, impl=impl)  # noqa: E731
    assert torch.equal(run(bad), run(good))


@pytest.mark.parametrize("impl", ("auto", "tilelang", "triton", "reference"))
@pytest.mark.device
def test_a_step_replays_in_a_graph(impl):
    """Retrieval, weights and attention without a host synchronisation; lengths change between replays."""
    d = DIMS["paper"]
    q, k, v, _, _, table = make(d, torch.bfloat16)
    k, v = k.nan_to_num(nan=1.0), v.nan_to_num(nan=1.0)
    q_slc, landmarks = (torch.randn(1, n, 1, 128, device="cuda", dtype=q.dtype) for n in (1, d.N))
    lengths = torch.tensor([100 * S], dtype=torch.int32, device="cuda")

    def step():
        scores, indices = retrieve_decode(q_slc, landmarks, lengths, d.K)
        out = hsa_decode(q, k, v, fusion_weights(scores), indices, table, impl=impl)
        return indices, out, *selected_decode(q, k, v, indices, table, impl=impl)

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for n in (100 * S, 70 * S + 3, 5):
        lengths.fill_(n)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(results, step(), strict=True))
        assert (results[0] >= 0).sum() == min(d.K, n // S)


@pytest.mark.parametrize(
    "D_r, topk, T, N", ((16, 33, 2, 1000), (128, 64, 1, 1000), (64, 128, 9, 70000), (128, 16, 1, 40))
)
@pytest.mark.parametrize("impl", ("two-level", "auto", "tilelang", "reference"))
def test_retrieval_equals_retrieve_chunks(impl, D_r, topk, T, N):
    """Integers, so every score is exact and many are equal."""
    q, landmarks = (torch.randint(-1, 2, (2, n, 3, D_r), device="cuda").bfloat16() for n in (T, N))
    lengths = torch.tensor([N * S, 300], dtype=torch.int32, device="cuda")
    options = {"impl": impl}
    if impl == "two-level":
        options = {"bounds": landmark_bounds(landmarks)}
    got = retrieve_decode(q, landmarks, lengths, topk, exclude_window=100, **options)
    for b, n in enumerate(lengths.tolist()):
        part = slice(b, b + 1)
        want = retrieve_chunks(q[part], landmarks[part], topk, q_start=n, exclude_window=100, impl="reference")
        assert torch.equal(got[1][part], want[1]) and torch.equal(got[0][part], want[0])


def test_decode_retrieves_the_bits_of_a_prefill():
    """One program multiplies tokens by landmarks, the other landmarks by tokens."""
    q, landmarks = (torch.randn(1, n, 1, 128, device="cuda").bfloat16() for n in (64, 9000))
    start = 9000 * S - 64
    whole = retrieve_chunks(q, landmarks, 64, q_start=start, impl="tilelang")
    for t in range(64):
        lengths = torch.tensor([start + t], dtype=torch.int32, device="cuda")
        one = retrieve_decode(q[:, t : t + 1], landmarks, lengths, 64, impl="tilelang")
        assert torch.equal(one[0], whole[0][:, t : t + 1]) and torch.equal(one[1], whole[1][:, t : t + 1])


@pytest.mark.device
def test_offloaded_equals_on_device(tmp_path):
    spec = MemorySpec(2, 2, 64, 2, 32, S, torch.bfloat16)
    options = ({}, {"capacity": 2, "pages": 2}, {"offload": True, "cache_pages": 8}, {"offload": True})
    memories = [PagedMemory(spec, device="cuda", **x) for x in options]
    for b, n in ((0, 30), (1, 7)):
        k, v = (torch.randn(n, *spec.page, device="cuda", dtype=spec.dtype) for _ in range(2))
        landmarks = torch.randn(n, *spec.landmark, device="cuda", dtype=spec.dtype)
        for memory in memories:
            memory.append(b, k, v, landmarks)
    memories[2].save(tmp_path / "m")
    memories.append(PagedMemory.load(tmp_path / "m", device="cuda"))
    lengths = torch.tensor([30 * S, 7 * S], dtype=torch.int32, device="cuda")
    for _ in range(20):
        q, q_slc = (torch.randn(2, 1, h, d, device="cuda", dtype=spec.dtype) for h, d in ((8, 64), (2, 32)))
        first = None
        for memory in memories:
            scores, indices = memory.retrieve(q_slc, lengths, 5)
            memory.prefetch(indices)
            out = memory.attend(q, fusion_weights(scores), indices).float()
            first = first or (indices, out)
            assert torch.equal(indices, first[0])
            torch.testing.assert_close(out, first[1], rtol=0.02, atol=0.02)
