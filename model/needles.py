"""Needles in a haystack of tokens, for models too small for words: the vocabulary is 320 ids.

    MARK key .. key value       a needle in the body; the rest of the body is noise, or other needles
    ASK key .. key value        a query at the end; its value is the answer

RULER's S-NIAH is one needle and one query, MQ-NIAH 6 needles and 2 queries, MK-NIAH at its third level a haystack made
of needles whose keys have several tokens. Harder: more needles than a token retrieves chunks, and noise of the ids that
keys, or keys and values, have. A needle may lie anywhere, across the border of two chunks too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsa_tl.model.config import require_ints
from hsa_tl.model.data import Sample, Tokenizer, distinct
from hsa_tl.validation import require

VOCAB = 320
MARK, ASK = 0, 1
NOISE, KEYS, VALUES = (2, 128), (128, 224), (224, 320)  # first id, and the one after the last
NOISE_IDS = {"noise": NOISE, "keys": KEYS, "all": (NOISE[0], VALUES[1])}
KEY_COUNT = KEYS[1] - KEYS[0]

WORDS = np.array(
    ["MARK", "ASK"] + [f"{x}{i}" for x, (a, b) in (("n", NOISE), ("k", KEYS), ("v", VALUES)) for i in range(b - a)]
)
IDS = {word: i for i, word in enumerate(WORDS.tolist())}


class NeedleTokenizer(Tokenizer):
    """The vocabulary as words between blanks: MARK, ASK, noise n0 to n125, keys k0 to k95, values v0 to v95."""

    name, vocab_size, end = "needles", VOCAB, None

    def encode_all(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """ValueError: a word that is none of the vocabulary."""
        split = [(t.decode() if isinstance(t, bytes) else t).split() for t in texts]
        if unknown := [w for words in split for w in words if w not in IDS]:
            raise ValueError(f"text must be words such as MARK, ASK, n0, k0 and v0, got {unknown[0]!r}")
        return [np.array([IDS[w] for w in words], np.uint16) for words in split]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return " ".join(WORDS[np.asarray(tokens, np.int64)])

    def fast(self):
        from tokenizers import Tokenizer, models, pre_tokenizers

        made = Tokenizer(models.WordLevel(IDS))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return made


@dataclass(frozen=True)
class NeedleTask:
    """One kind of sample of `length` tokens.

    needles: in the body; 0 fills it with as many as fit. queries: of distinct needles, at the end. key_tokens: tokens
    of a key, all keys of a sample are distinct. key_symbols: ids that a sample's keys are spelt with, drawn for each
    sample; few of them make keys that differ in one token only. noise_ids: what noise is drawn from, "noise" ids of its
    own, the "keys"' ids, or "all" but MARK and ASK, which a needle needs. apart: so many samples in a row have no key
    in common, and may be each other's distractors. ValueError: they do not fit.
    """

    length: int
    needles: int = 1
    queries: int = 1
    key_tokens: int = 1
    key_symbols: int = KEY_COUNT
    noise_ids: str = "noise"
    apart: int = 1

    def __post_init__(self):
        require_ints(self, length=1, needles=0, queries=1, key_tokens=1, key_symbols=1, apart=1)
        require(self.key_symbols <= KEY_COUNT, "key_symbols", f"be at most {KEY_COUNT}", self.key_symbols)
        most = f"give fewer than 2^63 keys of {self.key_symbols} symbols"
        require(self.key_symbols**self.key_tokens < 1 << 63, "key_tokens", most, self.key_tokens)
        apart = self.apart == 1 or self.key_symbols == KEY_COUNT
        require(apart, "apart", "be 1 where a sample's keys are spelt with few symbols", self.apart)
        require(self.noise_ids in NOISE_IDS, "noise_ids", f"be one of {', '.join(NOISE_IDS)}", repr(self.noise_ids))
        found = f"{self.count} needles in {self}"
        require(self.queries <= self.count <= self.most, "needles", f"lie between queries and {self.most}", found)

    @property
    def width(self) -> int:
        """Tokens of a needle, and of a query with its answer."""
        return self.key_tokens + 2

    @property
    def body(self) -> int:
        return self.length - self.queries * self.width

    @property
    def most(self) -> int:
        """Needles with distinct keys that fit."""
        return min(self.body // self.width, self.key_symbols**self.key_tokens // self.apart)

    @property
    def count(self) -> int:
        return self.needles or self.most

    def sample(self, seed: int, index: int, depth: float | None = None, noise: int | None = None) -> Sample:
        """The sample of (seed, index): tokens [length] uint16, answers and their needles [queries, 2].

        depth: where the first query's needle lies, 0 the start of the body and 1 its end; by default anywhere.
        noise: the index whose haystack is taken, by default this one's: samples of one noise differ in their needles
        and queries only, and in the queries only where the body is made of needles.
        """
        rng = np.random.default_rng([seed, index])
        hay = rng if noise is None else np.random.default_rng([seed, noise, 1])
        body = rng if self.needles else hay
        n, w = self.count, self.width
        starts = np.sort(body.integers(0, self.body - n * w + 1, n)) + w * np.arange(n)
        asked = rng.permutation(n)[: self.queries] if n < 4096 else distinct(rng, n, self.queries)
        if depth is not None:
            require(0 <= depth <= 1, "depth", "lie in [0, 1]", depth)
            place = round(depth * (n - 1))
            if place in asked[1:]:
                asked[np.flatnonzero(asked == place)] = asked[0]
            asked[0] = place
            if n == 1:
                starts[0] = round(depth * (self.body - w))
        base = self.key_symbols
        keys = distinct(body, base**self.key_tokens // self.apart, n) * self.apart + index % self.apart
        digits = keys[:, None] // base ** np.arange(self.key_tokens - 1, -1, -1) % base
        if base < KEY_COUNT:
            digits = body.permutation(KEY_COUNT)[digits]
        needles = np.empty((n, w), np.uint16)
        needles[:, 0] = MARK
        needles[:, 1:-1] = KEYS[0] + digits
        needles[:, -1] = body.integers(*VALUES, n)
        tokens = hay.integers(*NOISE_IDS[self.noise_ids], self.length, dtype=np.uint16)
        tokens[starts[:, None] + np.arange(w)] = needles
        queries = tokens[self.body :].reshape(self.queries, w)
        queries[:] = needles[asked]
        queries[:, 0] = ASK
        ends = self.body + w * np.arange(1, self.queries + 1)
        return Sample(tokens, np.stack([ends - 1, ends], 1), np.stack([starts, starts + w], 1)[asked])


def task(name: str, length: int) -> NeedleTask:
    """A task of TASKS at a length. ValueError: another name, or its needles do not fit."""
    require(name in TASKS, "task", f"be one of {', '.join(TASKS)}", repr(name))
    return NeedleTask(length, **TASKS[name])


def fits(name: str, length: int) -> bool:
    """Whether a task of TASKS has room for its needles at a length."""
    try:
        return bool(task(name, length))
    except ValueError:
        return False


TASKS = {
    "s-niah": {"needles": 1, "queries": 1},
    "mq-niah": {"needles": 6, "queries": 2},
    "mk-niah-3": {"needles": 0, "queries": 1, "key_tokens": 4},
    "mq-niah-96": {"needles": 96, "queries": 4},
    "s-niah-keys": {"needles": 1, "queries": 1, "noise_ids": "keys"},
    "s-niah-all": {"needles": 1, "queries": 1, "noise_ids": "all"},
}
