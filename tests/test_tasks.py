"""The generators' ground truth, found again by parsers that share no line with them."""

import dataclasses
import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa_tl.model import needles, ruler
from hsa_tl.model.data import ByteTokenizer
from hsa_tl.model.needles import NeedleTask
from hsa_tl.model.ruler import ruler_sample


def text_and_answers(sample) -> tuple[str, list[str]]:
    """Each answer without the space that it begins with."""
    raw = bytes(sample.tokens.astype(np.uint8))
    assert all(raw[a : a + 1] == b" " for a, _ in sample.answers)
    return raw.decode(), [raw[a + 1 : b].decode() for a, b in sample.answers]


def solve_story(body: str, question: str) -> str:
    """By the whole history of everybody: where a person is, where a thing is or was before."""
    trail, holder = {}, {}
    for person, place, thing in re.findall(r"\n(\w+) (?:went to the (\w+)|picked up the (\w+))\.\n", body):
        if thing:
            assert thing not in holder, "a thing is picked up once"
            holder[thing] = person, len(trail[person]) - 1
        else:
            trail.setdefault(person, []).append(place)
    if match := re.fullmatch(r"Where is ([A-Z]\w+)\?", question):
        return trail[match[1]][-1]
    thing, _, later = re.fullmatch(r"Where (?:is|was) the (\w+)( before the (\w+))?\?", question).groups()
    places = trail[holder[thing][0]][holder[thing][1] :]
    return places[places.index(later) - 1] if later else places[-1]


def solve(text: str) -> list[str]:
    """Answers to every question of a text, from the text alone."""
    body = text.split("\nQuestion: ")[0]
    codes = re.findall(r"The code of (\S+) is (\w+)\.", body)
    assert "all codes" in text or len(dict(codes)) == len(codes), "a key stands for two values"
    found = []
    for question in re.findall(r"\nQuestion: (.*?) Answer: ", text):
        if match := re.fullmatch(r"what is the code of (\S+)\?", question):
            found.append(dict(codes)[match[1]])
        elif match := re.fullmatch(r"which variables hold (\d+)\?", question):
            value, order = {}, []
            for name, source in re.findall(r"VAR (\w+) = (VAR \w+|\d+)\n", body):
                value[name] = value[source[4:]] if source.startswith("VAR ") else source
                order.append(name)
            found.append(" ".join(n for n in order if value[n] == match[1]))
        elif match := re.fullmatch(r"what are all codes of (\S+)\?", question):
            found += [value for key, value in codes if key == match[1]]
        elif match := re.fullmatch(r"which (\d+) words are the most common, from a to z\?", question):
            counts = Counter(re.findall(r"[a-z]+", body))
            rare, often = sorted(set(counts.values()))
            assert often == 10 * rare
            found.append(" ".join(sorted(w for w, n in counts.items() if n == often)))
            assert len(found[-1].split()) == int(match[1])
        elif match := re.fullmatch(r"In which town was (.*) born\?", question):
            found += re.findall(rf"{match[1]} was born in (\w+),", body)
        elif match := re.fullmatch(r"In which town does (.*) live today\?", question):
            found += re.findall(rf"{match[1]} was born .* and lives in (\w+) today\.", body)
        elif question.startswith("Where "):
            found.append(solve_story(body, question))
        else:
            count = int(re.fullmatch(r"which (\d) words are the most frequent\?", question)[1])
            ranks = Counter(re.findall(r"[a-z]+", body)).most_common(count + 1)
            assert len({n for _, n in ranks}) == count + 1, "the most frequent words are tied"
            found.append(" ".join(w for w, _ in ranks[:count]))
    return found


