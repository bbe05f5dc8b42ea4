"""Which leaves does a selector pick?"""

from collections.abc import Sequence
from typing import Any

from optimisers.errors import NoMatch
from optimisers.rule import Rule
from optimisers.settings import parts as parts_of_value
from optimisers.settings import takes
from optimisers.state.leaf import handle, parts
from optimisers.state.store import Store
from optimisers.tree.children import container_for, container_of
from optimisers.tree.layout import Node
from optimisers.tree.path import KeyPath, matches, offered
from optimisers.tree.selectors import Selector

Where = object
"""What to pick: a glob over paths, a selector, a predicate (path, leaf), a rule type, or a list of these."""


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
        if isinstance(choice, Selector):
            picked_here = choice.picks(store.layout.parameters, len(path))
            some = [i for i in found if picked_here[i]]
        else:
            some = [i for i in found if picks(choice, store, i, len(path))]
        if not some:
            raise NoMatch(f"where={choice!r} matches no parameter; {_there(choice, store, found)}")
        picked.update(some)
    return [i for i in found if i in picked]


def _there(choice: Any, store: Store, found: Sequence[int]) -> str:
    """What there is, where a choice picks nothing."""
    if isinstance(choice, Selector):
        return choice.hint([store.layout.parameters[i] for i in found])
    return offered(choice, [store.layout.paths[i] for i in found])


def _fits(glob: str, places: Sequence[KeyPath], depth: int) -> bool:
    """Whether a glob fits one of some paths, or what is left of it below the handle."""
    return any(matches(glob, p) or (depth > 0 and matches(glob, p[depth:])) for p in places)


def picks(choice: Any, store: Store, leaf: int, depth: int) -> bool:
    """Whether one selector picks a leaf. Globs are tried on every place of a tie, from the handle's own
    root.
    """
    if isinstance(choice, str | KeyPath):
        return _fits(str(choice), store.layout.places[leaf], depth)
    if isinstance(choice, type) and issubclass(choice, Rule):
        group, _ = store.where(leaf)
        return any(isinstance(part, choice) for part in parts_of_value(group.rule))
    part = callable(choice) and container_for(choice) is not None
    own = callable(choice) and not isinstance(choice, type) and not part
    if own and takes(choice, 2):
        return bool(
            choice(
                store.layout.paths[leaf],
                handle(store, Node(leaf=leaf, leaves=(leaf,)), store.layout.paths[leaf]),
            )
        )
    known = isinstance(choice, type) and container_of(choice) is not None
    hint = f"; write opt.by_type({choice.__name__})" if known else ""
    hint = "; for a part of the model write its part of the state, such as state[0]" if part else hint
    raise NoMatch(
        f"where={choice!r} is no selector; it takes a glob such as '**.bias', a selector such as "
        f"opt.vectors, a function of (path, leaf), or a rule type{hint}"
    )
