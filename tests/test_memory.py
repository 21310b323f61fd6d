"""The chunk memory: decode through it equals attention over the whole sequence; growth, offload, files."""

import dataclasses
import json

import pytest
import torch
from tiers import tiered

from hsa_tl import fusion_weights, hsa_attention, retrieve_chunks
from hsa_tl.model import ChunkEncoder, HSALayer, MemorySpec, PagedMemory
from hsa_tl.testing import Inputs, assert_attention

S, H, G, D, E, K = 16, 2, 3, 16, 8, 3
SPEC = MemorySpec(batch=3, heads=H, head_dim=D, retrieval_heads=H, retrieval_dim=E, chunk_size=S)
# Growing from one page, two-level retrieval, a cache smaller than one step's pages.
KINDS = {
    "one slab": {"capacity": 128},
    "slabs": {"capacity": 1, "pages": 1},
    "two-level": {"capacity": 64, "two_level": True},
    "offloaded": {"offload": True, "cache_pages": 64},
    "offloaded, small cache": {"offload": True, "cache_pages": 2, "capacity": 1, "pages": 1},
}
each_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def chunks(n, spec=SPEC, dtype=torch.float32):
    k, v = (torch.randn(n, *spec.page, dtype=dtype) for _ in range(2))
    return k, v, torch.randn(n, *spec.landmark, dtype=dtype)


def filled(counts, **options):
    """A memory whose sequences hold so many chunks, appended in turns of one or more, and those chunks."""
    memory = PagedMemory(dataclasses.replace(SPEC, batch=len(counts)), **options)
    parts = [[] for _ in counts]
    step = 1
    while any(held < n for held, n in zip(memory.held, counts, strict=True)):
        for b, n in enumerate(counts):
            new = chunks(min(step, n - memory.held[b]))
            if len(new[0]):
                memory.append(b, new[0] if step % 2 else new[0].flatten(0, 1), *new[1:])
                parts[b].append(new)
        step = step % 5 + 1
    empty = chunks(0)
    return memory, [[torch.cat(x) for x in zip(empty, *p, strict=True)] for p in parts]


