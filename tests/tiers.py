"""The two tiers. `make test` proves every public promise once, in minutes and cold; `make prove` proves all of it.

A test marked `prove` is one more case of a promise that a quick test proves, or costs more than it may there.
"""

from collections.abc import Collection, Iterable, Mapping

import pytest

prove = pytest.mark.prove


def tiered(values: Mapping | Iterable, quick: Collection, rows: bool = False) -> list:
    """Parameters of which those in `quick` are, and the others are to prove.

    quick names them by id where values is a mapping, else by value. rows: each value is a row of several arguments.
    """
    named = list(values.items() if isinstance(values, Mapping) else ((x, x) for x in values))
    names = [name for name, _ in named]
    if missing := [x for x in quick if x not in names]:
        raise ValueError(f"quick must name parameters, got {missing}")
    return [
        pytest.param(*(x if rows else (x,)), id=name if isinstance(values, Mapping) else None,
                     marks=() if name in quick else prove)
        for name, x in named
    ]  # fmt: skip
