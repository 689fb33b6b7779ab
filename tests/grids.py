"""What ``pytest`` leaves to ``pytest -m whole``.

A test marked ``@pytest.mark.whole`` runs in CI alone. Of one marked ``@pytest.mark.grid`` some
cases do: ``pytest`` runs as many as its parameter with the most values has, and takes the others'
values in turns, so that every value of each parameter is met, and of the others every combination.
``grid(one_in=4)`` takes a quarter of the longest one's values, for cases that take long.
"""

import math
from collections.abc import Iterable
from typing import Any

import pytest


def by_turns(sizes: list[int], one_in: int = 1) -> set[tuple[int, ...]]:
    """The cases of a grid that ``pytest`` runs, each as the indices of its values."""
    order = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    longest, *others = order
    cases = set()
    taken = range(0, sizes[longest], one_in)
    for turn in range(max(len(taken), math.prod(sizes[place] for place in others))):
        case, left = dict.fromkeys(order, taken[turn % len(taken)]), turn
        for place in others:
            left, case[place] = divmod(left, sizes[place])
        cases.add(tuple(case[place] for place in range(len(sizes))))
    return cases


def parameters(item: Any) -> list[tuple[str, ...]]:
    """The names of a case's parameters; those that are given together are one."""
    together = [mark.args[0] for mark in item.iter_markers("parametrize")]
    names = [n.replace(",", " ").split() if isinstance(n, str) else n for n in together]
    by_fixtures = set(item.callspec.params).difference(*names)
    return [*map(tuple, names), *((name,) for name in sorted(by_fixtures))]


def values(item: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    """What tells a value of a parameter from its others, which need not compare."""
    return tuple(id(item.callspec.params[name]) for name in names)


def mark_the_rest(items: Iterable[pytest.Item]) -> None:
    """Mark as ``whole`` what ``pytest`` leaves out of each grid that is collected as a whole."""
    grids: dict[Any, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("grid"):
            grids.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for cases in grids.values():
        columns, sizes = [], []
        for names in parameters(cases[0]):
            found = [values(item, names) for item in cases]
            places = {value: place for place, value in enumerate(dict.fromkeys(found))}
            columns.append([places[value] for value in found])
            sizes.append(len(places))
        if len(cases) != math.prod(sizes):  # somebody has named some of them
            continue
        chosen = by_turns(sizes, **cases[0].get_closest_marker("grid").kwargs)
        for item, case in zip(cases, zip(*columns, strict=True), strict=True):
            if case not in chosen:
                item.add_marker(pytest.mark.whole)
