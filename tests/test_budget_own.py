"""Layers that keep keys of their own ("selected") have budgets of their own, and keep the chunks they read most."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from hsa_tl import chunk_means
from hsa_tl.model import Model, preset
from hsa_tl.model.attention import rotate
from hsa_tl.model.own_keys import Keys, OwnKeys
from hsa_tl.model.selected import Landmarks, Rule, chooser_of

S, W, SINKS = 16, 20, 4
FORMS = {
    "mass": {}, "mean": {"selection": "mean"}, "every chunk": {"topk": "all"},
    "landmark": {"selection": "landmark", "anchors": 4, "exact_heads": (0, 3)},
}  # fmt: skip


def tiny(**changes) -> Model:
    """Three layers of two key/value heads."""
    own = {"attention": "selected", "rope": ("selected",), "layers": 3, "kv_heads": 2, "window": W, "sinks": SINKS}
    return Model(replace(preset("tiny"), **own | {"topk": 2} | changes)).eval()


def keys_of(budget, rows=1, chooser=None, undo=0) -> OwnKeys:
    return OwnKeys([S] * rows, Rule(W, SINKS, S, theta=100.0), chooser, budget, undo)


def store(cache, n=S):
    """The next tokens of every row."""
    cache.counts[:] = [n] * len(cache.counts)
    new = [torch.randn(len(cache.counts), n, 2, 8) for _ in range(2)]
    cache.extend(*new)
    return new


def reads(cache, chunk, scores=0.0):
    """A token of row 0 reads a chunk of those that are held, at both heads."""
    cache.counts[0] = 1
    index = torch.full((1, 1, 2, 1), chunk, dtype=torch.int32)
    cache.count(slice(0, 1), 1, torch.full(index.shape, scores), index)


@pytest.mark.parametrize("times, gone", ((5, [1, 3]), (3, [0, 1])))
def test_the_least_read_for_its_age_goes_and_a_pinned_chunk_stays(times, gone):
    """Of 5 chunks behind the window, 0 is worth times / 4, 3 is worth 1 / 1, and the last one stays as it is new."""
    cache = keys_of(3)
    store(cache, SINKS + 5 * S + W)
    assert cache.evicted == [[]]  # what one call brings stays until the next
    cache.pin(0, [2])
    for chunk in [0] * times + [3]:
        reads(cache, chunk)
    store(cache)
    assert cache.evicted == [gone] and cache.held == [SINKS + 3 * S + W + S]
    for _ in range(40):
        store(cache)
    assert 2 not in cache.evicted[0] and len(cache.evicted[0]) == 5 + 40 - 3
    assert cache.buffers[0].shape[1] < 3 * (SINKS + 3 * S + W + S)  # keys and values go, not only their names
    for chunk, why in ((1, "which it "), (46, "does not hold behind its window")):
        with pytest.raises(ValueError, match=f"such as sequence 0 holds, got {chunk}, .*{why}"):
            cache.pin(0, [chunk])


def test_scores_of_nan_keep_no_chunk():
    cache = keys_of(2)
    store(cache, SINKS + 5 * S + W)
    for chunk in range(4):
        reads(cache, chunk, torch.nan if chunk < 3 else 0.0)
    store(cache)
    assert cache.evicted == [[0, 1, 2]]


def test_what_is_taken_back_keeps_no_mass():
    cache = keys_of(3, undo=2 * W)
    store(cache, SINKS + 5 * S + W)
    for chunk in (3, 4):
        reads(cache, chunk)
    cache.crop([W + 1])  # the last token of chunk 4 goes
    assert cache.mass[0, :6].tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("sinks, budget", ((0, None), (S, 3), (SINKS, None)))
def test_a_cache_that_is_empty_again_can_be_saved(sinks, budget, tmp_path):
    model, ids = tiny(sinks=sinks), torch.randint(0, 320, (2, 40))
    cache = model.new_cache(2, budget=budget)
    model(ids, cache=cache), cache.crop(0), cache.save(tmp_path / "c")
    with torch.no_grad():
        torch.testing.assert_close(model(ids, cache=model.load_cache(tmp_path / "c")).logits, model(ids).logits)


@pytest.mark.parametrize("span", (0, 100))
@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_goes_on_as_one_that_never_had_what_went(form, span):
    """Its keys, landmarks and attention are those of sinks, kept chunks and window, where they stood."""
    chooser = chooser_of(FORMS[form].get("selection", "mass"), Landmarks(2, 8, 4, (1,)))
    rule = Rule(W, SINKS, S, FORMS[form].get("topk", 2), 100.0, span)
    cache, told = keys_of(3, chooser=chooser), []
    for n in (SINKS + 7 * S + W + 3, *[1, 5, 16, 40] * 6):
        told.append(store(cache, n))
        k, v = (torch.cat(x, 1) for x in zip(*told, strict=True))
        kept = torch.ones(k.shape[1], dtype=torch.bool)
        for chunk in cache.evicted[0]:
            kept[SINKS + chunk * S : SINKS + chunk * S + S] = False
        q, gone = torch.randn(1, min(n, 9), 4, 8), cache.gone(0)
        for a, b, pace in rule.paces(k.shape[1] - q.shape[1], q.shape[1]):
            seen = kept.clone()
            seen[k.shape[1] - q.shape[1] + b :] = False
            mine = cache.keys(slice(None), int(seen.sum()), pace)
            at_pace = rotate(k, pace * torch.arange(k.shape[1]).double(), 100.0)[:, seen]
            torch.testing.assert_close(mine.k, at_pace, rtol=0, atol=1e-5 if span else 0)
            assert torch.equal(mine.v, v[:, seen])
            out = rule.attend(q[:, a:b], mine, chooser, partial(cache.count, slice(None), n - q.shape[1] + b))
            landmarks = None if chooser is None else chooser.of(k[:, seen][:, SINKS:], S)
            want = rule.attend(q[:, a:b], Keys(at_pace, v[:, seen], landmarks, pace=pace, gone=gone), chooser)
            for x, y in zip(out, want, strict=True):
                torch.testing.assert_close(x, y)
    assert len(cache.evicted[0]) > 10 and cache.mass.sum() > 10


@pytest.mark.parametrize("form", FORMS)
def test_each_layer_has_its_budget(form, tmp_path):
    """With room for all the model is as it was; without, crops and files go on with what each layer keeps."""
    model, ids = tiny(**FORMS[form]), torch.randint(0, 320, (2, 300))
    free, roomy, tight = (model.new_cache(2, undo=30, budget=x) for x in (None, 40, (1, 3, 6)))
    read = lambda cache, x: torch.cat([model(y, cache=cache).logits for y in x.split(7, 1)], 1)  # noqa: E731
    torch.testing.assert_close(read(roomy, ids), read(free, ids))
    with torch.no_grad():
        logits = read(tight, ids)
    assert torch.isfinite(logits).all() and not torch.allclose(logits, read(model.new_cache(2, budget=1), ids))
    behind = (300 - 6 - SINKS - W - 30) // S  # before the last segment
    assert [[len(x) for x in layer.evicted] for layer in tight.layers] == [[behind - n] * 2 for n in (1, 3, 6)]
    tight.save(tmp_path / "c")
    loaded = model.load_cache(tmp_path / "c")
    for cache in (tight, loaded):
        cache.crop(275)
    assert [x.evicted for x in loaded.layers] == [x.evicted for x in tight.layers]
    more = torch.randint(0, 320, (2, 60))
    with torch.no_grad():
        torch.testing.assert_close(read(loaded, more), read(tight, more))
    assert [x.evicted for x in loaded.layers] == [x.evicted for x in tight.layers]


@pytest.mark.parametrize("far_positions", (0, 50))
def test_a_layer_that_chooses_no_chunks_holds_no_more_than_it_sees(far_positions, tmp_path):
    """It says what it says of all keys; so does one whose file an older version wrote, with all of them."""
    model, ids = tiny(hsa_layers=1, far_positions=far_positions), torch.randint(0, 320, (2, 300))
    read = lambda cache, x: torch.cat([model(y, cache=cache).logits for y in x.split(7, 1)], 1)  # noqa: E731
    with torch.no_grad():
        whole, cache, older = model(ids).logits, model.new_cache(2, undo=30), model.new_cache(2, undo=30)
        for layer in older.layers:
            layer.budget = None
        torch.testing.assert_close(read(cache, ids[:, :280]), whole[:, :280])
        read(older, ids[:, :280]), older.save(tmp_path / "older"), cache.save(tmp_path / "cache")
        assert [max(x.held) < SINKS + W + 30 + 2 * S + 7 for x in cache.layers] == [True, True, False]
        assert [max(x.held) for x in older.layers] == [280] * 3
        for other in (cache, model.load_cache(tmp_path / "cache"), model.load_cache(tmp_path / "older")):
            other.crop(260)
            torch.testing.assert_close(read(other, ids[:, 260:]), whole[:, 260:])
            assert max(other.layers[0].held) < SINKS + W + 30 + 2 * S + 7


def test_rows_of_different_lengths_keep_what_each_keeps_alone():
    model, ids = tiny(), torch.randint(0, 320, (2, 400))
    together, alone = (
        model.new_cache(2, undo=0, budget=(2, 3, 4)),
        [model.new_cache(1, undo=0, budget=(2, 3, 4)) for _ in "ab"],
    )
    at = [0, 0]
    for counts in ((150, 90), (5, 1), (3, 0), (0, 30), (32, 40), (2, 8), (33, 17), (90, 100), (1, 1)):
        rows = [ids[b, a : a + n] for b, (a, n) in enumerate(zip(at, counts, strict=True))]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logits = model(padded, cache=together, lengths=list(counts)).logits
        for b, row in enumerate(rows):
            if len(row):
                torch.testing.assert_close(logits[b, : len(row)], model(row[None], cache=alone[b]).logits[0])
        at = [a + n for a, n in zip(at, counts, strict=True)]
    for i, layer in enumerate(together.layers):
        assert layer.evicted == [cache.layers[i].evicted[0] for cache in alone] and min(map(len, layer.evicted)) > 3


def test_a_token_costs_the_same_at_any_length(monkeypatch):
    """It looks at all chunks when one has come too many, and sums up those alone that end with its row's tokens."""
    chooser, looks, columns = Landmarks(2, 8, 4), [], []
    numbers, of = OwnKeys._numbers, chooser.of
    monkeypatch.setattr(OwnKeys, "_numbers", lambda self, b: looks.append(b) or numbers(self, b))
    monkeypatch.setattr(chooser, "of", lambda k, n: columns.append(k.shape[0] * k.shape[1]) or of(k, n))
    cache = keys_of(40, rows=2, chooser=chooser)
    new = torch.randn(2, 50 * S, 2, 8)
    cache.counts[:] = [50 * S, 3]
    cache.extend(new, new)
    looks.clear(), columns.clear()
    for _ in range(2 * S):
        store(cache, 1)
    assert len(looks) <= 3 and columns == [S] * 4  # two chunks of each of two rows


