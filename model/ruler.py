"""Retrieval tasks in words: RULER's needles by depth, many keys, values and queries, variable tracking, frequent and
common words and questions about people, and BabiLong's stories, of which one to three facts answer.

Every sample is a body of exact length, a question and its answers; any tokenizer. The words are ours; the haystack is
of filler sentences, of real text, or of needles.

    sample = ruler_sample("mq-niah", 4096, seed=0, index=3)
    ByteTokenizer().decode(sample.tokens)

Nothing loops over tokens, so that a sample of 16M tokens takes seconds.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from hsa_tl.model.data import ByteTokenizer, Sample, Tokenizer, distinct
from hsa_tl.validation import require

FILLER = (
    "The ferry left before noon and nobody waved. Rain had fallen on the low fields all week. "
    "A lamp was burning in the last house of the lane. Somewhere a door closed and the dog slept on. "
)
ADJECTIVES = (
    "amber ashen brisk broken calm cedar clever copper distant dusty early faded fallow frozen gentle golden "
    "hollow humble idle ivory jolly lively lunar mellow misty narrow nimble oaken pallid patient quiet rapid "
    "rustic sandy scarlet silent silver solemn stormy sturdy subtle sunny tidal tranquil velvet vivid wandering "
    "wooden"
)
NOUNS = (
    "anchor badger barrel beacon bramble bridge candle canyon castle cobbler comet compass coral cradle crow "
    "dagger ember falcon fiddle forge garden glacier goblet hammer harbour heron hinge island kettle ladder "
    "lantern meadow mirror orchard otter parrot pebble quarry raven ribbon saddle sparrow spindle thicket timber "
    "trumpet valley willow"
)
FIRST, SECOND = ADJECTIVES.split(), NOUNS.split()
LETTERS = np.frombuffer(b"BCDFGHJKLMNPQRSTVWXZ", np.uint8)
FREQUENT = 3  # words asked for
LEXICON = 200
ZIPF = 2.0
COMMON, TIMES = 10, 10  # words asked for, and how often they come where another one comes once
CHAINS, HOPS = 2, 4
PEOPLE = ("Agnes", "Bruno", "Clara", "Dimitri", "Elena", "Farid", "Greta", "Hugo")
PLACES = ("attic", "bakery", "cellar", "chapel", "garden", "kitchen", "library", "stable", "workshop", "yard")
THINGS = ("apple", "bucket", "candle", "drum", "flute", "hammer", "map", "rope")
TOWNS = (
    "Arvik", "Belmora", "Corvane", "Dunholt", "Eskari", "Felden",
    "Gorwick", "Halmar", "Istria", "Jarlow", "Kelsey", "Lomond",
)  # fmt: skip
TRADES = (
    "baker", "carpenter", "dentist", "farmer", "glazier", "joiner",
    "mason", "painter", "sailor", "tailor", "weaver", "writer",
)  # fmt: skip
EVENTS = 16
BIOGRAPHIES = 8


@dataclass(frozen=True)
class Niah:
    """Needles: how many (0: the body is made of them), how many are asked, whether keys are random strings, and how
    many needles a key has, which are all asked."""

    needles: int = 1
    queries: int = 1
    long_keys: bool = False
    values: int = 1


NIAH = {
    "s-niah": Niah(),
    "mk-niah-1": Niah(4),
    "mk-niah-2": Niah(0),
    "mk-niah-3": Niah(0, long_keys=True),
    "mq-niah": Niah(6, 2),
    "mv-niah": Niah(4, 4, values=4),
}
AT_DEPTH = tuple(name for name, kind in NIAH.items() if kind.values == 1)  # others are asked for all their needles
TRAINED = ("s-niah", "mk-niah-1", "mk-niah-2", "mk-niah-3", "mq-niah", "vt", "fwe")  # short enough for any length


def ruler_sample(
    name: str, length: int, seed: int, index: int, *, depth: float | None = None, tokenizer: Tokenizer | None = None,
    haystack: np.ndarray | None = None,
) -> Sample:  # fmt: skip
    """The sample of (seed, index): tokens [length] and its answers' spans [A, 2].

    name: one of TASKS. depth: of the first needle asked for, in [0, 1], by default anywhere; of AT_DEPTH only.
    haystack: tokens of real text, which repeat where they are too few; by default filler sentences. ValueError: an
    unknown name, or a length too short for the task.
    """
    require(name in TASKS, "task", f"be one of {', '.join(TASKS)}", repr(name))
    if depth is not None and (name not in AT_DEPTH or not 0 <= depth <= 1):
        raise ValueError(f"depth must lie in [0, 1] and the task be of {', '.join(AT_DEPTH)}, got {depth} for {name}")
    rng = np.random.default_rng([seed, index])
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    filler = tokenizer.encode_all([FILLER])[0] if haystack is None else haystack
    if name in NIAH:
        return _niah(NIAH[name], length, rng, depth, tokenizer, filler)
    if name in ("fwe", "cwe"):
        return _words(name == "cwe", length, rng, tokenizer)
    return _facts(FACTS[name], length, rng, tokenizer, filler)


def _niah(kind: Niah, length: int, rng, depth, tokenizer: Tokenizer, filler: np.ndarray) -> Sample:
    count = kind.needles
    if not count:  # as many as fit: sentences of one kind differ little in length
        sizes = [len(t) for t in tokenizer.encode_all(_sentences(*_pairs(rng, 64, kind.long_keys)))]
        count = max(1, int((length - 4 * max(sizes)) / np.mean(sizes)))
    keys, values = _pairs(rng, count, kind.long_keys)
    keys = [keys[i // kind.values * kind.values] for i in range(count)]
    asked = rng.permutation(count)[: kind.queries]
    if depth is not None:
        place = round(depth * (count - 1))
        asked[asked == place], asked[0] = asked[0], place
    if kind.values > 1:  # in the order of the text
        questions = [("", value) for value in values]
        questions[0] = (f"\nQuestion: what are all codes of {keys[0]}? Answer:", values[0])
    else:
        questions = [(f"\nQuestion: what is the code of {keys[i]}? Answer:", values[i]) for i in asked]
    tail, spans = _question(tokenizer, questions)
    needles = tokenizer.encode_all(_sentences(keys, values))
    if not kind.needles:  # what does not fit goes, from the end; never one that is asked for
        excess = sum(map(len, needles)) + len(tail) - length
        for i in reversed(range(count)):
            if excess > 0 and i not in asked:
                excess -= len(needles.pop(i))
    return _scatter(rng, length, filler, needles, "needles", tail, spans, depth if count == 1 else None)


def _pairs(rng, count: int, long_keys: bool) -> tuple[list[str], list[str]]:
    """Distinct keys and distinct values, of text."""
    if long_keys:
        keys, values = ([f"{x:016x}" for x in distinct(rng, 1 << 62, count).tolist()] for _ in range(2))
        return keys, values
    pairs = len(FIRST) * len(SECOND)
    codes = distinct(rng, pairs if 2 * count <= pairs else pairs * 10000, count)
    words = [f"{FIRST[i % pairs // len(SECOND)]}-{SECOND[i % len(SECOND)]}" for i in codes.tolist()]
    keys = [w if i < pairs else f"{w}-{i // pairs}" for w, i in zip(words, codes.tolist(), strict=True)]
    return keys, _numbers(rng, count)


def _numbers(rng, count: int, digits: int = 7) -> list[str]:
    """Distinct numbers of so many digits."""
    return [str(10 ** (digits - 1) + v) for v in distinct(rng, 9 * 10 ** (digits - 1), count).tolist()]


def _letters(rng, count: int, length: int) -> list[str]:
    """Distinct words of so many consonants."""
    codes = rng.permutation(len(LETTERS) ** length)[:count]
    digits = codes[:, None] // len(LETTERS) ** np.arange(length) % len(LETTERS)
    return [bytes(LETTERS[row]).decode() for row in digits]


def _sentences(keys: list[str], values: list[str]) -> list[str]:
    return [f"\nThe code of {k} is {v}.\n" for k, v in zip(keys, values, strict=True)]


def _question(tokenizer: Tokenizer, asked: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Questions with their answers as tokens, and the answers' spans in them, which begin with the space before: most
    tokenizers have it in a word's first token."""
    parts, spans, at = [], [], 0
    for question, answer in asked:
        q, a = tokenizer.encode_all([question, f" {answer}"])
        spans.append((at + len(q), at + len(q) + len(a)))
        parts += [q, a]
        at += len(q) + len(a)
    return np.concatenate(parts), np.array(spans)


