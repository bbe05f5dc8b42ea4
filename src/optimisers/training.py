"""How is a copy of a model trained under a rule, in each library? For comparisons, not for use."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optimisers.arrays import registry
from optimisers.averaged import averaged
from optimisers.errors import BadSetting, NoMatch
from optimisers.grads import hutchinson
from optimisers.grads import value_and_grad as of_tensors
from optimisers.rule import Rule, rate_of, with_rates
from optimisers.settings import is_schedule, parts
from optimisers.step.layers import LayerDecay, times, with_rate
from optimisers.step.update import setup, update, update_
from optimisers.tree.flatten import flatten_model

Loss = Callable[[Any, Any], Any]
Gradient = Callable[[Loss], Callable[[Any, Any], tuple[Any, Any]]]

# -- rates ---------------------------------------------------------------------------------------------------


def rated(rule: object, factor: float) -> Any:
    """A rule, a dict of them or `layer_decay` of one, with its rate times a number: where rules stand in a
    row that of the last one that has a rate, for their rates multiply. A rule without a rate stays as it is.
    """
    if isinstance(rule, Mapping):
        return {key: rated(each, factor) for key, each in rule.items()}
    if isinstance(rule, LayerDecay):
        return dataclasses.replace(rule, rule=rated(rule.rule, factor))
    if not isinstance(rule, Rule) or not rates(rule):
        return rule
    new = times(rate_of(rule), factor)
    return with_rate(rule, float(f"{new:.12g}") if isinstance(new, float) else new)  # 0.009, not 0.0090...01


def rates(rule: object) -> list[Any]:
    """The rates of a rule, or of the rules of a dict."""
    if isinstance(rule, LayerDecay):
        return rates(rule.rule)
    rules = rule.values() if isinstance(rule, Mapping) else (rule,)
    return [part.eta for each in rules if isinstance(each, Rule) for part in with_rates(parts(each))]


# -- trainings -----------------------------------------------------------------------------------------------


Stepped = Callable[[], object]
"""What is called after each step."""

Trained = tuple[list[list[float]], Callable[[int], Any]]
"""(losses of each training, number of a training -> the model to evaluate)."""


class Run(NamedTuple):
    """Trainings that run together: one for each of these factors of the rate."""

    factors: Sequence[float]
    train: Callable[
        [Any, Iterable[Any], Callable[[], object]], tuple[list[list[float]], Callable[[int], Any]]
    ]
    """(model, batches, what to call after each step) -> (losses of each, number -> the model to evaluate)."""


class Trainer(NamedTuple):
    """How models of a library are trained."""

    runs: Callable[[Any, Sequence[float]], list[Run]]
    """(rule, factors of its rate) -> the trainings."""
    seed: Callable[[int], None]
    """Start the random numbers of the library, if it has any of its own."""


def guarded() -> contextlib.AbstractContextManager[object]:
    """Puts the random numbers of PyTorch back at the end, where it is loaded."""
    torch: Any = sys.modules.get("torch")
    return contextlib.nullcontext() if torch is None else torch.random.fork_rng()


def trainer(model: object, loss: Loss, gradient: Gradient | None) -> Trainer:
    """How models of this kind are trained; `gradient` makes (loss, gradients) of a loss, unless the library
    does.
    """
    _, arrays = flatten_model(model)
    if not arrays:
        raise BadSetting(
            f"race was given {type(model).__name__} as the model, which holds no arrays to train"
        )
    name = registry.library(*arrays).name
    if name == "jax":
        jax: Any = importlib.import_module("jax")
        both = (gradient or _gradient_of_jax(jax, model))(loss)
        return Trainer(functools.partial(_runs_of_jax, jax, both, loss), _nothing)
    if name == "torch":
        torch: Any = importlib.import_module("torch")
        both = gradient(loss) if gradient else lambda x, batch: of_tensors(loss, x, batch)
        return Trainer(functools.partial(_runs, both, loss), torch.manual_seed)
    return Trainer(functools.partial(_runs, gradient(loss) if gradient else loss, loss), _nothing)


def _nothing(_seed: int) -> None:
    """There are no random numbers to start."""


def evaluated(state: object, model: object) -> Any:
    """The model with the parameters that its rules evaluate with."""
    try:
        return averaged(state, model)
    except NoMatch:
        return model


ESTIMATES = 10
"""A rule that asks for second gradients is given an estimate every so many steps."""


def curved(rule: object) -> bool:
    """Whether a rule, or one of a dict, asks for second gradients."""
    if isinstance(rule, LayerDecay):
        return curved(rule.rule)
    rules = rule.values() if isinstance(rule, Mapping) else (rule,)
    return any(isinstance(part, Rule) and part.second_order for each in rules for part in parts(each))


def _estimates(
    loss: Loss, rule: object, step: Any, model: object, batch: object, *, now: bool
) -> tuple[Any, ...]:
    """The second gradients of a step, where the rule asks for them: an estimate, or None for none now."""
    if not curved(rule):
        return ()
    return (hutchinson(loss, model, step, batch) if now else None,)


def _runs(both: Callable[..., Any], loss: Loss, rule: object, factors: Sequence[float]) -> list[Run]:
    """One training after the other, in place."""

    def seconds(step: int, model: object, batch: object) -> tuple[Any, ...]:
        return _estimates(loss, rule, step, model, batch, now=step % ESTIMATES == 0)

    def train(factor: float, model: object, batches: Iterable[Any], stepped: Stepped) -> Trained:
        model = copy.deepcopy(model)
        state, losses = setup(rated(rule, factor), model), list[float]()
        for batch in batches:
            with np.errstate(over="ignore", invalid="ignore"):  # a loss that grows without end is an answer
                value, grads = _pair(both(model, batch))
                more = seconds(len(losses), model, batch)
            losses.append(float(value))
            if not math.isfinite(losses[-1]):
                break
            state, model = update_(state, model, grads, *more, loss=losses[-1])
            stepped()
        return [losses], lambda _: evaluated(state, model)

    return [Run([factor], functools.partial(train, factor)) for factor in factors]


def _pair(found: object) -> tuple[Any, Any]:
    """(loss, gradients); raises BadSetting for anything else."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise BadSetting(
            f"loss(model, batch) gave {type(found).__name__}; for these arrays it gives (loss, gradients), "
            "or race is told value_and_grad="
        )
    return found


