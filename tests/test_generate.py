"""Generation: greedy equals an argmax over the whole text each time; sampling, end tokens, prompts of any lengths."""

from dataclasses import replace

import pytest
import torch

from hsa_tl.model import Model, preset
from hsa_tl.model.data import Tokenizer
from hsa_tl.model.generate import penalize, prefill, sample

SMALL = replace(
    preset("tiny"), dim=32, heads=4, kv_heads=2, head_dim=16, mlp_dim=48, retrieval_dim=16, vocab_size=50,
    encoder_mlp_dim=32, window=12, topk=3,
)  # fmt: skip
PROMPTS = (70, 3, 16, 33)


@pytest.fixture
def model():
    return Model(SMALL).eval()


def prompts(lengths=PROMPTS):
    return [torch.randint(50, (n,)) for n in lengths]


def greedy(model, prompt, n):
    """Without any cache."""
    for _ in range(n):
        with torch.no_grad():
            prompt = torch.cat([prompt, model(prompt[None]).logits[0, -1:].argmax(-1)])
    return prompt


@pytest.mark.parametrize("attention", ("hsa", "swa", "full", "nsa", "moba", "selected"))
@pytest.mark.parametrize("segment", (5, 4096))
def test_greedy_equals_the_forward(attention, segment):
    model, rows = Model(replace(SMALL, attention=attention)).eval(), prompts()
    want = [greedy(model, row, 20) for row in rows]
    got = model.generate(rows, 20, segment=segment)
    assert [x.tolist() for x in got] == [x.tolist() for x in want]
    alone = model.generate(rows[0][None], 20, segment=segment)
    assert alone.shape == (1, 90) and alone[0].tolist() == want[0].tolist()
    assert model.generate([rows[1].tolist()], 0)[0].tolist() == rows[1].tolist()


def test_a_stream_can_be_continued(model):
    (row,) = prompts((40,))
    cache = model.new_cache(1)
    first = torch.stack(list(model.stream(row[None], 5, cache=cache)), 1)
    assert cache.lengths == [44]
    more = torch.stack(list(model.stream([[]], 6, cache=cache)), 1)  # the last token is read first
    assert torch.cat([row, first[0], more[0]]).tolist() == greedy(model, row, 11).tolist()


def test_a_token_that_nobody_read_waits_until_it_is_read_or_taken_back(model):
    (row,), (more,) = prompts((40,)), prompts((5,))
    cache = model.new_cache(1)
    said = model.generate([row], 1, cache=cache)[0]
    with pytest.raises(ValueError, match="input_ids must have the cache's batch size 1"):
        model(torch.zeros(2, 3, dtype=torch.int64), cache=cache)
    model(torch.zeros(1, 0, dtype=torch.int64), cache=cache)
    logits, _ = prefill(model, [more], cache)
    assert cache.lengths == [46]
    torch.testing.assert_close(logits, model(torch.cat([said, more])[None]).logits[:, -1])
    cache = model.new_cache(1)
    model.generate([row], 1, cache=cache)
    cache.crop(40)  # without the answer, of which nothing was read
    logits, _ = prefill(model, [more], cache)
    assert cache.lengths == [45]
    torch.testing.assert_close(logits, model(torch.cat([row, more])[None]).logits[:, -1])


def test_the_stream_is_lazy(model):
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    stream = model.stream(prompts(), 1000)
    for n in range(1, 4):
        assert next(stream).shape == (4,) and len(steps) == n


def test_the_seed_decides(model):
    rows = prompts()
    draw = lambda seed: torch.cat(model.generate(rows, 12, temperature=1.5, top_p=0.95, seed=seed))  # noqa: E731
    state = torch.get_rng_state()
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    one = draw(None)
    torch.manual_seed(7)
    assert torch.equal(draw(None), one)


def test_sampling_follows_the_probabilities():
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    logits = p.log().expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(*args):
        return sample(logits, *args, generator).bincount(minlength=4) / len(logits)

    torch.testing.assert_close(frequencies(1.0, 1.0), p, atol=0.01, rtol=0)
    torch.testing.assert_close(frequencies(0.5, 1.0), p**2 / (p**2).sum(), atol=0.01, rtol=0)
    # 0.5 alone does not reach 0.6: the second comes in too, and no more.
    torch.testing.assert_close(frequencies(1.0, 0.6), torch.tensor([0, 0.625, 0, 0.375]), atol=0.01, rtol=0)
    assert frequencies(1.0, 1e-6)[1] == 1 and frequencies(0.0, 1.0)[1] == 1


def test_end_token(model):
    rows = prompts()
    free = [x[len(row) :].tolist() for x, row in zip(model.generate(rows, 30), rows, strict=True)]
    eos = free[0][4]
    want = [x[: x.index(eos) + 1] if eos in x else x for x in free]
    got = model.generate(rows, 30, eos_token=eos)
    assert [x[len(row) :].tolist() for x, row in zip(got, rows, strict=True)] == want
    square = model.generate(torch.stack([rows[0], rows[0].flip(0)]), 30, eos_token=eos)
    assert square[0, 70 + want[0].index(eos) :].eq(eos).all()
    alone = model.generate(rows[0][None], 30, eos_token=eos)
    assert alone.shape[1] == 70 + len(want[0])


def test_prefill_reports_progress(model):
    seen = []
    logits, cache = prefill(model, prompts(), segment=30, progress=seen.append)
    assert seen == [30, 60, 70] and logits.shape == (4, 50) and cache.lengths == list(PROMPTS)


