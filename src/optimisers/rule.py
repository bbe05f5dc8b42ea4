"""What is a rule? A value with `init` and `apply`, written for one array."""

import contextlib
import contextvars
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Self

from optimisers.errors import BadSetting, TraceError, UnknownField, deprecated
from optimisers.ops.random import SEEDS
from optimisers.ops.steps import Becomes
from optimisers.settings import (
    Value,
    adjusted,
    fields,
    is_number,
    parts,
    refuse_unknown,
    static,
)
from optimisers.spellings import ELSEWHERE
from optimisers.tree.children import container_for
from optimisers.typed import Pair, Setting, setting


class Rule(Value):
    """A way to step one array of parameters; subclass it, list the hyper-parameters as fields, write two
    functions.

    `init(x) -> state` and `apply(state, x, dx) -> (state, dx)`, where the returned `dx` is subtracted from
    `x`. Both are pure and use only arithmetic and the operations of `optimisers.ops`; `apply` runs once, when
    it is traced, so a Python value in it (a random number, a counter) is a constant of the rule. State is any
    nest of tuples, NamedTuples and dicts, of arrays and numbers; None or () if there is none.

    Fields with a number as default are hyper-parameters: they can be adjusted, and each may be a schedule, a
    function of the clock. Other fields, and those declared with `static(default)`, are structure. An `eta`
    must not be negative.
    """

    lazy: ClassVar[bool] = False
    """Whether rows whose gradient is 0 may be left alone, where a gradient is sparse: of these rules only the
    rows are stepped that it has, of all others every row.
    """

    whole: ClassVar[bool] = False
    """Whether this rule must see the step as it is taken: then it wraps a chain and cannot stand in one."""

    last: ClassVar[bool] = False
    """Whether this rule must see the step as it is taken, but may be the last one of a chain."""

    per_example: ClassVar[bool] = False
    """Whether gradients come with an axis in front, an entry for each example: `apply` is given their sum,
    each times its weight. Such a rule stands first in a chain.
    """

    second_order: ClassVar[bool] = False
    """Whether an update must be given second gradients, though None among them is none at this step. Without
    this a further gradient that `apply` has a default for may be left out.
    """

    def weigh(self, norms: Any) -> Any:
        """Of a rule that takes gradients of single examples the weight of each, from the norm of its gradient
        over all arrays.
        """
        return norms * 0 + 1

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise BadSetting for a shape of parameters that this rule does not step; asked before `init`, and
        by `TorchOptimizer` when it is made.
        """

    def init(self, x: Any) -> Any:
        """The state for one array of parameters; by default none, `()`."""
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        """(state, what is subtracted from x)."""
        raise NotImplementedError(f"{type(self).__name__} has no apply(self, state, x, dx)")

    def evaluate(self, state: Any, x: Any) -> Any:
        """The parameters to evaluate with in place of `x`, which the model holds, where the rule keeps such:
        an average, say. None, as by default, means `x` itself. A rule that wraps another asks that one.
        """
        return None

    def adjust(self, eta: object = None, **changes: object) -> Self:
        """This rule with the named hyper-parameters replaced, also in the rules it is made of; `eta` may come
        first.

        Raises UnknownField for a name that none of them has, BadSetting for a value that does not fit.
        """
        changes = changes_of(eta, changes)
        refuse_unknown(self, changes)
        return adjusted(self, changes)

    if not TYPE_CHECKING:  # a checker knows what a rule has

        def __getattr__(self, name: str) -> Any:
            here, cls = ELSEWHERE.get(name), type(self).__name__
            instead = f"its {here}" if here in type(self)._fields else ELSEWHERE_CALLED.get(name)
            said = "" if instead is None else f"; write {instead}"
            raise AttributeError(f"{cls} has no attribute {name!r}{said}", name=name, obj=self)

    def __new__(cls, *given: object, **settings: object) -> Self:
        if given and cls._named and cls._forms[:1] and cls._forms[0].kind is not None:
            _refuse_parameters(cls.__name__, given[0])
        return super().__new__(cls, *given, **settings)

    def __post_init__(self) -> None:
        super().__post_init__()
        eta = vars(self).get("eta")
        if isinstance(eta, float | int) and eta < 0:
            raise BadSetting(f"{type(self).__name__}.eta is {eta!r}; the learning rate cannot be negative")


def _refuse_parameters(rule: str, given: object) -> None:
    """Raise BadSetting for a model, or its parameters, in place of the first number of a rule."""
    if isinstance(given, list):
        several: list[Any] = given
        parameters = bool(several) and not is_number(several[0]) and not callable(several[0])
    else:
        container = None if type(given) is float else container_for(given)
        known = container is not None and container.gradients is not None
        parameters = known or isinstance(given, Generator | dict)
    if parameters:
        raise BadSetting(
            f"{rule} was given a {type(given).__name__} where a number goes; a rule holds no parameters: "
            f"write opt.TorchOptimizer(module, opt.{rule}()), or opt.setup(opt.{rule}(), model)"
        )


TORCHS = "opt.TorchOptimizer(params, rule)"

ELSEWHERE_CALLED = {
    "step": "opt.update(state, model, grads), where state = opt.setup(rule, model)",
    "update": "opt.update(state, model, grads), where state = opt.setup(rule, model)",
    "zero_grad": "opt.update(state, model, grads): gradients are arguments",
    "add_param_group": TORCHS,
    "param_groups": TORCHS,
    "state_dict": TORCHS,
    "load_state_dict": TORCHS,
}
"""Methods of torch's and Optax's optimisers that a rule does not have -> what to write."""


def changes_of(eta: object, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings that a call of `adjust` names; raises UnknownField if it names none."""
    if eta is not None:
        changes = {"eta": eta, **changes}
    if not changes:
        raise UnknownField(
            "adjust was given nothing to change; write adjust(state, 0.01) or adjust(state, rho=0.9)"
        )
    return changes


