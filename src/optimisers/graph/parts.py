"""In which order does the array library compute, and what only under a condition? In parts, one after the
other.

What an `every` computes is no part of what others are made of: it stands in a part of its own, between those
that give it values and those that read its results.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from optimisers.graph.expr import Expr, news_of, order


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Values of another shape that are computed together, arguments first."""

    nodes: tuple[Expr, ...]
    only: tuple[Expr, ...] = ()
    """The scalar conditions under which they are needed; none for always."""
    chooses: Expr | None = None
    """The `every` whose new results these are."""


Held: TypeAlias = list[tuple[tuple[Expr, ...], set[int]]]
"""Conditions, and the values by id that are known where they hold."""


def unconditional(roots: Iterable[Expr]) -> list[Expr]:
    """Every value of another shape below these that is needed always, arguments first, scalars not looked
    into; every choice below them is one.
    """
    found = list(roots)
    while True:
        nodes = order(found, given=True, always=True)
        seen = {id(e) for e in nodes}
        inner = [news_of(e) for e in nodes if e.op == "every"]
        more = [
            e
            for e in order([e for news in inner for e in news], seen, given=True)
            if e.op == "every" and id(e) not in seen
        ]
        if not more:
            break
        found += more
    place = {id(e): i for i, e in enumerate(order(found, given=True))}
    return sorted((e for e in nodes if e.domain == "free"), key=lambda e: place[id(e)])


def is_choice(e: Expr) -> bool:
    """Whether a node is a choice or one of its results, which nothing computes."""
    return e.op == "every" or (e.op == "item" and e.args[0].op == "every")


def under(only: Sequence[Expr], held: Held) -> set[int]:
    """What is known, by id, where these conditions hold."""
    return {i for conditions, ids in held if set(map(id, conditions)) <= set(map(id, only)) for i in ids}


def parts(roots: Sequence[Expr], known: set[int], held: Held) -> list[Part]:
    """The parts that compute the roots, but for what is `known` by id, or `held` where conditions hold, and
    lies below that alone.
    """
    always = [e for e in unconditional(roots) if id(e) not in known]
    seen = {id(e) for e in always} | known
    depth = depths(roots, known)
    found: list[Part] = []
    for k in range(max((depth[id(e)] for e in always), default=0) + 1):
        here = [e for e in always if depth[id(e)] == k]
        found += [choice(e, seen | under(e.args[:1], held)) for e in here if e.op == "every"]
        found.append(Part(tuple(e for e in here if not is_choice(e))))
    return found


def choice(e: Expr, seen: set[int]) -> Part:
    """What a choice computes where its condition holds, beside what has been `seen`."""
    return Part(tuple(below(news_of(e), seen)), (e.args[0],), e)


def below(roots: Sequence[Expr], seen: set[int]) -> list[Expr]:
    """The values of another shape that these are made of, beside what has been seen."""
    return [e for e in order(roots, seen, given=True) if e.domain == "free" and not is_choice(e)]


def depths(roots: Sequence[Expr], known: set[int]) -> dict[int, int]:
    """How many choices lie one below the other under each node, by id."""
    found = dict.fromkeys(known, 0)
    for e in order(roots, known, given=True):
        inside = () if e.domain == "scalar" else (a for a in e.args if a.domain != "scalar")
        found[id(e)] = max((found[id(a)] for a in inside), default=0) + (e.op == "every")
    return found
