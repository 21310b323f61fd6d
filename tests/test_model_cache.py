"""Reading segment by segment gives the logits of the one-shot forward: any segments, ragged batches, every memory."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import tiered

from hsa_tl import hsa_attention, retrieve_chunks
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.model import Model, chunk_memory, preset
from hsa_tl.model import cache as caches
from hsa_tl.model.attention import rotate
from hsa_tl.model.cache import Tail
from hsa_tl.model.generate import prefill
from hsa_tl.model.memory import MemorySpec, PagedMemory

SMALL = replace(
    preset("tiny"), dim=32, heads=4, kv_heads=2, head_dim=16, mlp_dim=48, retrieval_dim=16, layers=4, groups=2,
    vocab_size=50, encoder_mlp_dim=32, window=12, topk=3, retrieval_heads=2,
)  # fmt: skip
SELECTED = {"attention": "selected", "rope": ("selected",), "recency": 3, "sinks": 4, "far_positions": 30}
CONFIGS = {
    "hsa": {},
    "softmax1": {"fusion": "softmax1", "retrieval_heads": 1, "conv": 0},
    "stick_breaking": {"fusion": "stick_breaking", "exclude_window": True, "window": 40},
    "joint": {"fusion": "joint", "layers": 5, "groups": 3, "value_residual": "resformer"},
    "dense": {"topk": "all", "impl": "dense", "hsa_window": 5},
    "all": {"topk": "all", "rope": ("swa", "hsa"), "layers": 3, "groups": 1, "value_residual": "svformer"},
    "one softmax": {"fusion": "one_softmax", "retrieval_heads": 1},
    "one softmax, all": {"fusion": "one_softmax", "topk": "all", "impl": "dense"},
    "mass": {"fusion": "mass", "retrieval_heads": 1, "encoder_overlap": 9},
    "mass, all": {"fusion": "mass", "topk": "all", "impl": "dense", "encoder_overlap": 15, "conv": 0},
    "uniform": {"fusion": "uniform", "topk": "all", "impl": "dense"},
    "swa": {"attention": "swa"},
    "full": {"attention": "full", "value_residual": "resformer"},
    "full, log n": {"attention": "full", "rope": (), "log_length": 64},
    "nsa": {"attention": "nsa", "layers": 5, "groups": 2},
    "nsa, far only": {"attention": "nsa", "exclude_window": True, "window": 40, "topk": "all", "rope": ("swa", "nsa")},
    "selected": SELECTED | {"far_positions": 0, "topk": 2, "qk_norm": False, "heads": 6, "biases": ("q", "k", "v")},
    "selected by mean": SELECTED | {"selection": "mean", "sinks": 20, "rope_frequencies": (1.0, 0.01) * 4},
    "selected by landmark": SELECTED | {"selection": "landmark", "anchors": 4, "exact_heads": (0,), "sinks": 20},
    "moba": {"attention": "moba", "layers": 5, "groups": 2},
    "moba, all": {"attention": "moba", "topk": "all", "rope": ("swa", "moba"), "value_residual": "resformer"},
    "linear": {"linear": True, "rope": ("linear",), "groups": 1},
    "linear below": {"linear": True, "fusion": "joint", "value_residual": "svformer"},
    "linear, full": {"linear": True, "attention": "full", "rope": (), "log_length": 64, "value_residual": "resformer"},
    "linear only": {"attention": "linear", "layers": 2, "groups": 1, "conv": 0},
    "moe": {"experts": 6, "experts_per_token": 2, "expert_dim": 16},
    "recency": {"recency": 3, "retrieval_heads": 2},
    "landmarks without norm": {"landmark_norm": False},
    "recency, all": {"recency": 16, "topk": "all", "fusion": "joint", "exclude_window": True, "window": 40},
    "window of one": {"window": 1, "layers": 2, "groups": 1},
}
RECURRENT = [name for name in CONFIGS if name.startswith("linear")]
each_config = pytest.mark.parametrize("name", CONFIGS)
MEMORIES = {
    "growing": {"capacity": 16},
    "mapped": {"directory": "."},
    "offloaded": {"offload": True, "cache_pages": 3},
    "two-level": {"two_level": True},
}
T = 150
SPLITS = {
    "one": (1,) * T,
    "short": (3, 2, 4, 1) * 15,
    "mixed": (5, 1, 1, 40, 16, 3, 9, 32, 11, 1, 17, 1, 13),  # a prompt below a chunk, several chunks at once
    "long": (130, 20),
}


def models(changes):
    """A model and the same in float64."""
    model = Model(replace(SMALL, **changes)).eval()
    exact = Model(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    return model, exact


@torch.no_grad()
def one_shot(exact, ids):
    return expect(lambda: exact(ids).logits)


@functools.cache
def whole(name):
    """A config's model, two rows of T tokens, and their logits in one shot; expecting them takes a second."""
    torch.manual_seed(0)
    model, exact = models(CONFIGS[name])
    ids = torch.randint(50, (2, T))
    return model, ids, one_shot(exact, ids)