def stepped(rule: Rule, state: object, x: Any, dx: Any, more: tuple[Any, ...] = ()) -> Any:
    """`rule.apply`, given as many of the further gradients `more` (second derivatives, say) as it asks
    for.
    """
    needs, takes = further(type(rule))
    if len(more) < needs:
        raise TraceError(
            f"{type(rule).__name__} takes {needs + 1} gradients, and {len(more) + 1} came; write "
            f"update(state, model, grads, {', '.join(f'grads{i + 2}' for i in range(needs))})"
        )
    now = at_clock.get()
    resolved = rule if now is None else now(rule)
    token = asking.set(rule)
    try:
        with one_step() as rates:
            known = len(rates)
            answer = _answer(rule, resolved.apply(state, x, dx, *more[:takes]), traced=now is not None)
            inner = parts(resolved) if len(rates) == known else [resolved]
            rates.extend([part.eta for part in with_rates(inner)][:1])
            return answer
    finally:
        asking.reset(token)


def _answer(rule: Rule, answer: Any, *, traced: bool) -> Any:
    """What a rule answered; raises TraceError, naming it, for what is no state and step."""
    name = type(rule).__name__
    if not isinstance(answer, tuple) or len(answer) != 2:
        what = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else type(answer).__name__
        what = "one array" if hasattr(type(answer), "shape") else "None" if answer is None else what
        raise TraceError(f"{name}.apply returned {what}; it returns a pair (state, dx)")
    dx = answer[1]
    if isinstance(dx, bool) or getattr(dx, "type", "") == "bool":
        raise TraceError(
            f"{name}.apply returned a condition as the step; write where(condition, step, other)"
        )
    if (
        traced
        and dx is not None
        and not (isinstance(dx, Becomes) or hasattr(type(dx), "shape") or is_number(dx))
    ):
        what = "a function" if callable(dx) else f"a {type(dx).__name__}"
        hint = "; the state goes first: return state, dx" if hasattr(type(answer[0]), "shape") else ""
        raise TraceError(
            f"{name}.apply returned {what} as the step; it returns what is subtracted from x, an array of "
            f"its shape{hint}"
        )
    return answer


_rates: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("rates", default=None)
"""The rates by which the rules of this step have stepped so far, in their order."""


@contextlib.contextmanager
def one_step() -> Generator[list[Any]]:
    """The rates of the step that is being made; of a new one outside of every other."""
    rates = _rates.get()
    if rates is not None:
        yield rates
        return
    rates = []
    token = _rates.set(rates)
    try:
        yield rates
    finally:
        _rates.reset(token)


def with_rates(values: Iterable[Value]) -> list[Any]:
    """Those of some values that have a rate of their own, `eta`, which can change."""
    return [v for v in values if any(f.name == "eta" and f.kind is not None for f in fields(v))]


def rate_before(rule: Rule) -> Any:
    """The rate, as it is now, of the last rule before this one that has one; raises BadSetting if none
    does.
    """
    rates = _rates.get()
    if not rates:
        name = type(rule).__name__
        how = f"{name}(0.01, couple=True)" if hasattr(rule, "couple") else f"{name}(0.01)"
        raise BadSetting(
            f"{name} takes the rate of a rule before it, and there is none with an eta; write "
            f"Chain(Adam(), {how})"
        )
    return rates[-1]


asking: contextvars.ContextVar[Rule | None] = contextvars.ContextVar("asking", default=None)
"""The rule that is being applied: a total is summed over the leaves whose rules of its type ask for it, and
each rule has random numbers of its own.
"""


at_clock: contextvars.ContextVar[Callable[[Rule], Rule] | None] = contextvars.ContextVar(
    "at_clock", default=None
)
"""Gives a rule that is about to be stepped with its schedules at the clock of the scope: behind a `when` that
of the steps taken.
"""


def needed(rule: Rule) -> int:
    """How many gradients beyond the first a rule, or one that it is made of, cannot do without."""
    return max((further(type(part))[0] for part in parts(rule) if isinstance(part, Rule)), default=0)