def test_errors_name_the_argument(model):
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for args, options, message in (
        (([[1], []], 3), {}, "input_ids must hold prompts of at least one token"),
        (([], 3), {}, "input_ids must hold prompts"),
        ((ids, -1), {}, "max_new_tokens must be an int from 0 on, got -1"),
        ((ids, 3), {"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ((ids, 3), {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ((ids, 3), {"segment": 0}, "segment must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(*args, **options)


def test_a_second_turn_reads_what_the_first_one_said(model):
    """Prompts of different lengths, of which one ends early: its padding is never read."""
    rows, more = prompts((20, 7)), prompts((9, 30))
    eos = int(greedy(model, rows[0], 3)[-1])
    cache = model.new_cache(2)
    assert all(map(torch.equal, model.generate([row[:5] for row in rows], 0, cache=cache), (r[:5] for r in rows)))
    first = model.generate([row[5:] for row in rows], 6, eos_token=eos, cache=cache)
    first = [torch.cat([row[:5], x]) for row, x in zip(rows, first, strict=True)]
    second = model.generate(more, 4, cache=cache)
    for said, new, got in zip(first, more, second, strict=True):
        assert got.tolist() == greedy(model, torch.cat([said, new]), 4)[len(said) :].tolist()


class Letters(Tokenizer):
    """A tokenizer of one letter a token."""

    end = 49

    def decode(self, tokens):
        return "".join(chr(65 + i) for i in tokens)

    def special(self, text):
        return ord(text[1]) - 65 if text[0] == "<" else None


@pytest.mark.parametrize("attention", ("hsa", "swa", "selected"))
def test_a_turn_read_in_inference_mode_is_continued_outside(attention, tmp_path):
    """PyTorch lets nobody change a tensor of that mode in place outside of it: a cache holds none."""
    model, (first, second) = Model(replace(SMALL, attention=attention)).eval(), prompts((70, 3))
    want = greedy(model, torch.cat([first, second]), 20)
    with torch.inference_mode():
        cache = model.new_cache(1, capacity=16)
        model(first[None], cache=cache)
        cache.save(tmp_path / "turn")
        loaded = model.load_cache(tmp_path / "turn")
    for each in (cache, loaded):
        assert torch.equal(model.generate([second], 20, cache=each)[0], want[len(first) :])


def test_stop_strings(model):
    model.tokenizer = Letters()
    rows = prompts()
    free = [x[len(row) :] for x, row in zip(model.generate(rows, 9), rows, strict=True)]
    stop = Letters().decode(free[0][2:4].tolist())
    for stops in (stop, ["never there", stop]):
        got = model.generate(rows, 9, stop=stops)
        for row, want, x in zip(rows, free, got, strict=True):
            text, new = Letters().decode(want.tolist()), Letters().decode(x[len(row) :].tolist())
            assert new == (text[: text.index(stop) + len(stop)] if stop in text else text)
    assert model.generate(rows[:1], 9, stop=f"<{stop[0]}>")[0].tolist() == torch.cat([rows[0], free[0][:3]]).tolist()
    tensor = model.generate(rows[0][None], 9, stop=stop)[0]
    assert tensor.tolist() == got[0].tolist()  # the stream ends with its last prompt


def test_an_end_that_cannot_come_is_refused(model):
    for eos in (model.config.vocab_size, torch.tensor(2), [2], 2.5):
        with pytest.raises(ValueError, match="eos_token must be a token, 0 to"):
            model.generate([[1, 2, 3]], 2, eos_token=eos)


def test_top_k_and_repetition_penalty(model):
    logits = torch.tensor([[3.0, 2.0, 1.0, -1.0]]).expand(999, -1)
    assert set(sample(logits, 5.0, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, top_k=1).tolist()) == {0}
    seen = torch.tensor([[True, False, True, True]])
    assert penalize(logits[:1], seen, 2.0).tolist() == [[1.5, 2.0, 0.5, -2.0]]
    row = prompts((20,))[0]
    new = model.generate([row], 20, repetition_penalty=1e9)[0][20:]
    assert len({*new.tolist()}) == 20 and not {*new.tolist()} & {*row.tolist()}


def test_what_has_no_effect_is_said(model):
    with pytest.warns(UserWarning, match="top_k is ignored at temperature 0, got 5"):
        model.generate(prompts((3,)), 1, top_k=5)
    with pytest.warns(UserWarning, match="seed is ignored at temperature 0, got 7"):
        model.generate(prompts((3,)), 1, seed=7)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": -1}, "top_k must be an int from 0 on, 0 for any number, got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0, got 0.0"),
        ({"stop": ["a", ""]}, "stop must be strings of at least one character, got"),
        ({"stop": "a"}, "stop must go to a model with a tokenizer"),
        ({"input_ids": torch.zeros(5, dtype=torch.int64)}, r"input_ids must hold prompts .*\[B, T\] or a list of 1-D"),
        ({"input_ids": [[50]]}, r"input_ids must lie in \[0, 50\), got 50 at \[0\]"),
        ({"input_ids": [[1.5]]}, "input_ids must be integers, got torch.float32"),
        ({"input_ids": "text"}, "input_ids must be token ids, got a str"),
    ],
)
def test_options_out_of_range(options, message, model):
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(**{"input_ids": [[1, 2]], "max_new_tokens": 2} | options)
