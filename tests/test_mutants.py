"""The mutation check itself: its changes are Python, each another program, and a seed decides which are drawn."""

import ast
from pathlib import Path

import mutants

SOURCE = '''
"""A docstring + 1."""
LIMIT = 40.0


def f(x: int | None, low=-1):
    """x < 3"""
    total = 0
    for i in range(1, x):
        total += i * 2 if i >= low and x not in (5,) else -i
    print(total)
    if not total:
        raise ValueError(f"{x + 1} must be more")
    return min(total, LIMIT)
'''


def test_every_kind_of_change_is_made():
    lines = {}
    for m in mutants.mutants_of("f.py", SOURCE):
        assert mutants.changes(m, SOURCE)
        lines.setdefault(m.line, set()).add(m.apply(SOURCE).splitlines()[m.line - 1].strip())
    assert lines[3] == {"LIMIT = 400.0"}
    assert lines[6] == {"def f(x: int | None, low=(1)):", "def f(x: int | None, low=-2):"}
    assert {"for i in range(2, x):"} == lines[9]
    words = ("total -= i", "pass", "i + 2", "(not (i >= low", "i > low", "low or x", "x in (5,)", "(6,)", "else (i)")
    assert all(any(word in line for line in lines[10]) for word in words), lines[10]
    assert lines[11] == {"pass"} and lines[12] == {"if (not (not total)):", "if (total):"}
    assert lines[14] == {"return max(total, LIMIT)"} and not lines.keys() & {2, 7, 13}


def test_a_change_of_a_header_is_met_by_the_header_alone():
    spans = {(m.line, m.span, m.inside) for m in mutants.mutants_of("f.py", SOURCE)}
    assert (9, (9, 9), True) in spans and (12, (12, 12), True) in spans and (3, (3, 3), False) in spans
    assert (6, (6, 6), False) in spans, "a default, which runs at import"


def test_a_seed_decides_and_a_longer_draw_goes_on():
    path = Path(mutants.__file__).name
    sources = {"f.py": SOURCE, path: Path(mutants.__file__).read_text()}
    ten, twenty = (mutants.draw(sources, n, seed=3) for n in (10, 20))
    assert twenty[:10] == ten and len(set(twenty)) == 20 and mutants.draw(sources, 10, seed=4) != ten
    for m in twenty:
        ast.parse(m.apply(sources[m.path]))


def test_a_list_names_its_changes_where_they_stand_now():
    path = Path(mutants.__file__).name
    source = Path(mutants.__file__).read_text()
    drawn = mutants.draw({path: source}, 60, seed=5)
    text = "\n".join(f"{mutants.entry(m, source)}: why" for m in drawn)
    assert list(mutants.listed(text, {path: source}).values()) == drawn
    elsewhere = f"# A line more.\n{source}"
    moved = mutants.listed(text, {"other.py": elsewhere, path: "x = 1\n"})
    assert [m.apply(elsewhere) for m in moved.values()] == [f"# A line more.\n{m.apply(source)}" for m in drawn]
    assert list(mutants.listed("- `a.py:3` `x + 1` -> `x - 1`: gone", {"a.py": "x = 2\n"}).values()) == [None]