@pytest.mark.parametrize("anchors", (0, 5))
def test_scores_that_count_are_the_means_of_query_heads(anchors):
    """Of what a chunk's mean key and the anchors say of its mass."""
    T, A, H, D = 60, 6, 2, 8
    q, k, found = torch.randn(1, T, A, D), torch.randn(1, T, H, D), []
    chooser = Landmarks(H, D, anchors)
    Rule(8, 0, S, 2).attend(q, Keys(k, k), chooser, lambda *x: found.extend(x))
    scores, indices = (x[:, -1:] for x in found)
    products = torch.einsum("bthd,bnhd->bthn", chooser.ask(q[:, -1:], H), chooser.of(k, S)) * (H / A)
    torch.testing.assert_close(scores, products.gather(-1, indices.long()))
    mean = torch.einsum("bthgd,bnhd->bthn", q[:, -1:].unflatten(2, (H, -1)), chunk_means(k, S)) / (D**0.5 * A / H)
    assert anchors or torch.allclose(products, mean, atol=1e-5)


def test_bad_budgets():
    for budget in (0, (1, 2), (1, 2, 0), 1.5):
        with pytest.raises(ValueError, match="budget must be a positive int, or one of each of 3 layers, got"):
            tiny().new_cache(1, budget=budget)
    with pytest.raises(ValueError, match=r"budget must be a positive int, got \(1, 2\)"):
        Model(preset("tiny")).new_cache(1, budget=(1, 2))