@each_kind
def test_token_by_token_equals_the_whole_sequence(options):
    """Selection bit for bit; sequences of other lengths decode beside it."""
    T = 9 * S + 5
    spec = dataclasses.replace(SPEC, batch=2)
    memory = PagedMemory(spec, **options)
    k, v, landmarks = chunks(T // S)
    q, q_slc = torch.randn(1, T, H * G, D), torch.randn(1, T, H, E)
    scores, indices = retrieve_chunks(q_slc, landmarks[None], K, chunk_size=S)
    weights = fusion_weights(scores)
    call = q, k.flatten(0, 1)[None], v.flatten(0, 1)[None], weights, indices
    late = 3 * S  # the second sequence starts so much later
    outs, selections = [[], []], [[], []]
    for t in range(T):
        now = [t, max(0, t - late)]
        for b, position in enumerate(now):
            if position and position % S == 0 and memory.held[b] < position // S:
                c = position // S - 1
                memory.append(b, k[c : c + 1], v[c : c + 1], landmarks[c : c + 1])
        queries = [torch.cat([x[:, p : p + 1] for p in now]) for x in (q, q_slc)]
        got = memory.retrieve(queries[1], int32(now), K)
        out = memory.attend(queries[0], fusion_weights(got[0]), got[1])
        for b in range(2):
            if b == 0 or t >= late:
                outs[b].append(out[b])
                selections[b].append(got[1][b])
    for b in range(2):
        n = len(outs[b])
        assert torch.equal(torch.cat(selections[b]), indices[0, :n])
        part = Inputs(q[:, :n], *call[1:3], weights[:, :n], indices[:, :n], torch.zeros_like(q[:, :n]))
        assert_attention({"out": torch.cat(outs[b])[None]}, part, chunk_size=S)
    torch.testing.assert_close(torch.cat(outs[0])[None], hsa_attention(*call, chunk_size=S))


@each_kind
@pytest.mark.parametrize("impl", tiered(("auto", "tilelang"), quick=("auto",)))
def test_ragged_batch(options, impl):
    counts = (5, 0, 70)
    memory, content = filled(counts, **options)
    assert memory.held == list(counts) and memory.pages == 75
    q, q_slc = torch.randn(3, 2, H * G, D), torch.randn(3, 2, H, E)
    lengths = [n * S + extra for n, extra in zip(counts, (3, 7, 0), strict=True)]
    scores, indices = memory.retrieve(q_slc, int32(lengths), K, exclude_window=S)
    out = memory.attend(q, fusion_weights(scores), indices, scale=0.3, impl=impl)
    masses = memory.masses(q, indices, scale=0.3, impl=impl)
    assert (out[1] == 0).all() and (masses[1] == -torch.inf).all()
    for b in (0, 2):
        k, v, landmarks = content[b]
        part = slice(b, b + 1)
        want = retrieve_chunks(q_slc[part], landmarks[None], K, chunk_size=S, q_start=lengths[b], exclude_window=S)
        assert torch.equal(indices[part], want[1])
        torch.testing.assert_close(scores[part], want[0])
        k, v = (x.flatten(0, 1)[None] for x in (k, v))
        call = Inputs(q[part], k, v, fusion_weights(want[0]), want[1], torch.zeros_like(q[part]))
        assert_attention({"out": out[part]}, call, chunk_size=S, scale=0.3)
        each = k[0].unflatten(0, (-1, S)).permute(2, 0, 1, 3)  # [H, chunks, S, D]
        chosen = each[torch.arange(H)[:, None], indices[b].clamp(min=0)]  # [T, H, K, S, D]
        lse = torch.einsum("thgd,thksd->thgks", q[b].unflatten(1, (H, G)) * 0.3, chosen).logsumexp(-1)
        lse = lse.masked_fill(indices[b, :, :, None] < 0, -torch.inf)
        torch.testing.assert_close(masses[b], lse.flatten(1, 2))


@pytest.mark.parametrize("slabs", (KINDS["slabs"], KINDS["offloaded, small cache"]))
def test_growing_copies_no_keys_and_values(slabs):
    memory, _ = filled((3, 1), **slabs)
    stores = memory.k_slabs, memory.v_slabs
    before = [[x.data_ptr() for x in slabs] for slabs in stores]
    for _ in range(6):
        memory.append(0, *chunks(40))
    assert len(memory.k_slabs) == 9 and sum(map(len, memory.k_slabs)) < 2 * memory.pages
    assert [[x.data_ptr() for x in slabs][: len(b)] for slabs, b in zip(stores, before, strict=True)] == before


def test_equal_scores_in_a_memory_that_grew():
    """The lower chunk wins as in one that has not."""
    memory = PagedMemory(dataclasses.replace(SPEC, batch=1), capacity=64)
    k, v, landmarks = chunks(200)
    landmarks = landmarks.sign()
    memory.append(0, k, v, landmarks)
    q_slc = torch.randn(1, 4, H, E).sign()
    got = memory.retrieve(q_slc, int32([200 * S]), 70)
    want = retrieve_chunks(q_slc, landmarks[None], 70, chunk_size=S, q_start=200 * S)
    assert memory.marks.shape[1] == 256
    assert torch.equal(got[1], want[1])


def test_offloaded_fetches_what_is_chosen_once():
    memory, _ = filled((9, 9), offload=True, cache_pages=6)
    q = torch.randn(2, 1, H * G, D)
    weights = torch.rand(2, 1, H, 2)
    plain, _ = filled((9, 9))
    for x in ("k_slabs", "v_slabs"):
        setattr(plain, x, getattr(memory, x))

    def step(*rows):
        indices = int32(rows).view(2, 1, 1, 2).expand(2, 1, H, 2).contiguous()
        torch.testing.assert_close(memory.attend(q, weights, indices), plain.attend(q, weights, indices))
        return memory.cache.hits, memory.cache.misses

    assert step((0, 1), (3, 3)) == (0, 3)
    assert step((0, 1), (3, -1)) == (3, 3)
    assert step((4, 5), (6, 7)) == (3, 7)  # the oldest of the first three goes
    assert step((4, 5), (6, 7)) == (7, 7)
    memory.prefetch(int32((8, -1, 8, 8)).view(2, 1, 1, 2))
    assert step((8, -1), (8, 8)) == (9, 9)


def _same(a, b):
    assert (a.spec, a.held, a.pages) == (b.spec, b.held, b.pages)
    q, q_slc = torch.randn(3, 1, H * G, D, dtype=a.spec.dtype), torch.randn(3, 1, H, E, dtype=a.spec.dtype)
    results = []
    for memory in (a, b):
        scores, indices = memory.retrieve(q_slc, int32([10_000] * 3), K)
        results.append((scores, indices, memory.attend(q, fusion_weights(scores), indices)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2])


@each_kind
def test_save_and_load(options, tmp_path):
    memory, _ = filled((5, 0, 70), **options)
    memory.save(tmp_path / "a" / "memory.safetensors")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["memory.safetensors"]
    for other in KINDS.values():
        loaded = PagedMemory.load(tmp_path / "a" / "memory.safetensors", memory.spec, **other)
        _same(memory, loaded)
        loaded.append(1, *chunks(3))
        loaded.append(2, *chunks(70))
        assert loaded.held == [5, 3, 140]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_save_and_load_other_types(dtype, tmp_path):
    memory = PagedMemory(dataclasses.replace(SPEC, dtype=dtype))
    for b in range(3):
        memory.append(b, *chunks(b + 1, dtype=dtype))
    memory.save(tmp_path / "m")
    _same(memory, PagedMemory.load(tmp_path / "m"))


def test_an_empty_memory_is_saved_too(tmp_path):
    PagedMemory(SPEC).save(tmp_path / "m")
    assert PagedMemory.load(tmp_path / "m").held == [0, 0, 0]


def test_every_truncation_is_refused(tmp_path):
    memory, _ = filled((2, 0, 1))
    memory.save(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:header])
    ends = [header + x["data_offsets"][1] for name, x in entries.items() if name != "__metadata__"]
    cuts = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) - 1}
    cuts |= {end + i for end in ends for i in (-1, 0, 1) if end + i < len(data)}
    for n in sorted(cuts):
        (tmp_path / "cut").write_bytes(data[:n])
        with pytest.raises(ValueError, match="cut must be a whole safetensors file"):
            PagedMemory.load(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(data + b"x")
    with pytest.raises(ValueError, match="whole safetensors file"):
        PagedMemory.load(tmp_path / "cut")


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("heads", 1, "hold k of shape"),
        ("dtype", "float64", "hold k of shape .* and type F64"),
        ("batch", 2, r"hold chunks of shape \[2\]"),
        ("retrieval_dim", 4, "hold landmarks of shape"),
        ("chunk_size", -1, "say the dims of its memory"),
        ("dtype", "float3", "say the dims of its memory"),
        ("colour", 1, "say the dims of its memory"),
    ],
)
def test_a_mismatched_file_is_refused(name, value, words, tmp_path):
    memory, _ = filled((2, 0, 1))
    memory.save(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"]["spec"] = json.dumps(json.loads(header["__metadata__"]["spec"]) | {name: value})
    text = json.dumps(header).encode()
    (tmp_path / "m").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(ValueError, match=f"m must .*{words}"):
        PagedMemory.load(tmp_path / "m")


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    memory, _ = filled((2, 0, 1))
    memory.save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"must hold a memory of .*heads=5.*got .*heads=2"):
        PagedMemory.load(tmp_path / "m", dataclasses.replace(SPEC, heads=5))
    save_file({"x": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be a chunk memory .*got no format"):
        PagedMemory.load(tmp_path / "other")
    save_file({"x": torch.zeros(3)}, tmp_path / "other", {"format": "hsa_tl.memory.1"})
    with pytest.raises(ValueError, match="must hold chunks, page_table"):
        PagedMemory.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        PagedMemory.load(tmp_path / "absent")
    memory.host_table[0, 0] = memory.host_table[0, 1]
    memory.save(tmp_path / "twice")
    with pytest.raises(ValueError, match="must give each page to one chunk"):
        PagedMemory.load(tmp_path / "twice")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    memory, _ = filled((2, 0, 1))
    memory.save(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    memory.append(1, *chunks(1))
    from hsa_tl.model import memory_file

    def fail(x):
        raise OSError("no space")

    monkeypatch.setattr(memory_file, "_blocks", fail)
    with pytest.raises(OSError, match="no space"):
        memory.save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_safetensors_reads_the_file(tmp_path):
    """It is a plain safetensors file to everyone."""
    from safetensors.torch import load_file

    memory, content = filled((2, 0, 1))
    memory.save(tmp_path / "m")
    file = load_file(tmp_path / "m")
    assert torch.equal(file["k"][file["page_table"][0, :2].long()], content[0][0])
    assert torch.equal(file["landmarks"][:1, 2], content[2][2])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda k, v, m: (3, k, v, m), r"sequence must be an int in \[0, 3\), got 3"),
        (lambda k, v, m: (0, k[:1], v, m), r"k must have shape \[2, 16, 2, 16\], got shape \[1,"),
        (lambda k, v, m: (0, k, v.double(), m), r"v must have dtype torch.float32, got torch.float64"),
        (lambda k, v, m: (0, k, v, m[:, :1]), r"landmarks must have shape \[2, 2, 8\]"),
    ],
)
def test_a_bad_append_stores_nothing(change, words):
    memory, _ = filled((2, 0, 1))
    with pytest.raises(ValueError, match=words):
        memory.append(*change(*chunks(2)))
    assert memory.held == [2, 0, 1] and memory.pages == 3


