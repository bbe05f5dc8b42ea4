"""Which parameters of a model are meant? Values that pick some by shape, type or path, and compose."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, final

from optimisers.errors import NoMatch
from optimisers.tree.layout import Parameter
from optimisers.tree.path import KeyPath, listed, matches, offered
from optimisers.tree.roles import is_embedding, is_flat, is_head, is_matrix, last_of_sequence


@dataclasses.dataclass(frozen=True, repr=False)
class Selector(abc.ABC):
    """Picks parameters of a model: a key in a dict of rules, or the `where` of `freeze`, `adjust` and others.

    `a & b` picks what both pick, `a | b` what one of them picks, `~a` all others; a glob over paths may stand
    in place of one of the two. Selectors are values: equal ones are equal, and they can be pickled.
    """

    @abc.abstractmethod
    def picks(self, parameters: Sequence[Parameter], depth: int) -> list[bool]:
        """Whether it picks each of the parameters of a model. `depth` keys of their paths stand above the
        part of the model that is asked about.
        """

    def hint(self, parameters: Sequence[Parameter]) -> str:
        """What there is instead, where it picks none of these."""
        return f"there are {listed([p.places[0].path for p in parameters])}"

    def __and__(self, other: "Selector | str") -> "Selector":
        return Both(self, selector(other))

    def __rand__(self, other: str) -> "Selector":
        return Both(selector(other), self)

    def __or__(self, other: "Selector | str") -> "Selector":
        return Either(self, selector(other))

    def __ror__(self, other: str) -> "Selector":
        return Either(selector(other), self)

    def __invert__(self) -> "Selector":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} is no condition; write & for `and`, | for `or`, ~ for `not`")

    def __repr__(self) -> str:
        return type(self).__name__.lower()


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Matrices(Selector):
    """Arrays of two axes or more."""

    def picks(self, parameters: Sequence[Parameter], depth: int) -> list[bool]:
        return [is_matrix(p) for p in parameters]

    def hint(self, parameters: Sequence[Parameter]) -> str:
        return f"{Selector.hint(self, parameters)}, all of one axis or none"


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Vectors(Selector):
    """Arrays of one axis, and numbers."""

    def picks(self, parameters: Sequence[Parameter], depth: int) -> list[bool]:
        return [not is_matrix(p) for p in parameters]

    def hint(self, parameters: Sequence[Parameter]) -> str:
        return f"{Selector.hint(self, parameters)}, all of two axes or more"


@final
@dataclasses.dataclass(frozen=True, repr=False)
class HiddenMatrices(Selector):
    """Matrices that are no embedding, no head and no vector."""

    def picks(self, parameters: Sequence[Parameter], depth: int) -> list[bool]:
        return [is_matrix(p) and not role for p, role in zip(parameters, roles(parameters), strict=True)]

    def hint(self, parameters: Sequence[Parameter]) -> str:
        of = zip(parameters, roles(parameters), strict=True)
        said = [f"{p.places[0].path} is {role}" for p, role in of if is_matrix(p)]
        return f"of the matrices, {listed(said)}" if said else Matrices().hint(parameters)

    def __repr__(self) -> str:
        return "hidden_matrices"


@final
@dataclasses.dataclass(frozen=True, repr=False)
class ByType(Selector):
    """What stands in modules of some types."""

    types: tuple[type, ...]

    def picks(self, parameters: Sequence[Parameter], depth: int) -> list[bool]:
        return [
            any(issubclass(kind, self.types) for place in p.places for kind in place.kinds)
            for p in parameters
        ]

    def hint(self, parameters: Sequence[Parameter]) -> str:
        kinds = {kind.__name__: None for p in parameters for place in p.places for kind in place.kinds}
        if not kinds:
            there = Selector.hint(self, parameters)
            return f"{there}, in no module: give the module itself, or write by_path(...)"
        return f"the modules there are {listed(kinds)}"

    def __repr__(self) -> str:
        return f"by_type({', '.join(kind.__name__ for kind in self.types)})"


@final
@dataclasses.dataclass(frozen=True, repr=False)
class ByPath(Selector):
    """What stands at paths that match one of some globs."""

    globs: tuple[str, ...]

    def picks(self, parameters: Sequence[Parameter], depth: int) -> list[bool]:
        return [
            any(
                matches(glob, path)
                for place in p.places
                for path in (place.path, place.path[depth:])
                for glob in self.globs
            )
            for p in parameters
        ]

    def hint(self, parameters: Sequence[Parameter]) -> str:
        return offered(self.globs[0], [p.places[0].path for p in parameters])

    def __repr__(self) -> str:
        return f"by_path({', '.join(map(repr, self.globs))})"


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Both(Selector):
    """What two selectors pick."""

    first: Selector
    second: Selector

    def picks(self, parameters: Sequence[Parameter], depth: int) -> list[bool]:
        of = zip(self.first.picks(parameters, depth), self.second.picks(parameters, depth), strict=True)
        return [a and b for a, b in of]

    def hint(self, parameters: Sequence[Parameter]) -> str:
        for each in (self.first, self.second):
            if not any(each.picks(parameters, 0)):
                return each.hint(parameters)
        return Selector.hint(self, parameters)

    def __repr__(self) -> str:
        return " & ".join(_within(each, Either) for each in (self.first, self.second))


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Either(Selector):
    """What one of two selectors picks."""

    first: Selector
    second: Selector

    def picks(self, parameters: Sequence[Parameter], depth: int) -> list[bool]:
        of = zip(self.first.picks(parameters, depth), self.second.picks(parameters, depth), strict=True)
        return [a or b for a, b in of]

    def __repr__(self) -> str:
        return f"{self.first!r} | {self.second!r}"


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Not(Selector):
    """What a selector does not pick."""

    selector: Selector

    def picks(self, parameters: Sequence[Parameter], depth: int) -> list[bool]:
        return [not picked for picked in self.selector.picks(parameters, depth)]

    def __repr__(self) -> str:
        return f"~{_within(self.selector, Both | Either)}"


def _within(part: Selector, looser: Any) -> str:
    """How a part of a selector is printed where operators that bind less need brackets."""
    return f"({part!r})" if isinstance(part, looser) else repr(part)


def roles(parameters: Sequence[Parameter]) -> list[str]:
    """What each parameter is, as a word; nothing for a hidden matrix."""
    last = last_of_sequence(parameters)

    def role(i: int, p: Parameter) -> str:
        if is_embedding(p):
            return "an embedding"
        if is_head(p):
            return "a head"
        if is_flat(p):
            return "a vector"
        return "the last of the model, its head" if i == last else ""

    return [role(i, p) for i, p in enumerate(parameters)]


matrices: Selector = Matrices()
"""Selects arrays of two axes or more: weights of layers, kernels of convolutions, embeddings."""

vectors: Selector = Vectors()
"""Selects arrays of one axis, and numbers: biases, the scales of norms. `vectors` is `~matrices`."""

hidden_matrices: Selector = HiddenMatrices()
"""Selects the matrices that rules for matrices are meant for: no embedding, no head, no vector."""


def by_type(*types: type) -> Selector:
    """Selects what stands in modules of these types, at any depth: `by_type(torch.nn.Embedding)`.

    Types of subclasses count, and those of variables of Flax. A parameter with several places is picked if
    one of them stands in such a module. Only where the model itself is given are its modules known: not where
    it was flattened to a dict, or to named parameters. Raises NoMatch for what is no type.
    """
    for kind in types:
        if not isinstance(kind, type):
            raise NoMatch(f"by_type was given {kind!r}; it takes types, such as torch.nn.Embedding")
    if not types:
        raise NoMatch("by_type() picks nothing; it takes types, such as torch.nn.Embedding")
    return ByType(types)


def by_path(*globs: str) -> Selector:
    """Selects what stands at paths that match one of these globs: `matrices & ~by_path("head.**")`.

    `*` is any one key, `**` any number of keys. Raises NoMatch for what is no glob.
    """
    for glob in globs:
        if not isinstance(glob, str | KeyPath):
            raise NoMatch(f"by_path was given {glob!r}; it takes globs, such as '**.bias'")
    if not globs:
        raise NoMatch("by_path() picks nothing; it takes globs, such as '**.bias'")
    return ByPath(tuple(map(str, globs)))


def selector(key: object) -> Selector:
    """A key of a dict of rules, or an operand, as a selector; raises NoMatch for what is none."""
    if isinstance(key, Selector):
        return key
    if isinstance(key, str | KeyPath):
        return ByPath((str(key),))
    hint = f"; write opt.by_type({key.__name__})" if isinstance(key, type) else ""
    raise NoMatch(
        f"{key!r} is no selector; a dict of rules takes globs, such as '**.bias', and selectors, such as "
        f"opt.matrices{hint}"
    )


def first_picks(keys: Sequence[Any], parameters: Sequence[Parameter]) -> list[int]:
    """For each parameter, which of the selectors is the first that picks it.

    Raises NoMatch for a parameter that none picks, for a selector that picks nothing, and for one that others
    before it leave nothing.
    """
    if parameters and not keys:
        raise NoMatch('the dict of rules is empty; write {"**": Adam()}')
    table = [selector(key).picks(parameters, 0) for key in keys]
    first: list[int] = []
    for i, parameter in enumerate(parameters):
        fitting = next((k for k, picked in enumerate(table) if picked[i]), None)
        if fitting is None:
            raise NoMatch(
                f"no rule for {parameter.places[0].path.code()}; the keys are {', '.join(map(repr, keys))}; "
                f'add "**" for the rest, with None as its rule to train nothing there'
            )
        first.append(fitting)
    for k, (key, picked) in enumerate(zip(keys, table, strict=True)):
        if not any(picked):
            raise NoMatch(f"{key!r} matches no parameter; {selector(key).hint(parameters)}")
        if k not in first and key != "**":
            raise NoMatch(
                f"{key!r} takes no parameter, since keys before it take all that it picks; put it first"
            )
    return first
