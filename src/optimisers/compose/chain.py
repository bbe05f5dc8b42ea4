"""Several rules, one after the other."""

from collections.abc import Iterable, Iterator
from typing import Any

from optimisers.arrays.protocol import Array
from optimisers.errors import BadSetting, UnknownField
from optimisers.ops import under
from optimisers.rule import Rule, one_step, stepped
from optimisers.settings import parts


def held(rules: Iterable[Rule]) -> Iterator[Rule]:
    """Some rules, and those that they are made of."""
    return (part for rule in rules for part in parts(rule) if isinstance(part, Rule))


class Chain(Rule):
    """Applies rules in order, each to what the one before returned; without rules, the gradient itself is the
    step.

    `Chain(WeightDecay(0.1), Adam())`. The state is the tuple of theirs. Where a rule answers "no step" (None,
    or `when` with a condition that fails), the rules behind it do not run and keep their state.
    """

    lazy = True

    rules: tuple[Rule, ...] = ()

    def __init__(self, *rules: Rule, **named: Any) -> None:
        for name in named:
            raise UnknownField(
                f"Chain has no setting {name}; its rules go by place, such as Chain(ClipGrad(), Adam())"
            )
        self.rules = rules  # pyright: ignore[reportAttributeAccessIssue] set once, here
        self.__post_init__()

    def check(self) -> None:
        for rule in self.rules:
            if not isinstance(rule, Rule):
                hint = f"; write {rule.__name__}()" if isinstance(rule, type) else ""
                hint = "; write Chain(*rules)" if isinstance(rule, list | tuple) else hint
                raise BadSetting(
                    f"Chain was given {rule!r}; it takes rules, such as Chain(ClipGrad(), Adam()){hint}"
                )

        for part in held(self.rules[1:]):
            name = type(part).__name__
            if part.per_example:
                raise BadSetting(
                    f"Chain was given a {name} behind other rules; it takes the gradients of single "
                    f"examples: write it first, Chain({name}(), ...)"
                )
        for part in held(self.rules[:-1]):
            name = type(part).__name__
            if part.last:
                raise BadSetting(
                    f"Chain was given a {name} before other rules; it averages the parameters that a step "
                    f"leads to: write it last, Chain(..., {name}())"
                )
        for part in held(self.rules if len(self.rules) > 1 else ()):
            name = type(part).__name__
            if part.whole:
                raise BadSetting(
                    f"Chain was given a {name} among other rules; it wraps a whole chain: write "
                    f"{name}(Chain(...))"
                )

    def init(self, x: Array) -> tuple[Any, ...]:
        return tuple(rule.init(x) for rule in self.rules)

    def apply(self, state: tuple[Any, ...], x: Array, dx: Array | None, *more: Array) -> Any:
        new: list[Any] = []
        with one_step():
            for rule, old in zip(self.rules, state, strict=True):
                if dx is None:
                    new.append(old)
                    continue
                with under(dx):
                    kept, dx = stepped(rule, old, x, dx, more)
                new.append(kept)
        return tuple(new), dx

    def evaluate(self, state: tuple[Any, ...], x: Array) -> Any:
        found = (rule.evaluate(kept, x) for rule, kept in zip(self.rules, state, strict=True))
        return next((value for value in found if value is not None), None)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.rules))})"