def _runs_of_jax(
    jax: Any, both: Callable[..., Any], loss: Loss, rule: object, factors: Sequence[float]
) -> list[Run]:
    """All rates of a rule in one vmapped step; those of schedules one after the other."""

    def train(together: Sequence[float], model: object, batches: Iterable[Any], stepped: Stepped) -> Trained:
        leaves, structure = jax.tree.flatten(model)
        moving = [isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int) for leaf in leaves]

        def whole(arrays: list[Any]) -> Any:
            """The model with these arrays; functions and the like, which modules hold too, stay."""
            new = iter(arrays)
            return structure.unflatten(
                [next(new) if moves else leaf for moves, leaf in zip(moving, leaves, strict=True)]
            )

        def arrays_of(tree: object) -> list[Any]:
            return list(itertools.compress(jax.tree.leaves(tree), moving))

        def step(now: bool, state: object, arrays: list[Any], batch: object, number: object) -> Any:
            model = whole(arrays)
            more = _estimates(loss, rule, number, model, batch, now=now)
            value, grads = both(model, batch)  # statistics that a module keeps change in it
            state, new = update(state, model, grads, *more, loss=value)
            return value, state, arrays_of(new)

        def begin(factor: float) -> Any:
            return setup(rated(rule, factor), model), arrays_of(model)

        alone = len(together) == 1
        held = begin(together[0]) if alone else jax.vmap(begin)(jax.numpy.asarray(together))
        ways = [functools.partial(step, now) for now in (False, True)]
        ways = [jax.jit(way if alone else jax.vmap(way, in_axes=(0, 0, None, None))) for way in ways]
        values: list[Any] = []
        for number, batch in enumerate(batches):
            stepping = ways[curved(rule) and number % ESTIMATES == 0]
            value, *held = stepping(*held, batch, number)
            values.append(jax.numpy.reshape(value, (len(together),)))
            stepped()
        losses = [list(each) for each in zip(*(value.tolist() for value in values), strict=True)]

        def model_of(k: int) -> Any:
            state, arrays = held if alone else jax.tree.map(lambda a: a[k], tuple(held))
            return evaluated(state, whole(arrays))

        return [_until_finite(each) for each in losses], model_of

    each = [factors] if not any(map(is_schedule, rates(rule))) else [[factor] for factor in factors]
    return [Run(together, functools.partial(train, together)) for together in each]


def _gradient_of_jax(jax: Any, model: object) -> Gradient:
    """What differentiates losses of a model: Flax and Equinox bring their own for their modules."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(model, nnx.Module):
        return nnx.value_and_grad
    equinox: Any = sys.modules.get("equinox")
    if equinox is not None and isinstance(model, equinox.Module):
        return equinox.filter_value_and_grad
    return jax.value_and_grad


def _until_finite(losses: list[float]) -> list[float]:
    """The losses up to the first that is no finite number."""
    return list(itertools.takewhile(math.isfinite, losses))