def join(pieces: list[np.ndarray], order: np.ndarray) -> np.ndarray:
    """pieces[order[0]], pieces[order[1]], ... as one array, without a loop over order."""
    sizes = np.array([len(p) for p in pieces])
    first = np.cumsum(sizes) - sizes
    lengths = sizes[order]
    end = np.cumsum(lengths)
    return np.concatenate(pieces)[np.arange(end[-1]) + np.repeat(first[order] - end + lengths, lengths)]


def _scatter(
    rng, length: int, filler: np.ndarray, pieces: list[np.ndarray], what: str, tail, spans, depth: float | None = None
) -> Sample:  # fmt: skip
    """Filler with the pieces in their order, anywhere or the only one at its depth, then the tail."""
    sizes = [len(p) for p in pieces]
    body = length - len(tail)
    room = body - sum(sizes)
    require(room >= 0, "length", f"be at least {sum(sizes) + len(tail)} for the {what}", length)
    at = np.sort(rng.integers(0, room + 1, len(sizes)))
    if depth is not None:
        at[0] = round(depth * room)
    text = np.insert(np.resize(filler, room), np.repeat(at, sizes), np.concatenate(pieces))
    return Sample(np.concatenate([text, tail]), spans + body)


def _variables(rng) -> tuple[list[str], str, str]:
    """Chains of assignments; asked is who holds the first chain's value, in the order of the text."""
    names = _letters(rng, CHAINS * (HOPS + 1), 3)
    values = _numbers(rng, CHAINS, 5)
    chain_of = rng.permutation(np.repeat(np.arange(CHAINS), HOPS + 1))  # of each statement, in the order of the text
    held, statements = [[] for _ in range(CHAINS)], []
    for chain, name in zip(chain_of, names, strict=True):
        source = f"VAR {held[chain][-1]}" if held[chain] else values[chain]
        statements.append(f"VAR {name} = {source}")
        held[chain].append(name)
    return statements, f"which variables hold {values[0]}?", " ".join(held[0])