@each_kind
def test_no_chunks_are_appended_anywhere(options):
    memory, _ = filled((5, 0, 1), **options)
    for b in range(3):
        memory.append(b, *chunks(0))
    assert memory.held == [5, 0, 1]


@each_kind
def test_a_chunk_that_is_not_held_is_refused(options):
    memory, _ = filled((2, 0, 1), **options)
    indices = torch.zeros(3, 1, H, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="must lie in"):
        memory.attend(torch.zeros(3, 1, H * G, D), torch.ones(3, 1, H, 1), indices)


def test_bad_options():
    with pytest.raises(ValueError, match="capacity must be a positive int, got 0"):
        PagedMemory(SPEC, capacity=0)
    with pytest.raises(ValueError, match="cache_pages must be left out without offload, got 64"):
        PagedMemory(SPEC, cache_pages=64)
    with pytest.raises(ValueError, match="heads must be a positive int, got 0"):
        dataclasses.replace(SPEC, heads=0)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'chunk_size'"):
        PagedMemory(SPEC).retrieve(torch.zeros(3, 1, H, E), 64, K, chunk_size=64)


@pytest.mark.parametrize("topk", (K, "all"))
def test_a_layer_decodes_what_it_prefills(topk):
    B, T, C = 2, 75, 32
    encoder = ChunkEncoder(C, kv_heads=H, head_dim=D, retrieval_dim=E, chunk_size=S)
    layer = HSALayer(C, H * G, H, D, E, topk=topk, exclude_window=S)
    x = torch.randn(B, T, C)
    with torch.no_grad():
        chunked = encoder(x)
        whole = layer(x, chunked)
    memory = PagedMemory(dataclasses.replace(SPEC, batch=B), capacity=2)
    out = []
    for t in range(T):
        if t and t % S == 0:
            tokens, c = slice(t - S, t), t // S - 1
            for b in range(B):
                memory.append(b, chunked.k[b, tokens], chunked.v[b, tokens], chunked.landmarks[b, c : c + 1])
        with torch.no_grad():
            out.append(layer(x[:, t : t + 1], memory, int32([t] * B)))
    torch.testing.assert_close(torch.cat(out, 1), whole)


