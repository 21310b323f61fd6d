"""Generation: greedy equals an argmax over the whole text each time; sampling, end tokens, prompts of any lengths."""

from dataclasses import replace

import pytest
import torch

from hsa_tl.model import Model, preset
from hsa_tl.model.generate import prefill, sample

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


@pytest.mark.parametrize("attention", ("hsa", "swa", "full", "nsa"))
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
    more = torch.stack(list(model.stream(first[:, -1:], 6, cache=cache)), 1)
    assert torch.cat([row, first[0], more[0]]).tolist() == greedy(model, row, 11).tolist()


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
        ((ids, 3), {"segment": 0}, "segment must be a positive int, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(*args, **options)