def _story(rng, needed: int) -> tuple[list[str], str, str]:
    """EVENTS sentences in order, a question and its answer, a place, that takes `needed` of them, 1 to 3."""
    while True:
        sentences, at, carried = [], {}, {}  # carried: of each thing who took it, and where it was since, in order
        for _ in range(EVENTS):
            person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
            if needed > 1 and person in at and thing not in carried and rng.random() < 0.4:
                carried[thing] = (person, [at[person]])
                sentences.append(f"{person} picked up the {thing}.")
                continue
            at[person] = rng.choice([x for x in PLACES if x != at.get(person)])
            sentences.append(f"{person} went to the {at[person]}.")
            for who, places in carried.values():
                if who == person:
                    places.append(at[person])
        if needed == 1:
            person = rng.choice(list(at))
            return sentences, f"Where is {person}?", at[person]
        moved = [(thing, places) for thing, (_, places) in carried.items() if len(places) >= needed]
        if not moved:
            continue
        thing, places = moved[rng.integers(len(moved))]
        if needed == 2:
            return sentences, f"Where is the {thing}?", places[-1]
        if places[-1] not in places[:-1]:  # else "before" would have two answers
            return sentences, f"Where was the {thing} before the {places[-1]}?", places[-2]


def _biographies(rng) -> tuple[list[str], str, str]:
    """Short texts about people, a question about one of them, and its answer, a town."""
    names = [f"{first} {last}" for first, last in zip(rng.permutation(PEOPLE), rng.permutation(TOWNS), strict=False)]
    born, lives = rng.permutation(TOWNS), rng.permutation(TOWNS)
    texts = [
        f"{name} was born in {born[i]}, became a {rng.choice(TRADES)} there and lives in {lives[i]} today."
        for i, name in enumerate(names[:BIOGRAPHIES])
    ]
    asked = int(rng.integers(BIOGRAPHIES))
    if rng.random() < 0.5:
        return texts, f"In which town was {names[asked]} born?", str(born[asked])
    return texts, f"In which town does {names[asked]} live today?", str(lives[asked])


# Of each task a function of rng: sentences in order, a question about them, and its answer.
FACTS = {"vt": _variables, "qa": _biographies, **{f"babi-{n}": partial(_story, needed=n) for n in (1, 2, 3)}}
TASKS = (*NIAH, "fwe", "cwe", *FACTS)


def _words(common: bool, length: int, rng, tokenizer: Tokenizer) -> Sample:
    """A body of made-up words, of which some are asked for: by Zipf frequencies the most frequent ones, in falling
    order; or COMMON ones that come TIMES times as often as each other one, in alphabetical order."""
    words = [w.lower() for w in _letters(rng, LEXICON, 4)]
    pieces = tokenizer.encode_all([w + " " for w in words])
    sizes = np.array([len(p) for p in pieces])
    if common:
        asked, answer = f"{COMMON} words are the most common, from a to z", sorted(words[:COMMON])
    else:
        asked, answer = f"{FREQUENT} words are the most frequent", words[:FREQUENT]
    tail, spans = _question(tokenizer, [(f"\nQuestion: which {asked}? Answer:", " ".join(answer))])
    body = length - len(tail)
    # Counts, not draws: the words asked for are then strictly the most frequent at every length.
    if common:
        share = np.array([TIMES] * COMMON + [1] * (LEXICON - COMMON))
        least = share @ sizes
        counts = share * (body // least)
    else:
        share = np.arange(1, LEXICON + 1) ** -ZIPF
        least = 64 * max(sizes)
        counts = (body // max(sizes) * share / share.sum()).astype(np.int64)
    require(body >= least, "length", f"be at least {least + len(tail)} for the words", length)
    text = join(pieces, rng.permutation(np.repeat(np.arange(LEXICON), counts)))
    rest = np.resize(tokenizer.encode_all([". "])[0], body - len(text))
    return Sample(np.concatenate([text, rest, tail]), spans + body)


def _facts(make, length: int, rng, tokenizer: Tokenizer, filler: np.ndarray) -> Sample:
    """Sentences in their order, anywhere in the filler, and a question about them."""
    sentences, question, answer = make(rng)
    pieces = tokenizer.encode_all([f"\n{x}\n" for x in sentences])
    tail, spans = _question(tokenizer, [(f"\nQuestion: {question} Answer:", answer)])
    return _scatter(rng, length, filler, pieces, "facts", tail, spans)