_further: "weakref.WeakKeyDictionary[type[Rule], tuple[int, int]]" = weakref.WeakKeyDictionary()


EVERY = 1 << 30
"""How many further gradients a rule takes that hands all of them on."""


def further(cls: type[Rule]) -> tuple[int, int]:
    """How many gradients beyond the first `apply` of this class needs, and how many it takes."""
    if cls not in _further:
        _further[cls] = _further_of(cls)
    return _further[cls]


def _further_of(cls: type[Rule]) -> tuple[int, int]:
    parameters = list(inspect.signature(cls.apply).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 0, EVERY
    extra = [p for p in parameters[4:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty for p in extra), len(extra)


def in_unit_interval(rule: Rule, *names: str) -> None:
    """Raise BadSetting unless the named settings, decay factors of averages, lie in [0, 1)."""
    for name in names:
        value = getattr(rule, name)
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, float) and not 0 <= v < 1:
                raise BadSetting(f"{type(rule).__name__}.{name} is {value!r}; it takes numbers in [0, 1)")


def not_negative(rule: Rule, *names: str) -> None:
    """Raise BadSetting if one of the named settings is negative."""
    for name in names:
        value = getattr(rule, name)
        if isinstance(value, float) and not value >= 0:
            raise BadSetting(f"{type(rule).__name__}.{name} is {value!r}; it cannot be negative")


def a_seed(rule: Rule, name: str = "seed") -> None:
    """Raise BadSetting unless a setting is a seed of random numbers."""
    value = getattr(rule, name)
    if isinstance(value, int) and not 0 <= value < SEEDS:
        raise BadSetting(
            f"{type(rule).__name__}.{name} is {value!r}; it takes a whole number from 0 to {SEEDS - 1}"
        )


def one_of(rule: Rule, name: str, known: tuple[str, ...]) -> None:
    """Raise BadSetting unless a static setting is one of the known words."""
    if getattr(rule, name) not in known:
        wanted = " or ".join(map(repr, known))
        raise BadSetting(f"{type(rule).__name__}.{name} is {getattr(rule, name)!r}; it takes {wanted}")


def at_least_one(rule: Rule, name: str) -> None:
    """Raise BadSetting unless a count is 1 or more."""
    value = getattr(rule, name)
    if isinstance(value, int) and value < 1:
        raise BadSetting(f"{type(rule).__name__}.{name} is {value!r}; it takes a whole number, 1 or more")


def refuse_shape(rule: Rule, shape: tuple[int, ...]) -> None:
    """Raise BadSetting for a shape of parameters that a rule, or one that it is made of, does not step."""
    for part in parts(rule):
        if isinstance(part, Rule):
            part.check_shape(shape)


def a_rule(outer: Rule, inner: object) -> None:
    """Raise BadSetting unless what a rule wraps is a rule."""
    if not isinstance(inner, Rule):
        name = type(outer).__name__
        instead = f"{name}({inner.__name__}())" if isinstance(inner, type) else f"{name}(Adam())"
        raise BadSetting(f"{name}.rule is {inner!r}; it takes a rule: write {instead}")


def rate_of(rule: Rule) -> Any:
    """The learning rate of a rule, or of the last one with a rate that it is made of: what decay beside its
    step is multiplied by.

    Raises BadSetting where there is none.
    """
    rated = with_rates(parts(rule))
    if not rated:
        raise BadSetting(f"{rule!r} has no rate eta; write a rule that has, such as Adam()")
    return rated[-1].eta


def instead_of_variant(
    old: type[Rule], new: type[Rule], given: tuple[Any, ...], settings: dict[str, Any]
) -> Any:
    """The rule `new` where `old` was asked for by `variant="torch"`, by name or as the last setting by place;
    None where no variant was named.
    """
    known = len(dataclasses.fields(old))
    settings = dict(settings)
    variant = settings.pop("variant", None) if len(given) <= known else given[known]
    if variant is None:
        return None
    instead = {"torch": (new, "is now a rule of its own"), "julia": (old, "is the default")}.get(variant)
    if instead is None:
        raise UnknownField(
            f"{old.__name__} has no variant {variant!r}; write {old.__name__}(), or {new.__name__}() for the "
            "formula of torch.optim"
        )
    rule, why = instead
    deprecated(f'{old.__name__}(variant="{variant}") {why}; write {rule.__name__}()', since="0.2.0", depth=5)
    return rule(*given[:known], **settings)


__all__ = [
    "Pair",
    "Rule",
    "Setting",
    "a_rule",
    "a_seed",
    "at_least_one",
    "changes_of",
    "in_unit_interval",
    "instead_of_variant",
    "needed",
    "not_negative",
    "one_of",
    "one_step",
    "rate_before",
    "rate_of",
    "refuse_shape",
    "setting",
    "static",
    "stepped",
    "with_rates",
]
