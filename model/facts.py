"""Facts that a question needs one to three of, for a haystack of text: who went where with what, and who is who.

    facts, question, answer = story(rng, needed=2)

The kinds are BabiLong's and RULER's question answering; people, words and sentences are ours.
"""

import numpy as np

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


def story(rng: np.random.Generator, needed: int) -> tuple[list[str], str, str]:
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


def biographies(rng: np.random.Generator) -> tuple[list[str], str, str]:
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