@given(st.sampled_from(ruler.TASKS), st.integers(700, 5000), st.integers(0, 1 << 30), st.booleans())
def test_ruler_answers(name, length, index, real_text):
    length += 1000 * (name == "cwe")
    haystack = ByteTokenizer().encode_all(["def f(x):\n    return x\n" * 9])[0] if real_text and name != "fwe" else None
    sample = ruler_sample(name, length, 1, index, haystack=haystack)
    text, answers = text_and_answers(sample)
    assert len(sample.tokens) == length and answers and answers == solve(text)
    assert text.endswith(answers[-1])
    kind = ruler.NIAH.get(name)
    if kind:
        assert len(answers) == kind.queries
        assert (
            len(set(re.findall(r"The code of (\S+) is", text))) == max(1, kind.needles // kind.values)
            or not kind.needles
        )
        hay = sum(len(m) for m in re.findall(r"\nThe code of \S+ is \w+\.\n", text))
        assert text.count("The code of ") == kind.needles or (kind.needles == 0 and hay > 0.5 * length)


def test_what_the_tasks_hide():
    """RULER's: needles, questions, whether keys are random strings, values of a key; 0 needles fill the text."""
    assert {name: dataclasses.astuple(kind) for name, kind in ruler.NIAH.items()} == {
        "s-niah": (1, 1, False, 1), "mk-niah-1": (4, 1, False, 1), "mk-niah-2": (0, 1, False, 1),
        "mk-niah-3": (0, 1, True, 1), "mq-niah": (6, 2, False, 1), "mv-niah": (4, 4, False, 4),
    }  # fmt: skip


def test_numbers_are_any_of_their_digits():
    numbers = set(ruler._numbers(np.random.default_rng(0), 2000))
    assert len(numbers) == 2000 and {len(x) for x in numbers} == {7}
    assert {x[0] for x in numbers} == set("123456789")


@pytest.mark.parametrize("name", ("s-niah", "mk-niah-3"))
@pytest.mark.parametrize("depth", (0.0, 0.25, 0.5, 1.0))
def test_ruler_depth(name, depth):
    text, answers = text_and_answers(ruler_sample(name, 20000, 0, 1, depth=depth))
    assert solve(text) == answers and abs(text.index(answers[0]) / 20000 - depth) < 0.02


NOISES = {"noise": range(2, 128), "keys": range(128, 224), "all": range(2, 320)}  # no MARK, no ASK


@pytest.mark.parametrize("noise_ids", NOISES)
def test_noise_is_of_all_its_ids(noise_ids):
    tokens = NeedleTask(50000, noise_ids=noise_ids).sample(0, 0).tokens
    assert set(tokens[tokens > 1].tolist()) >= set(NOISES[noise_ids])


@given(
    st.integers(60, 3000), st.integers(0, 12), st.integers(1, 4), st.integers(1, 3), st.sampled_from((96, 8, 2)),
    st.integers(0, 1 << 30), st.none() | st.floats(0, 1), st.sampled_from(sorted(NOISES)),
)  # fmt: skip
def test_needle_answers(length, count, queries, key_tokens, symbols, index, depth, noise_ids):
    w = key_tokens + 2
    most = min((length - queries * w) // w, symbols**key_tokens)
    try:
        task = NeedleTask(length, count, queries, key_tokens, symbols, noise_ids)
    except ValueError:
        assert 0 < count < queries or most < max(count, queries)
        return
    sample = task.sample(7, index, depth)
    tokens = sample.tokens.tolist()
    body, stored, i = length - queries * w, {}, 0
    while i < body:  # one token after the other
        if tokens[i] == needles.MARK:
            key = tuple(tokens[i + 1 : i + 1 + key_tokens])
            assert i + w <= body and key not in stored and all(128 <= k < 224 for k in key)
            stored[key], i = (tokens[i + w - 1], i), i + w
        else:
            assert tokens[i] in NOISES[noise_ids]
            i += 1
    assert len(stored) == (count or most) and len({x for key in stored for x in key}) <= symbols
    asked = []
    for j in range(queries):
        ask, *key, value = tokens[body + j * w : body + (j + 1) * w]
        assert ask == needles.ASK and stored[tuple(key)][0] == value and 224 <= value < 320
        assert sample.answers[j].tolist() == [body + (j + 1) * w - 1, body + (j + 1) * w]
        at = stored[tuple(key)][1]
        assert sample.needles[j].tolist() == [at, at + w]
        asked.append(tuple(key))
    assert len(set(asked)) == queries and sample.targets().tolist() == [a for a, _ in sample.answers]
    if depth is not None:
        places = sorted(at for _, at in stored.values())
        at = stored[asked[0]][1]
        assert at == (round(depth * (body - w)) if len(places) == 1 else places[round(depth * (len(places) - 1))])


def test_tasks_by_name():
    assert needles.task("mq-niah", 256) == NeedleTask(256, needles=6, queries=2)
    assert needles.task("mk-niah-3", 1 << 16).count > 10000
    for make in (lambda: needles.task("x", 64), lambda: ruler_sample("x", 64, 0, 0)):
        with pytest.raises(ValueError, match="task must be one of"):
            make()
    for name, what in (("mq-niah", "needles"), ("fwe", "words")):
        with pytest.raises(ValueError, match=rf"length must be at least \d+ for the {what}, got 200") as told:
            ruler_sample(name, 200, 0, 0)
        least = int(str(told.value).split()[5])
        assert len(ruler_sample(name, least, 0, 0).tokens) == least
    for name in ("vt", "mv-niah"):
        with pytest.raises(ValueError, match=f"depth must lie in .* mk-niah-3, mq-niah, got 0.5 for {name}"):
            ruler_sample(name, 2000, 0, 0, depth=0.5)
    with pytest.raises(ValueError, match="needles must lie between queries and 14, got 15"):
        NeedleTask(48, needles=15, queries=2)
    with pytest.raises(ValueError, match="noise_ids must be one of noise, keys, all, got 'x'"):
        NeedleTask(48, noise_ids="x")
    assert needles.task("mq-niah-96", 300).count == 96 and not needles.fits("mq-niah-96", 299)
    with pytest.raises(ValueError, match="key_symbols must be at most 96, got 97"):
        NeedleTask(48, key_symbols=97)
    with pytest.raises(ValueError, match=r"key_tokens must give fewer than 2\^63 keys of 96 symbols, got 10"):
        NeedleTask(48, key_tokens=10)
    assert len(NeedleTask(48, key_tokens=9).sample(0, 0).tokens) == 48
    with pytest.raises(ValueError, match="apart must be 1 where a sample's keys are spelt with few symbols, got 2"):
        NeedleTask(48, key_symbols=95, apart=2)
    with pytest.raises(ValueError, match="needles must lie between queries and 6, got 7"):
        NeedleTask(256, needles=7, apart=16)


@pytest.mark.parametrize("key_tokens, apart", [(1, 16), (1, 7), (2, 48)])
def test_samples_apart_have_no_key_in_common(key_tokens, apart):
    task = NeedleTask(100, needles=6, queries=2, key_tokens=key_tokens, apart=apart)
    samples = [task.sample(0, i).tokens for i in range(3, 3 + 2 * apart)]
    keys = [{tuple(x[i + 1 : i + 1 + key_tokens]) for i in np.flatnonzero(x == needles.MARK)} for x in samples]
    assert all(len(x) == 6 for x in keys)
    for first in range(apart + 1):
        assert len(set().union(*keys[first : first + apart])) == 6 * apart
    assert key_tokens > 1 or keys[0] & keys[apart], "the next one may have the same"


def test_words_of_needles():
    """Every id is one word, and the docstring's first and last words are there."""
    tokenizer, text = needles.NeedleTokenizer(), "MARK ASK n0 n125 k0 k95 v0 v95"
    assert list(tokenizer.encode(text)) == [0, 1, 2, 127, 128, 223, 224, 319]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(set(needles.WORDS)) == tokenizer.vocab_size == 320
    with pytest.raises(ValueError, match="got 'k96'"):
        tokenizer.encode("MARK k96")


@pytest.mark.parametrize("name", ruler.TASKS)
def test_long_samples_loop_over_no_token(name):
    """2M tokens in less time than a Python loop over them would take; of another tokenizer than bytes too."""
    start = time.process_time()
    sample = ruler_sample(name, 1 << 21, 0, 0)
    assert time.process_time() - start < 1.0 and len(sample.tokens) == 1 << 21
    text, answers = text_and_answers(sample)
    assert solve(text) == answers


def test_needles_by_the_million():
    start = time.process_time()
    sample = needles.task("mk-niah-3", 1 << 21).sample(0, 0)
    assert time.process_time() - start < 2.0
    assert (sample.tokens == needles.MARK).sum() == (len(sample.tokens) - 6) // 6
