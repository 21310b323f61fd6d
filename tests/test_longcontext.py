"""Long contexts read by segments and by differences give what the whole model gives; answers are graded whole."""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import SPEC, D, E, G, H, K, S, chunks, each_kind, filled, int32
from tiers import tiered

from hsa_tl import fusion_weights
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.model import Model, PagedMemory, evaluate, needles, preset
from hsa_tl.model.data import ByteTokenizer, Sample
from hsa_tl.model.longcontext import ONE_SHOT, LongReader

CONFIGS = (
    {},
    {"layers": 5, "groups": 2, "kv_heads": 2, "window": 21, "value_residual": "resformer"},
    {"fusion": "joint", "exclude_window": True, "conv": 0},
    {"recency": 4, "topk": 3, "landmark_norm": False},
    {"fusion": "mass", "mass_power": 2.0, "encoder_overlap": 5, "topk": 3},
    {"attention": "swa", "layers": 4},
    {"attention": "nsa"},
    {"attention": "moba", "topk": 3},
    {"attention": "full"},
    {"linear": True, "layers": 3, "rope": ("linear",)},
    {"linear": True, "attention": "full"},
    {"attention": "selected", "layers": 3, "sinks": 20, "selection": "mean", "topk": 3},
)


def models(changes):
    model = Model(replace(preset("tiny"), **changes)).eval()
    exact = Model(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    return model, exact


def check(readers, exact, tokens, keep):
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        wanted = expect(lambda: exact(ids).logits[0, -keep:])
    for reader in readers:
        assert_accurate("logits", reader.read(tokens, keep), wanted)


@pytest.mark.parametrize("changes", tiered(CONFIGS, quick=(CONFIGS[1], CONFIGS[4], CONFIGS[9], CONFIGS[-1])), ids=str)
def test_reading_is_the_forward(changes, tmp_path):
    model, exact = models(changes)
    rng = np.random.default_rng(0)
    readers = [LongReader(model, segment=s) for s in (16, 64, 1024)] + [LongReader(model, segment=64, folder=tmp_path)]
    tokens = rng.integers(0, 320, 391).astype(np.uint16)
    for _ in range(3):
        check(readers, exact, tokens, 5)
        tokens = tokens.copy()
        tokens[rng.integers(0, 391, 3)] = rng.integers(0, 320, 3)
    check(readers[:1], exact, tokens[:100], 100)


CAUSE = models({})


def test_a_reader_that_retrieves_nothing_has_the_windows_alone():
    model, exact = models({})
    torch.nn.init.zeros_(exact.layers[1].hsa.out.weight)  # what HSA adds is then 0
    tokens = np.random.default_rng(0).integers(0, 319, 391).astype(np.uint16)
    reader = LongReader(model, retrieve=False)
    for _ in range(2):
        check([reader], exact, tokens, 40)
        tokens = tokens + 1
    other = Model(replace(model.config, attention="nsa"))
    with pytest.raises(ValueError, match='retrieve must be True unless attention is "hsa"'):
        LongReader(other, retrieve=False)


@settings(max_examples=8)  # each runs the model in float64 five times
@given(st.lists(st.integers(0, 299), max_size=6), st.integers(1, 40), st.integers(280, 300))
def test_any_change_is_read(changed, keep, length):
    """One reader for all examples: what it holds never shows."""
    model, exact = CAUSE
    reader = test_any_change_is_read.__dict__.setdefault("reader", LongReader(model, segment=48))
    tokens = np.random.default_rng(1).integers(0, 320, length).astype(np.uint16)
    tokens[[c for c in changed if c < length]] = 9
    check([reader], exact, tokens, keep)


def test_a_model_that_learned_reads_all_again():
    """In whatever type it computes, of whatever weights, the reader says what a new one says."""
    model, _ = models({})
    reader, tokens = LongReader(model), np.random.default_rng(0).integers(0, 320, 391).astype(np.uint16)
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            for _ in range(2):
                torch.testing.assert_close(reader.read(tokens, 5), LongReader(model).read(tokens, 5))
                with torch.no_grad():
                    model.layers[0].mlp.up.weight *= 1.5


def test_little_is_encoded_again():
    model = Model(preset("tiny")).eval()
    chunks = []
    model.encoder.register_forward_hook(lambda module, args, out: chunks.append(out.landmarks.shape[1]))
    reader = LongReader(model)
    samples = [needles.task("s-niah", 8192).sample(0, i, noise=0) for i in range(3)]
    for sample in samples:
        reader.read(sample.tokens, 2)
    assert chunks[0] == 512 and sum(chunks[1:]) <= 2 * 2 * 6


def test_exactly_the_chunks_that_a_change_reaches_are_encoded_again():
    model = Model(preset("tiny")).eval()
    chunks = []
    model.encoder.register_forward_hook(lambda module, args, out: chunks.append(out.landmarks.shape[1]))
    reader, tokens = LongReader(model), np.zeros(2048, np.uint16)
    reader.read(tokens, 2)
    for at in (0, 15, 16, 700, 1000):
        tokens[at] += 1
        chunks.clear()
        reader.read(tokens, 2)
        assert sum(chunks) == len({t // 16 for t in range(at, at + reader.lower_reach + 1)})


@each_kind
def test_other_chunks_take_the_place_of_stored_ones(options):
    """As if they had been appended; no cached page is stale, and no bound hides them."""
    memory, content = filled((5, 0, 70), **options)
    q, q_slc, lengths = torch.randn(3, 1, H * G, D), torch.randn(3, 1, H, E), int32([5 * S, 0, 70 * S])
    scores, indices = memory.retrieve(q_slc, lengths, K)
    memory.attend(q, fusion_weights(scores), indices)
    new = chunks(60)
    memory.mass[2] = 1
    memory.replace(2, *new, start=8)
    assert memory.mass[2, 7:69].tolist() == [1.0, *[0.0] * 60, 1.0]  # nobody has read the new ones
    fresh = PagedMemory(SPEC, **options)
    fresh.append(0, *content[0])
    fresh.append(2, *(torch.cat([x[:8], y, x[68:]]) for x, y in zip(content[2], new, strict=True)))
    results = []
    for m in (memory, fresh):
        scores, indices = m.retrieve(q_slc, lengths, K)
        results.append((scores, indices.float(), m.attend(q, fusion_weights(scores), indices)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    memory.fork(2, 1)
    for start in (8, 11, -1):
        with pytest.raises(
            ValueError, match=f"start must be of chunks that the sequence holds, and alone, got {start}"
        ):
            memory.replace(2, *new, start=start)


def test_what_cannot_be_read_is_named():
    reader = LongReader(Model(replace(preset("tiny"), attention="full")))
    with pytest.raises(
        NotImplementedError, match=f"full attention reads at most {ONE_SHOT} tokens here, got {ONE_SHOT + 1}"
    ):
        reader.read(np.zeros(ONE_SHOT + 1, np.uint16), 1)
    with pytest.raises(ValueError, match=r"keep must lie in \[1, 4\], got 5"):
        reader.read(np.zeros(4, np.uint16), 5)
    with pytest.raises(ValueError, match="segment must be a multiple of chunk_size = 16, got 24"):
        LongReader(reader.model, segment=24)
    with pytest.raises(ValueError, match="folder must be left out on a GPU, got x"):
        LongReader(reader.model.to("meta"), folder=Path("x"))


class Oracle:
    """Predicts the next token of a known text, but for the positions it is told to miss."""

    def __init__(self, miss=()):
        self.miss = miss

    def read(self, tokens, keep):
        nxt = np.append(tokens[1:], 0).astype(np.int64)
        nxt[[m - 1 for m in self.miss]] += 1
        return torch.nn.functional.one_hot(torch.from_numpy(nxt[-keep:]), 400).float()


def test_an_answer_is_right_when_all_its_tokens_are():
    sample = Sample(np.arange(50, dtype=np.uint16), np.array([[10, 13], [20, 21], [40, 45]]))
    assert evaluate.answers_right(Oracle(), sample).tolist() == [True, True, True]
    assert evaluate.answers_right(Oracle([12, 30]), sample).tolist() == [False, True, True]
    found = evaluate.accuracy(partial(evaluate.answers_right, Oracle([20, 44])), iter([sample, sample]))
    assert (found.right, found.answers, found.samples) == (2, 6, 2) and found.share == pytest.approx(1 / 3)
    right = partial(evaluate.answers_right, Oracle())
    assert evaluate.accuracy(right, (sample for _ in range(99)), budget_s=0).samples == evaluate.LEAST
    assert evaluate.accuracy(right, (sample for _ in range(99)), budget_s=60).samples == 99


@pytest.mark.parametrize("attention", ("hsa", "swa", "full", "linear"))
def test_generated_answers_follow_the_models_own(attention, tmp_path):
    """What a model says is right where it is what the model says, and wrong elsewhere, whatever it said before."""
    model = Model(replace(preset("tiny"), attention=attention)).eval()
    tokens = np.random.default_rng(0).integers(0, 320, 120).astype(np.uint16)
    answers = np.array([[50, 53], [90, 91], [110, 114]])
    for a, b in answers:
        for t in range(a, b):
            tokens[t] = int(model(torch.from_numpy(tokens[None, :t].astype(np.int64))).logits[0, -1].argmax())
    folder = tmp_path if attention == "hsa" else None
    assert evaluate.answers_generated(model, Sample(tokens, answers), folder).tolist() == [True] * 3
    tokens[51] += 1
    assert evaluate.answers_generated(model, Sample(tokens, answers), folder).tolist() == [False, True, True]


def test_an_answer_in_words_may_stand_in_a_sentence():
    """As a pretrained model gives it; without room for one, only the answer alone is right."""
    model, said, asked = Model(preset("tiny")), [b"It is 42, I know.", b"43. It was 42."], b"Who? 42 And who? 42"
    model.tokenizer, heard = ByteTokenizer(), []

    def generate(rows, number, *, cache, stop):
        words = said[len(heard) % 2][:number]
        end = words.find(stop.encode()) + len(stop) if stop and stop.encode() in words else number
        heard.append(bytes(rows[0].tolist()))
        return [torch.cat([rows[0], torch.tensor(list(words[:end]))])]

    model.generate = generate
    sample = Sample(np.frombuffer(asked, np.uint8).astype(np.uint16), np.array([[5, 7], [17, 19]]))
    assert evaluate.answers_generated(model, sample, more=14).tolist() == [True, True]
    assert evaluate.answers_generated(model, sample, more=8).tolist() == [True, False]
    assert evaluate.answers_generated(model, sample).tolist() == [False, False]
    assert heard == [b"Who? ", b" And who? "] * 3


def test_a_needle_in_the_last_unfinished_chunk_counts_apart():
    """Asked for at token 49, whose chunk began at 48: what ends there or later cannot be retrieved."""
    spans = np.array([[0, 3], [45, 48], [46, 49], [48, 51]])
    sample = Sample(np.arange(60, dtype=np.uint16), np.array([[50 + i, 51 + i] for i in range(4)]), spans)
    assert sample.unfinished(16).tolist() == [False, False, True, True]
    long = Sample(sample.tokens, np.array([[48, 65], [49, 65]]), np.array([[31, 33], [46, 48]]))  # asked at 47, 48
    assert long.unfinished(16).tolist() == [True, False]
    right = partial(evaluate.answers_right, Oracle([50, 53]))
    found = evaluate.accuracy(right, iter([sample] * 2), chunk_size=16)
    assert (found.right, found.answers, found.near_right, found.near) == (2, 4, 2, 4)
    assert evaluate.accuracy(right, iter([sample])).answers == 4
    with pytest.raises(ValueError, match="needles must be known"):
        evaluate.accuracy(right, iter([Sample(sample.tokens, sample.answers)]), chunk_size=16)


def test_samples_for_evaluation():
    tasks = {n: list(evaluate.needle_samples(n, 8192, 4, seed=3)) for n in needles.TASKS}
    for name, samples in tasks.items():
        same = [float((a.tokens == samples[0].tokens).mean()) for a in samples[1:]]
        assert all(0.9 < x < 1 for x in same), name
    at = [s.tokens[:-3].tolist().index(needles.MARK) for s in evaluate.needle_samples("s-niah", 1024, 3, depths=(0, 1))]
    assert at == [0, 1018, 0]
    for n, shared in ((4, 0), (2, 2)):  # two samples after each other, of as many haystacks
        rows = [s.tokens for s in evaluate.needle_samples("mk-niah-3", 8192, 4, haystacks=n)]
        assert sum((a == b).mean() > 0.9 for a, b in itertools.pairwise(rows)) == shared
    words = list(evaluate.ruler_samples("s-niah", 2000, 2, depths=(0.0, 1.0)))
    assert len({bytes(w.tokens) for w in words}) == 2


def test_depths_spread_evenly_however_many(monkeypatch):
    """Around the circle no gap is twice the average."""
    task = SimpleNamespace(sample=lambda seed, i, depth, noise: depth)
    monkeypatch.setattr(needles, "task", lambda name, length: task)
    for n in range(1, 60):
        depths = sorted(evaluate.needle_samples("s-niah", 1024, n))
        gaps = np.diff([*depths, depths[0] + 1])
        assert max(gaps) < 2 / n and depths[0] >= 0 and depths[-1] < 1


def test_bits_of_a_uniform_model():
    model = Model(preset("tiny")).eval()
    torch.nn.init.zeros_(model.output.weight)
    tokens = np.random.default_rng(0).integers(0, 320, 200).astype(np.uint16)
    assert evaluate.bits_per_token(LongReader(model), tokens, 50) == pytest.approx(np.log2(320))
