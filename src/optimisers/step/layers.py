"""How deep does a parameter lie in its model, and how much slower is it trained for that?"""

import dataclasses
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

from optimisers.errors import BadSetting, NoMatch
from optimisers.rule import Rule, rate_of, with_rates
from optimisers.schedules import Scaled
from optimisers.settings import inner, is_number, is_schedule, parts, replaced, settings
from optimisers.tree.layout import Parameter
from optimisers.tree.path import KeyPath, listed
from optimisers.tree.roles import is_embedding, is_head, keys_of, words

FIRST = {"stem", "token", "tokens"}
"""Words in the names of what comes before all layers, beside those of embeddings."""

LAST = {"norm", "ln", "layernorm", "pooler"}
"""Words in the names of what comes behind all layers, beside those of heads."""


@final
@dataclasses.dataclass(frozen=True)
class LayerDecay:
    """A rule, or rules by selector, whose rates fall from the head of a model down; see `layer_decay`."""

    rule: Any
    decay: float
    layer: Callable[[KeyPath], int] | None = None

    def slowed(self, rules: Sequence[Rule | None], parameters: Sequence[Parameter]) -> list[Rule | None]:
        """The rules of some parameters with the rates of their depths: one object for all that are equal."""
        depths = depths_of(parameters, self.layer)
        top, known = max(depths, default=0), dict[tuple[int, int], Rule]()
        found: list[Rule | None] = []
        for rule, depth in zip(rules, depths, strict=True):
            if rule is None:
                found.append(None)
                continue
            if (id(rule), depth) not in known:
                known[id(rule), depth] = with_rate_times(rule, self.decay ** (top - depth))
            found.append(known[id(rule), depth])
        return found


def layer_decay(
    rule: object, decay: float = 0.75, *, layer: Callable[[KeyPath], int] | None = None
) -> LayerDecay:
    """Rates that fall with the distance from the head, for fine-tuning: eta * decay**(depth of the head -
    depth). `setup`, `TorchOptimizer` and `as_optax` take what comes back in the place of a rule.

    Clark et al., "ELECTRA", 2020, arXiv:2003.10555; Bao et al., "BEiT", 2021, arXiv:2106.08254, whose depths
    these are. `rule` is a rule, or a dict of rules by glob and selector. Its rate may be a schedule. Only the
    rate changes, and with it the decay that follows it.

    The depth is 0 for embeddings and for what a module declares before its stack of layers, then 1, 2, ... in
    the order of the first numbers in the paths (`blocks.0`, `layer3`), then one more for what comes behind:
    norm and head. What is declared between two layers counts with the one before it. Or it is what `layer`, a
    function of the path, returns, a whole number that grows towards the head. `explain` prints the rates.

    Raises BadSetting for a decay outside (0, 1], and, when a model is there: NoMatch where no path has
    numbers, BadSetting where several stacks have, where a place before or behind the stack cannot be told,
    for a rule that has no rate, and for a layer that is no whole number.
    """
    if not is_number(decay) or not 0 < decay <= 1:
        raise BadSetting(f"layer_decay was given decay={decay!r}; it takes a number above 0, 1 at most")
    if layer is not None and not callable(layer):
        raise BadSetting(f"layer_decay was given layer={layer!r}; it takes a function of a path")
    if isinstance(rule, LayerDecay):
        raise BadSetting("layer_decay was given what it returns; write the rule, or a dict of rules")
    return LayerDecay(rule, decay, layer)


def with_rate_times(rule: Rule, factor: float) -> Rule:
    """A rule whose rate, the last one that it has, is multiplied; raises BadSetting where it has none."""
    eta = rate_of(rule)
    return rule if factor == 1 else with_rate(rule, times(eta, factor))


def times(rate: Any, factor: float) -> Any:
    """A rate, which may be a schedule, multiplied."""
    return Scaled(rate, factor) if is_schedule(rate) else factor * rate


def with_rate(rule: Rule, rate: object) -> Rule:
    """A rule with another rate in the place of its own, of the last one that it has."""
    return _with_part(rule, with_rates(parts(rule))[-1], {"eta": rate})