def read(model, cache, ids, split):
    return torch.cat([model(part, cache=cache).logits for part in ids.split(list(split), 1)], 1)


@each_config
@pytest.mark.parametrize("split", tiered(SPLITS, quick=("mixed",)))
def test_segments_equal_one_shot(name, split):
    model, ids, wanted = whole(name)
    cache = model.new_cache(2)
    got = read(model, cache, ids, split)
    assert not got.requires_grad and cache.lengths == [T, T]
    assert_accurate("logits", got, wanted)


@pytest.mark.parametrize("options", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("split", (SPLITS["mixed"], SPLITS["short"]), ids=("mixed", "short"))
@pytest.mark.parametrize("name", ("hsa", "one softmax", "mass"))
def test_every_memory(name, options, split, tmp_path):
    model, ids, wanted = whole(name)
    if "directory" in options:
        options = {"directory": tmp_path}
    cache = model.new_cache(2, **options)
    assert_accurate("logits", read(model, cache, ids, split), wanted)
    assert not any(tmp_path.iterdir())  # the files have no names


@st.composite
def ragged(draw):
    """Segments as (width, tokens of each of three rows, logits to keep)."""
    segments = []
    for _ in range(draw(st.integers(1, 5))):
        width = draw(st.sampled_from((1, 2, 7, 9, 30, 64)))
        counts = [draw(st.integers(0, width)) for _ in range(3)]
        segments.append((width, counts, draw(st.sampled_from((None, None, 0, 1, 3)))))
    return segments


@settings(max_examples=10)
@given(segments=ragged(), seed=st.integers(0, 99), name=st.sampled_from(sorted(CONFIGS)))
def test_ragged_batches_equal_each_row_alone(segments, seed, name):
    torch.manual_seed(seed)
    model, exact = models(CONFIGS[name])
    total = [sum(counts[b] for _, counts, _ in segments) for b in range(3)]
    rows = [torch.randint(50, (1, n)) for n in total]
    wanted = [one_shot(exact, row) for row in rows if row.numel()]
    wanted = [wanted.pop(0) if n else None for n in total]
    cache = model.new_cache(3)
    at = [0, 0, 0]
    for width, counts, keep in segments:
        ids = torch.randint(50, (3, width))
        for b, n in enumerate(counts):
            ids[b, :n] = rows[b][0, at[b] : at[b] + n]
        logits = model(ids, cache=cache, lengths=counts, logits_to_keep=keep).logits
        for b, n in enumerate(counts):
            at[b] += n
            m = n if keep is None else min(n, keep)
            if m:
                got = logits[b, :n] if keep is None else logits[b, -m:]
                assert_accurate(f"row {b}", got, wanted[b][0, at[b] - m : at[b]])
    assert cache.lengths == total


@each_config
def test_a_prefill_without_logits_runs_the_upper_decoder_once(name):
    model, ids, wanted = whole(name)
    config = model.config
    seen = []
    hook = model.layers[config.lower_layers].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    cache = model.new_cache(2, **({} if name in RECURRENT else {"undo": 10}))  # which stay right too
    for part in ids[:, :120].split(20, 1):
        assert model(part, cache=cache, logits_to_keep=0).logits is None
    got = model(ids[:, 120:130], cache=cache, logits_to_keep=1).logits
    hook.remove()
    if not {"swa", "hsa"}.issuperset(config.kinds[config.lower_layers :]):
        assert seen == [20] * 6 + [10]
    else:
        upper = config.layers - config.lower_layers
        windows = [config.window] * upper if config.attention == "swa" or not config.hsa_window else [5, 5]
        assert seen == [1 + cache.undo + sum(windows) - upper]
    rest = read(model, cache, ids[:, 130:], (1, 1, 5, 13))
    assert_accurate("logits", torch.cat([got, rest], 1), wanted[:, 129:])


def test_a_window_looks_the_same_at_sixteen_million():
    """RoPE is relative: keys of a window meet a query at the same angles anywhere."""
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 40, 1, 32)

    def scores(start):
        turned = rotate(k, start + torch.arange(40), 10000.0)
        return (rotate(q, torch.tensor([start + 39]), 10000.0) * turned).sum(-1)

    torch.testing.assert_close(scores((1 << 24) - 7), scores(0), atol=2e-5, rtol=0)


