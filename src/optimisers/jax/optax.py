"""Rules as transformations of Optax, and transformations of Optax as rules for a whole model."""

import functools
import operator
from typing import Any, cast

import jax
import optax

from optimisers.arrays import registry
from optimisers.errors import BadState, TreeMismatch
from optimisers.rule import Rule
from optimisers.step.update import setup, update
from optimisers.tree.path import KeyPath
from optimisers.tree.walk import Layout, Ties, gather, gather_gradients, rebuild, survey

__all__ = ["as_optax", "from_optax"]


# -- ours in Optax -------------------------------------------------------------------------------------------


def as_optax(rule: object) -> optax.GradientTransformationExtraArgs:
    """A rule (or {glob: rule}) as a transformation of Optax, to chain, wrap, and hand to trainers.

    Its state is that of `setup` over the arrays of the parameters, by their path: adjust and freeze it there.
    `update` needs the parameters, and ignores further arguments. Since it returns what is to be added to
    them, rounding differs from that of our own `update` by one addition.
    """

    def init(params: Any) -> Any:
        return setup(rule, _named(params)[0], engine="interpret")

    def change(updates: object, state: object, params: object = None, **_: object) -> Any:
        if params is None:
            raise BadState("as_optax(rule) needs the parameters; write tx.update(grads, state, params)")
        named, _ = _named(params)
        slopes, form = _named(updates)
        state, new = update(state, named, {k: slopes.get(k) for k in named})
        steps = [new[k] - named[k] if k in slopes else None for k in slopes]
        return jax.tree.unflatten(form, steps), state

    return optax.GradientTransformationExtraArgs(init, change)


def _named(tree: object) -> tuple[dict[str, Any], Any]:
    """(the arrays of a pytree by their path, its form)."""
    found, form = jax.tree_util.tree_flatten_with_path(tree)
    return {_path(keys): x for keys, x in found}, form


def _path(keys: Any) -> str:
    """A path as our globs read it; the wrapper of a variable of Flax does not count."""
    text = jax.tree_util.keystr(keys, simple=True, separator=".")
    return text.removesuffix(".value") or "params"


# -- Optax here ----------------------------------------------------------------------------------------------


class WholeState:
    """The state of a transformation of Optax beside a model; `update` steps the model with it."""

    def __init__(self, rule: "from_optax", layout: Layout, inner: optax.OptState) -> None:
        self.rule, self.layout, self.inner = rule, layout, inner

    def __repr__(self) -> str:
        return f"WholeState({self.inner!r})"

    def stepped(self, model: Any, grads: Any, **extra: Any) -> Any:
        """(state, model) after a step. `extra` goes to the transformation: for a line search `value`, `grad`
        and `value_fn`, a loss of the model.
        """
        root = self.layout.root
        xs = _by_leaf(root, gather(root, model, KeyPath()))
        slopes = _summed(root, gather_gradients(root, grads, KeyPath()))
        for leaf, g in slopes.items():
            name = self.layout.paths[leaf].code("grads")
            if g is None:
                raise TreeMismatch(
                    f"{name} is None; a transformation of Optax steps all parameters at once: wrap it in "
                    "optax.masked, or give zeros"
                )
            if tuple(g.shape) != tuple(xs[leaf].shape):
                raise TreeMismatch(
                    f"gradient of shape {tuple(g.shape)} for parameters of shape {tuple(xs[leaf].shape)}, at "
                    f"{name}"
                )
        names = {leaf: str(self.layout.paths[leaf]) for leaf in xs}
        old = {names[i]: x for i, x in xs.items()}

        def whole(named: dict[str, Any]) -> Any:
            return rebuild(root, model, {i: named[name] for i, name in names.items()})

        if "value_fn" in extra:
            loss = extra["value_fn"]
            extra["value_fn"] = lambda named, **more: loss(whole(named), **more)
        if "grad" in extra:
            given = _summed(root, gather_gradients(root, extra["grad"], KeyPath()))
            extra["grad"] = {names[i]: g for i, g in given.items()}
        found: Any = self.rule.tx.update({names[i]: g for i, g in slopes.items()}, self.inner, old, **extra)
        steps, inner = found
        stepped = cast("dict[str, Any]", optax.apply_updates(old, steps))
        new = {i: stepped[name] for i, name in names.items()}
        return WholeState(self.rule, self.layout, inner), rebuild(root, model, new)


def _by_leaf(root: Any, values: Any) -> dict[int, Any]:
    """What stands at the first place of every leaf."""
    found: dict[int, Any] = {}
    for leaf, value in zip(root.leaves, values, strict=True):
        found.setdefault(leaf, value)
    return found


def _summed(root: Any, grads: Any) -> dict[int, Any]:
    """The gradient of every leaf, summed over its places; the same object at several counts once."""
    places: dict[int, list[Any]] = {}
    for leaf, g in zip(root.leaves, grads, strict=True):
        seen = places.setdefault(leaf, [])
        if g is not None and all(g is not other for other in seen):
            seen.append(g)
    return {leaf: functools.reduce(operator.add, gs) if gs else None for leaf, gs in places.items()}


class _Static:
    """What of a state is no array; equal for one transformation over models that are walked alike."""

    def __init__(self, rule: "from_optax", layout: Layout) -> None:
        self.rule, self.layout = rule, layout

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or self.rule.tx is not other.rule.tx:
            return False
        return self.layout.key == other.layout.key

    def __hash__(self) -> int:
        return hash((id(self.rule.tx), self.layout.key))


jax.tree_util.register_pytree_with_keys(
    WholeState,
    lambda s: (((jax.tree_util.GetAttrKey("inner"), s.inner),), _Static(s.rule, s.layout)),
    lambda static, children: WholeState(static.rule, static.layout, next(iter(children))),
)


class from_optax:  # noqa: N801 it is used as a function
    """A transformation of Optax as a rule for a whole model: `setup(from_optax(optax.lbfgs()), model)`.

    `update(state, model, grads)` steps all parameters together; ties count once. What needs more, such as the
    line search of L-BFGS, is given to the state: `state.stepped(model, grads, value=v, grad=grads,
    value_fn=loss)`. There is no Leaf for each array, so freeze and adjust do not apply: use Optax's wrappers.
    """

    def __init__(self, tx: optax.GradientTransformation) -> None:
        if isinstance(tx, Rule) or not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise BadState(
                f"from_optax takes a transformation of Optax, such as optax.adam(1e-3); {tx!r} was given"
            )
        self.tx = tx

    def __repr__(self) -> str:
        return f"from_optax({self.tx!r})"

    def setup(self, model: Any, ties: Ties = ()) -> WholeState:
        """The state for a model."""
        layout, arrays = survey(model, ties)
        for path, x in zip(layout.paths, arrays, strict=True):
            if registry.library(x).NAME != "jax":
                raise BadState(f"{path.code()} is no array of JAX, which is what Optax steps")
        names = map(str, layout.paths)
        return WholeState(self, layout, self.tx.init(dict(zip(names, arrays, strict=True))))