@each_kind
def test_sequences_share_pages_and_give_them_back(options, tmp_path):
    """A fork reads as its source did; what is free is used again, and no cached page is stale."""
    memory, content = filled((5, 0, 70), **options)

    def read(b, length):
        lengths = int32([length if b == i else 0 for i in range(3)])
        scores, indices = memory.retrieve(q_slc.expand(3, -1, -1, -1), lengths, K)
        return memory.attend(q.expand(3, -1, -1, -1), fusion_weights(scores), indices)[b]

    q, q_slc = torch.randn(1, 1, H * G, D), torch.randn(1, 1, H, E)
    want = [read(2, 70 * S), read(2, 40 * S)]
    memory.fork(2, 1)
    assert memory.held == [5, 70, 70] and memory.pages == 75 and memory.counts.references[-1] == 2
    torch.testing.assert_close(read(1, 70 * S), want[0])
    memory.free(2)
    assert memory.pages == 75  # the fork still holds them
    memory.crop(1, 40)
    assert memory.held == [5, 40, 0] and memory.pages == 45
    torch.testing.assert_close(read(1, 40 * S), want[1])
    new = chunks(33)
    memory.append(2, *new)
    assert memory.pages == 78 and len(memory.counts.references) == 78
    fresh = PagedMemory(SPEC, **options)
    fresh.append(2, *new)
    fresh.append(1, *(x[:40] for x in content[2]))
    memory.save(tmp_path / "m")
    for again in (memory, PagedMemory.load(tmp_path / "m", **options)):
        lengths, queries = int32([0, 40 * S, 33 * S]), q_slc.expand(3, -1, -1, -1)
        (scores, indices), (other, same) = again.retrieve(queries, lengths, K), fresh.retrieve(queries, lengths, K)
        assert torch.equal(indices[1:], same[1:])
        torch.testing.assert_close(scores[1:], other[1:])
        a, b = (m.attend(q.expand(3, -1, -1, -1), fusion_weights(scores), same) for m in (again, fresh))
        torch.testing.assert_close(a[1:], b[1:])
        assert again.pages == 78


def test_forks_and_crops_that_cannot_be():
    memory, _ = filled((2, 1))
    for call, message in (
        (lambda: memory.fork(0, 1), r"target must be empty, `free` it first, got 1 chunks"),
        (lambda: memory.fork(0, 2), r"target must be an int in \[0, 2\), got 2"),
        (lambda: memory.crop(0, 3), r"chunks must be an int from 0 to 2, what the sequence holds, got 3"),
        (lambda: memory.free(-1), r"sequence must be an int in \[0, 2\), got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