def test_a_prefill_holds_no_more_than_its_chunks_and_windows():
    model = Model(preset("tiny")).eval()
    c, T = model.config, 1 << 15
    _, cache = prefill(model, torch.randint(c.vocab_size, (1, T)), segment=512)
    memory = cache.memory
    assert memory.pages == T // c.chunk_size and len(memory.k_slabs) == 1
    assert memory.nbytes == 4 * (2 * T * c.head_dim + T // c.chunk_size * c.retrieval_dim)
    tails = [*cache.layers, cache.chunk, cache.waiting]
    assert max(x.shape[1] for tail in tails for x in tail.buffers) < 2 * (512 + c.window + cache.undo)


def test_rows_do_not_depend_on_each_other():
    model, _ = models({})
    ids = torch.randint(50, (3, 40))
    whole = read(model, model.new_cache(3), ids, (30, 10))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(read(model, model.new_cache(3), ids[order], (30, 10)), whole[order])
    torch.testing.assert_close(read(model, model.new_cache(1), ids[1:2], (30, 10)), whole[1:2])


@pytest.mark.parametrize("name", ("hsa", "full", "nsa", "moba"))
def test_two_sequences_of_different_lengths(name):
    model, ids, wanted = whole(name)
    cache, at = model.new_cache(2), (50, 20)
    model(ids[:, :50], cache=cache, lengths=list(at), logits_to_keep=0)
    got = model(torch.stack([row[n : n + 9] for row, n in zip(ids, at, strict=True)]), cache=cache).logits
    for b, n in enumerate(at):
        assert_accurate(f"row {b}", got[b], wanted[b, n : n + 9])


def test_labels_and_autocast_with_a_cache():
    model, _ = models({})
    ids = torch.randint(50, (2, 90))
    want = model(ids, labels=ids)
    cache = model.new_cache(2)
    model(ids[:, :50], cache=cache, logits_to_keep=0)
    labels = ids[:, 50:].clone()
    part = model(ids[:, 50:], labels=labels, cache=cache)
    expected = torch.nn.functional.cross_entropy(want.logits[:, 50:-1].flatten(0, 1), ids[:, 51:].flatten())
    torch.testing.assert_close(part.loss, expected)
    assert part.cache is cache
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2)
        got = read(model, cache, ids, (50, 1, 39))
    assert cache.memory.spec.dtype == torch.bfloat16
    assert (got - want.logits).abs().mean() < 0.05 * want.logits.abs().mean()


@settings(max_examples=30)
@given(
    keep=st.sampled_from((None, 0, 1, 5, 31)),
    segments=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12)), max_size=12),
)
def test_tail_holds_the_last_tokens(keep, segments):
    counts = [0, 0]
    tail, held = Tail(counts, keep), [[], []]
    value = 1
    for width, *lengths in segments:
        counts[:] = [min(width, n) for n in lengths]
        new = torch.arange(value, value + 2 * width).view(2, width, 1).float()
        value += 2 * width
        a, b, past = tail.extend(new, -new)
        assert torch.equal(a, -b) and torch.equal(a[:, -width:], new)
        for row in range(2):
            real = a.shape[1] - width if past is None else min(int(past[row]), a.shape[1] - width)
            wanted = held[row] if keep is None else held[row][len(held[row]) - min(keep, len(held[row])) :]
            assert a[row, a.shape[1] - width - real : a.shape[1] - width, 0].tolist() == wanted
            held[row] += new[row, : counts[row], 0].tolist()