def _with_part(value: Any, part: Any, changes: dict[str, Any]) -> Any:
    """A value in which one of its parts has other settings."""
    if value is part:
        return replaced(value, changes)
    new = {name: inner(v, lambda v: _with_part(v, part, changes)) for name, v in settings(value)}
    return replaced(value, new)


# -- depths --------------------------------------------------------------------------------------------------


def depths_of(parameters: Sequence[Parameter], layer: Callable[[KeyPath], int] | None) -> list[int]:
    """The depth of each parameter, which `layer` says, or the numbers in the paths."""
    if layer is None:
        return _by_numbers(parameters)
    found: list[int] = []
    for p in parameters:
        path = p.places[0].path
        depth = layer(path)
        try:
            found.append(operator.index(depth))
        except TypeError as error:
            raise BadSetting(
                f"layer gave {depth!r} for {path}; it takes a whole number, 0 for the first layer"
            ) from error
    return found


class _Numbered(NamedTuple):
    """The first number in a path."""

    stack: str
    """The path before the number, as a glob: `encoder.layer.*`."""
    number: int


def _numbered(parameter: Parameter) -> _Numbered | None:
    keys = keys_of(parameter.places[0])
    for n, key in enumerate(keys):
        if found := re.fullmatch(r"(.*?)(\d+)", key):
            return _Numbered(".".join([*keys[:n], f"{found[1]}*"]), int(found[2]))
    return None


def _by_numbers(parameters: Sequence[Parameter]) -> list[int]:
    numbered = [_numbered(p) for p in parameters]
    stack = _stack(parameters, numbered)
    order = sorted({at.number for at in numbered if at is not None and at.stack == stack})
    depth_of = {number: depth for depth, number in enumerate(order, 1)}
    layers = [None if at is None or at.stack != stack else depth_of[at.number] for at in numbered]
    left, last, behind = len(layers) - layers.count(None), 0, len(order) + 1
    found: list[int] = []
    for p, depth in zip(parameters, layers, strict=True):
        if depth is not None:
            left, last = left - 1, depth
        found.append(_outside(p, last if left else behind, behind, stack) if depth is None else depth)
    return found


def _stack(parameters: Sequence[Parameter], numbered: Sequence[_Numbered | None]) -> str:
    """The one stack of layers that a model has: names that differ by a number."""
    numbers: dict[str, set[int]] = {}
    for p, at in zip(parameters, numbered, strict=True):
        if at is not None and not is_embedding(p) and not is_head(p):
            numbers.setdefault(at.stack, set()).add(at.number)
    stacks = {stack: len(found) for stack, found in numbers.items() if len(found) > 1}
    say = "say how deep a path lies: layer_decay(rule, 0.75, layer=lambda path: ...)"
    if not stacks:
        raise NoMatch(
            f"no path has the number of a layer; there are {listed([p.places[0].path for p in parameters])}; "
            f"{say}"
        )
    if len(stacks) > 1:
        several = " and ".join(f"{stack} ({count})" for stack, count in stacks.items())
        raise BadSetting(f"there are several stacks of layers, {several}; {say}")
    return next(iter(stacks))


def _outside(parameter: Parameter, declared: int, behind: int, stack: str) -> int:
    """The depth of a parameter outside the stack of layers: an embedding lies before it, a head behind; other
    names say less than where a module has `declared` them, which counts with the layer before.
    """
    if is_embedding(parameter):
        return 0
    if is_head(parameter):
        return behind
    place = parameter.places[0]
    if place.kinds and not any(base.__module__.startswith("flax.") for base in place.kinds[0].__mro__):
        return declared
    found = {word for key in keys_of(place) for word in words(key)}
    if found.isdisjoint(FIRST | LAST):
        raise BadSetting(
            f"{place.path} may lie before {stack} or behind it; say how deep a path lies: layer_decay(rule, "
            "0.75, layer=lambda path: ...)"
        )
    return behind if found.isdisjoint(FIRST) else 0
