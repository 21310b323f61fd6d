"""A memory with a budget keeps the chunks that tokens read most, the pinned ones, and all of them where it has room."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_memory import KINDS, SPEC, D, E, G, H, K, S, chunks, each_kind, int32

from hsa_tl import fusion_weights, hsa_attention
from hsa_tl.model import Model, PagedMemory, load, preset
from hsa_tl.model.chunk_memory import chunk_scores
from hsa_tl.model.evaluate import accuracy, answers_right, needle_samples
from hsa_tl.model.longcontext import LongReader

BATCH = 2
FORMS = {"plain": {}, "recency": {"recency": torch.tensor([4.0, 1.0])}, "window": {"exclude_window": 3 * S}}


def reads(memory, rows):
    """One token of each sequence reads these chunks, by equal weights."""
    indices = int32(rows)[:, None, None].expand(-1, 1, H, -1).contiguous()
    memory.attend(torch.randn(BATCH, 1, H * G, D), torch.ones(indices.shape) / indices.shape[3], indices)


def step(memory, n=1):
    """Appends chunks to every sequence; what they hold."""
    new = [chunks(n) for _ in range(BATCH)]
    for b, x in enumerate(new):
        memory.append(b, *x)
    return new


def kept(memory, sequence):
    return sorted(set(range(memory.held[sequence])) - set(memory.evicted[sequence]))


@each_kind
def test_the_least_read_goes_and_a_pinned_chunk_stays(options):
    memory = PagedMemory(replace(SPEC, batch=BATCH), budget=4, **options)
    step(memory, 5)  # what one call brings stays until the next
    assert memory.evicted == [[], []]
    memory.pin(1, [1])
    reads(memory, [[0, 2, 3, 4], [0, 2, 3, 4]])
    step(memory)
    assert memory.evicted == [[1], [0]]  # of equal worth the pinned one and the younger ones stay
    reads(memory, [[3, 4], [1, 4]])
    for _ in range(40):
        step(memory)
    # The last two: what no token may have read yet does not go.
    assert [kept(memory, b) for b in range(BATCH)] == [[2, 3, 4, 44, 45], [1, 3, 4, 44, 45]]
    assert memory.pages == 2 * 5 and memory.held == [46, 46]


@each_kind
def test_a_memory_made_in_inference_mode_is_changed_outside(options):
    with torch.inference_mode():
        memory = PagedMemory(replace(SPEC, batch=BATCH), budget=2, **options)
        step(memory, 70)
    reads(memory, [[69, 3], [68, 2]])
    memory.pin(0, [7])
    step(memory, 100)
    memory.free(0)
    memory.fork(1, 0)
    assert [kept(memory, b) for b in range(BATCH)] == [[*range(68, 170)]] * 2


def test_worth_is_mass_over_age():
    """A younger chunk with less mass outlives an older one with more."""
    for times, want in ((3, [0, 5, 6]), (2, [3, 5, 6])):  # 3 / 5 > 1 / 2 > 2 / 5
        memory = PagedMemory(replace(SPEC, batch=BATCH), budget=2)
        step(memory)
        for _ in range(times):
            reads(memory, [[0], [0]])
        step(memory, 5)
        reads(memory, [[3], [3]])
        step(memory)
        assert [kept(memory, b) for b in range(BATCH)] == [want] * 2


def test_weights_of_nan_keep_no_chunk():
    memory = PagedMemory(replace(SPEC, batch=BATCH), budget=2)
    step(memory, 6)
    reads(memory, [[4], [4]])
    indices = int32([0, 1, 2]).expand(BATCH, 1, H, 3).contiguous()
    memory.attend(torch.randn(BATCH, 1, H * G, D), torch.full(indices.shape, torch.nan), indices)
    step(memory)
    assert [kept(memory, b) for b in range(BATCH)] == [[4, 5, 6]] * 2


@each_kind
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_evicted_is_never_chosen(options, form):
    """The choice and the output are those of the chunks that stay, at their own positions."""
    memory = PagedMemory(replace(SPEC, batch=BATCH), budget=5, **options)
    content = [[], []]
    for t in range(1, 12):
        for b, new in enumerate(step(memory)):
            content[b].append(new)
        q, q_slc = torch.randn(BATCH, 3, H * G, D), torch.randn(BATCH, 3, H, E)
        lengths = int32([t * S + 2] * BATCH)
        scores, indices = memory.retrieve(q_slc, lengths, K, **form)
        out = memory.attend(q, fusion_weights(scores), indices)
        for b in range(BATCH):
            k, v, landmarks = (torch.cat(x) for x in zip(*content[b], strict=True))
            every = chunk_scores(q_slc[b : b + 1], landmarks[None], t * S + 2, S, **form)[0]
            every[..., memory.evicted[b]] = -torch.inf
            want, best = every.sort(dim=-1, descending=True, stable=True)
            n = min(K, t)
            for token, head in ((x, y) for x in range(3) for y in range(H)):
                chosen = [i for i, s in zip(best[token, head], want[token, head], strict=True) if s > -torch.inf][:K]
                got = indices[b, token, head].tolist()
                assert got == sorted(map(int, chosen)) + [-1] * (K - len(chosen))
            filled = torch.where(indices[b] >= 0, scores[b], -torch.inf).sort(descending=True).values[..., :n]
            torch.testing.assert_close(filled, want[..., :n])
            k, v = (x.flatten(0, 1)[None] for x in (k, v))
            part = slice(b, b + 1)
            same = hsa_attention(q[part], k, v, fusion_weights(scores[part]), indices[part], chunk_size=S)
            torch.testing.assert_close(out[part], same)
    assert [len(x) for x in memory.evicted] == [5, 5] and memory.pages == 12


def test_empty_slots_come_last_however_many_chunks_are_asked_for():
    memory = PagedMemory(replace(SPEC, batch=BATCH), budget=2)
    for n in (5, 1):
        memory.append(0, *chunks(n))
    assert memory.evicted[0] == [0, 1, 2]
    for topk in range(1, 9):
        row = memory.retrieve(torch.randn(BATCH, 1, H, E), 6 * S, topk)[1][0, 0, 0].tolist()
        n = min(topk, 3)
        assert row == sorted(row[:n]) + [-1] * (topk - n) and set(row[:n]) <= {3, 4, 5}, topk
    scores, indices = memory.retrieve(torch.randn(BATCH, 0, H, E), 6 * S, K)
    assert scores.shape == indices.shape == (BATCH, 0, H, K)


@each_kind
def test_evicted_chunks_stay_so_in_forks_crops_and_files(options, tmp_path):
    memory = PagedMemory(replace(SPEC, batch=BATCH), budget=4, **options)
    new = chunks(6)
    memory.append(0, *new)
    memory.pin(0, [0])
    reads(memory, [[1, 3], [-1, -1]])
    memory.append(0, *chunks(1))
    reads(memory, [[6], [-1]])
    assert memory.evicted[0] == [2, 4] and memory.pages == 5
    memory.save(tmp_path / "m")
    memory.fork(0, 1)
    loaded = PagedMemory.load(tmp_path / "m", budget=4, **options)
    loaded.fork(0, 1)
    for each in (memory, loaded):
        assert each.evicted == [[2, 4], [2, 4]] and each.held == [7, 7] and each.pages == 5
        each.crop(0, 4)
        assert each.evicted == [[2], [2, 4]] and each.pages == 5
        each.append(1, *chunks(1))
        assert each.evicted[1] == [2, 4, 5] and each.pages == 5
        each.free(1)
        assert each.evicted == [[2], []] and each.pages == 3
        each.append(0, *chunks(4))
        each.append(0, *chunks(1))  # chunk 6 was cropped, and its mass with it
        assert each.evicted[0] == [2, 4, 5, 6] and each.pages == 5
    unbounded = PagedMemory.load(tmp_path / "m", **options)
    unbounded.append(0, *chunks(9))
    assert unbounded.evicted == [[2, 4], []]
    with pytest.raises(ValueError, match="got 4, which sequence 0 evicted"):
        reads(unbounded, [[0, 4], [-1, -1]])


@pytest.mark.parametrize("options", (KINDS["one slab"], KINDS["slabs"], KINDS["offloaded"]))
def test_who_asks_for_an_evicted_chunk_is_told_which(options):
    memory = PagedMemory(replace(SPEC, batch=BATCH), budget=1, **options)
    step(memory, 3)
    step(memory)
    assert memory.evicted == [[0, 1]] * 2
    for call, message in (
        (
            lambda: reads(memory, [[2, 3], [3, 1]]),
            "indices must name chunks that are held, got 1, which sequence 1 evi",
        ),
        (lambda: reads(memory, [[2, 3], [3, 4]]), "must lie in"),
        (lambda: memory.pin(0, [2, 1]), "chunks must be such as sequence 0 holds, got 1, which it evicted"),
        (lambda: memory.pin(0, [4]), "chunks must be such as sequence 0 holds, got 4 of 4"),
        (lambda: memory.pin(0, [2.5]), "chunks must be such as sequence 0 holds, got 2.5 of 4"),
        (lambda: memory.replace(0, *chunks(1), start=1), "start must be of chunks that the sequence holds"),
        (lambda: memory.retrieve(torch.randn(BATCH, 1, H, E), 64, K, impl="triton"), "impl must be auto or reference"),
        (
            lambda: memory.attend(torch.randn(BATCH, 1, H * G, D), None, int32([3]).expand(BATCH, 1, H, 1)),
            "weights must be given to a memory with a budget",
        ),
        (lambda: PagedMemory(SPEC).pin(0, []), "chunks must be pinned in a memory with a budget"),
        (lambda: PagedMemory(SPEC, budget=0), "budget must be a positive int, got 0"),
        (lambda: Model(preset("tiny")).new_cache(1, budget=0.5), "budget must be a positive int, got 0.5"),
        (
            lambda: Model(replace(preset("tiny"), attention="swa")).new_cache(1, budget=4),
            "budget must go to a model with a chunk memory",
        ),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            call()


def read_in(model, cache, ids, size):
    parts = ids.split(size, 1)
    return torch.cat([model(x, cache=cache).logits for x in parts], 1)


@pytest.mark.parametrize(
    "changes", ({}, {"topk": "all"}, {"fusion": "joint"}, {"fusion": "mass"}, {"topp": 0.5}, {"recency": 16})
)
def test_a_cache_with_room_gives_the_same_bits_and_one_without_never_names_the_evicted(changes, tmp_path, monkeypatch):
    model = Model(replace(preset("tiny"), **changes)).eval()
    ids = torch.randint(0, 320, (2, 200))
    free, roomy, tight = (model.new_cache(2, undo=60, **x) for x in ({}, {"budget": 13}, {"budget": 3}))
    assert torch.equal(read_in(model, free, ids, 9), read_in(model, roomy, ids, 9))
    asked = []
    attend = type(tight.memory).attend

    def watched(memory, q, weights, indices, **options):
        asked.append(indices)
        assert not any(set(indices[b].flatten().tolist()) & set(memory.evicted[b]) for b in range(2))
        return attend(memory, q, weights, indices, **options)

    monkeypatch.setattr(PagedMemory, "attend", watched)
    read_in(model, tight, ids, 8)
    assert [len(x) for x in tight.memory.evicted] == [8, 8] and len(asked) == 25
    tight.save(tmp_path / "c")
    loaded = model.load_cache(tmp_path / "c")
    for name in ("budget", "undo"):
        with pytest.raises(ValueError, match=f"{name} must be left out: it is as saved, got 9"):
            model.load_cache(tmp_path / "c", **{name: 9})
    for cache in (tight, loaded):
        cache.crop(170)
    assert loaded.budget == 3 and loaded.memory.evicted == tight.memory.evicted
    assert torch.equal(loaded.memory.mass[:, :10], tight.memory.mass[:, :10])
    assert torch.equal(read_in(model, tight, ids[:, 170:], 5), read_in(model, loaded, ids[:, 170:], 5))


def test_rows_of_different_lengths_keep_what_each_keeps_alone():
    """Padding reads nothing that counts, in a long segment and in a short one."""
    model = Model(preset("tiny")).eval()
    ids = torch.randint(0, 320, (2, 300))
    together, alone = model.new_cache(2, budget=4), [model.new_cache(1, budget=4) for _ in range(2)]
    at = [0, 0]
    for counts in ((40, 20), (5, 1), (3, 0), (0, 30), (32, 40), (2, 8), (33, 17)):
        rows = [ids[b, a : a + n] for b, (a, n) in enumerate(zip(at, counts, strict=True))]
        model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), cache=together, lengths=list(counts))
        for b, row in enumerate(rows):
            if len(row):
                model(row[None], cache=alone[b], logits_to_keep=0)  # what nobody asks for counts too
        at = [a + n for a, n in zip(at, counts, strict=True)]
    for b, cache in enumerate(alone):
        assert together.memory.evicted[b] == cache.memory.evicted[0] != []
        mass, other = (x.memory.mass.float() for x in (together, cache))  # of float32 weights
        torch.testing.assert_close(mass[b, :20], other[0, :20])
        assert other.sum() == pytest.approx(at[b] - 16, rel=1e-5)  # each token that sees a chunk gives 1


def test_a_trained_model_keeps_its_needles():
    """A tenth of the chunks answers most questions; the newest tenth could answer a tenth."""
    model = load("needle-tiny")
    reader = LongReader(model, segment=model.config.chunk_size, budget=0.1)
    assert accuracy(partial(answers_right, reader), needle_samples("s-niah", 1024, 10)).right >= 7
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], .* got 2"):
        LongReader(model, budget=2)
    with pytest.raises(ValueError, match="a model that retrieves"):
        LongReader(model, retrieve=False, budget=0.5)