def test_a_tail_grows_without_quadratic_copies():
    counts = [1]
    tail, moved, last = Tail(counts), 0, None
    for _ in range(3000):
        tail.extend(torch.zeros(1, 1, 4))
        if tail.buffers[0].data_ptr() != last:
            moved, last = moved + tail.end, tail.buffers[0].data_ptr()
    assert moved < 2 * 3000


@pytest.mark.parametrize("capacity", (200, 1), ids=("one slab", "slabs"))
@pytest.mark.parametrize("exclude", (0, 40))
def test_a_segment_selects_and_reads_as_the_operator(capacity, exclude, monkeypatch):
    """Selection bit for bit, whatever the slabs, and whether the pages are gathered at once or in parts."""
    S, H, D, E, K = 16, 2, 16, 8, 5
    memory = PagedMemory(MemorySpec(2, H, D, H, E, S), capacity=capacity, pages=capacity)
    lengths, content = (130 * S + 3, 64 * S), []  # the first segment crosses into the third slab
    for b, n in enumerate(lengths):
        k, v = (torch.randn(n // S, S, H, D) for _ in range(2))
        content.append((k, v, torch.randn(n // S, H, E).sign()))
        memory.append(b, *content[b])
    counts = [100, 31]
    starts = [n - m for n, m in zip(lengths, counts, strict=True)]
    q, q_slc = torch.randn(2, 100, 4, D), torch.randn(2, 100, H, E).sign()
    view = chunk_memory.SegmentMemory(memory, counts)
    scores, indices = view.retrieve(q_slc, torch.tensor(starts, dtype=torch.int32), K, exclude_window=exclude)
    every = view.scores(q_slc, torch.tensor(starts, dtype=torch.int32), exclude_window=exclude)
    torch.testing.assert_close(every.topk(K).values, scores.sort(descending=True).values)
    weights = torch.rand(scores.shape)
    out = view.attend(q, weights, indices)
    monkeypatch.setattr(chunk_memory, "GATHERED", 7 * S * H * D)
    torch.testing.assert_close(view.attend(q, weights, indices), out)
    for b, n in enumerate(counts):
        k, v, landmarks = content[b]
        want = retrieve_chunks(
            q_slc[b : b + 1, :n], landmarks[None], K, chunk_size=S, q_start=starts[b], exclude_window=exclude
        )
        assert torch.equal(indices[b, :n], want[1][0]) and torch.equal(scores[b, :n], want[0][0])
        call = q[b : b + 1, :n], k.flatten(0, 1)[None], v.flatten(0, 1)[None], weights[b : b + 1, :n], want[1]
        torch.testing.assert_close(out[b, :n], hsa_attention(*call, chunk_size=S)[0])
        assert (indices[b, n:] == -1).all() and (out[b, n:] == 0).all()


@pytest.mark.parametrize("capacity", (200, 1), ids=("one slab", "slabs"))
def test_a_segment_that_sees_few_chunks_has_empty_slots(capacity):
    S, K = 16, 7
    memory = PagedMemory(MemorySpec(1, 1, 16, 2, 8, S), capacity=capacity, pages=capacity)
    pages, landmarks, q_slc = torch.randn(5, S, 1, 16), torch.randn(5, 2, 8), torch.randn(5 * S, 2, 8)
    memory.append(0, pages, pages, landmarks)
    found = memory.retrieve(q_slc[None], 0, K)
    want = retrieve_chunks(q_slc[None], landmarks[None], K, chunk_size=S)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_errors_name_the_argument():
    model, _ = models({})
    cache, ids = model.new_cache(2), torch.zeros(2, 5, dtype=torch.int64)
    for call, message in (
        (lambda: model(ids[:1], cache=cache), r"input_ids must have the cache's batch size 2, got shape \[1, 5\]"),
        (lambda: model(ids, cache=cache, lengths=[5, 6]), r"lengths must be 2 ints from 0 to 5, got \[5, 6\]"),
        (lambda: model(ids, lengths=[5, 5]), "lengths must come with a cache"),
        (lambda: model.new_cache(0), "batch_size must be at least 1, got 0"),
        (lambda: model.new_cache(1, capacity=0), "capacity must be at least 1, got 0"),
        (lambda: model.new_cache(1, dtype=torch.bfloat16), r"dtype must be torch.float32, in which the model computes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="offload must go to a model with a chunk memory, got attention 'swa'"):
        Model(replace(SMALL, attention="swa")).new_cache(1, offload=True)
    assert cache.lengths == [0, 0]


@pytest.mark.parametrize(
    "name",
    tiered(
        [name for name in CONFIGS if name not in RECURRENT],
        quick=("hsa", "joint", "full", "nsa", "selected by mean", "window of one"),
    ),
)
def test_crop_and_save(name, tmp_path):
    """What was taken back leaves no trace, in a saved cache either; rows of a batch may lose as much as they like."""
    model, ids, want = whole(name)
    cache = model.new_cache(2, undo=60, **({"capacity": 16} if CONFIGS[name].get("attention", "hsa") == "hsa" else {}))
    wrong = (ids + 1) % 50
    with torch.no_grad():
        model(ids[:, :70], cache=cache, logits_to_keep=0)  # the upper decoder waits
        model(wrong[:, 70:101], cache=cache, logits_to_keep=0)
        cache.crop([64, 70])  # the rows differ
        model(ids[:, 64:70], cache=cache, lengths=[6, 0], logits_to_keep=0)
        model(ids[:, 70:90], cache=cache)
        model(wrong[:, 90:110], cache=cache, lengths=[20, 13], logits_to_keep=1)  # and differ where they are saved
        cache.save(tmp_path / "cache")
        for again in (cache, model.load_cache(tmp_path / "cache")):
            again.crop(88)
            assert again.lengths == [88, 88]
            assert_accurate(name, read(model, again, ids[:, 88:], (20, 1, 41)), want[:, 88:])


def test_crop_and_load_refuse(tmp_path):
    model, ids, _ = whole("hsa")
    cache = model.new_cache(2, undo=10)
    model(ids, cache=cache, logits_to_keep=0)
    cache.save(tmp_path / "cache")
    other = Model(replace(model.config, window=7))
    for call, message in (
        (lambda: cache.crop(139), r"lengths must take back at most the last \[10, 10\] tokens, of undo = 10 for a new"),
        (lambda: cache.crop([150, 151]), r"lengths must be ints from 0 to \[150, 150\], what the cache holds, got"),
        (lambda: Model(model.config).load_cache(tmp_path / "cache"), "got one of a model with other weights"),
        (lambda: other.load_cache(tmp_path / "cache"), "must hold a cache of this model, got one of window = 12"),
        (lambda: PagedMemory.load(tmp_path / "cache"), r"must be a chunk memory .*got hsa_tl.cache.1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    data = (tmp_path / "cache").read_bytes()
    (tmp_path / "cache").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        model.load_cache(tmp_path / "cache")


@pytest.mark.parametrize("name", ("full", "selected", "selected by landmark"))
def test_a_cache_goes_on_in_fewer_bits(name, tmp_path):
    model, ids, _ = whole(name)
    cache, half = model.new_cache(2), Model(model.config).eval().bfloat16()
    half.load_state_dict(model.state_dict())
    model(ids, cache=cache)
    cache.save(tmp_path / "cache")
    got, want = half(ids, cache=half.load_cache(tmp_path / "cache")).logits, model(ids, cache=cache).logits
    assert (got - want).abs().median() < 2**-6 * want.std()  # not of the largest: some choose another chunk


def test_a_cache_from_before_a_setting_has_its_default(tmp_path, monkeypatch):
    model, dims = whole("hsa")[0], caches._dims
    with monkeypatch.context() as older:
        older.setattr(caches, "_dims", lambda config: {k: v for k, v in dims(config).items() if k != "topp"})
        older.setattr(caches, "weights_of", lambda model: None)
        model.new_cache(2).save(tmp_path / "cache")
    assert model.load_cache(tmp_path / "cache").lengths == [0, 0]
    other = Model(replace(model.config, topp=0.5))
    with pytest.raises(ValueError, match=r"got one of topp = 1\.0"):
        other.load_cache(tmp_path / "cache")
