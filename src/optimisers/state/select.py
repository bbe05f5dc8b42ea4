"""Which leaves does a selector pick?"""

from typing import Any

from optimisers.errors import NoMatch
from optimisers.rule import Rule
from optimisers.settings import parts as parts_of_value
from optimisers.settings import takes
from optimisers.state.leaf import handle, parts
from optimisers.state.store import Store
from optimisers.tree.layout import Node
from optimisers.tree.path import KeyPath, matches, offered

Where = object
"""A selector: a glob over paths, a predicate (path, leaf), a rule type, or a list of these."""


def leaves_of(state: Any, where: Where = None) -> list[int]:
    """The leaves below a handle that a selector picks; raises NoMatch if there are none."""
    store, node, path = parts(state)
    found = [i for i in dict.fromkeys(node.leaves) if store.shapes[i] is not None]
    if where is None:
        return found
    choices = where if isinstance(where, list | tuple) else [where]
    if not choices:
        raise NoMatch("where=[] picks nothing; leave it out to pick everything")
    picked: set[int] = set()
    for choice in choices:
        some = [i for i in found if picks(choice, store, i, len(path))]
        if not some:
            there = [store.layout.paths[i] for i in found]
            raise NoMatch(f"where={choice!r} matches no parameter; {offered(choice, there)}")
        picked.update(some)
    return [i for i in found if i in picked]


def picks(choice: Any, store: Store, leaf: int, depth: int) -> bool:
    """Whether one selector picks a leaf. Globs are tried on every place of a tie, from the handle's own
    root.
    """
    if isinstance(choice, str | KeyPath):
        return any(
            matches(str(choice), p[depth:]) or matches(str(choice), p) for p in store.layout.places[leaf]
        )
    if isinstance(choice, type) and issubclass(choice, Rule):
        group, _ = store.where(leaf)
        return any(isinstance(part, choice) for part in parts_of_value(group.rule))
    if callable(choice) and not isinstance(choice, type) and takes(choice, 2):
        return bool(
            choice(
                store.layout.paths[leaf],
                handle(store, Node(leaf=leaf, leaves=(leaf,)), store.layout.paths[leaf]),
            )
        )
    raise NoMatch(
        f"where={choice!r} is no selector; it takes a glob such as '**.bias', a function of (path, leaf), or "
        "a rule type"
    )
