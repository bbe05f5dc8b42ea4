"""Whatever is done to whatever model, in whatever order, the package agrees with `reference.py`."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import optimisers as opt
from tests.reference import Entry, Path, Reference

# -- models --------------------------------------------------------------------------------------------------


class Two(NamedTuple):
    """A named tuple of two children."""

    left: Any
    right: Any


@dataclasses.dataclass
class Layer:
    """A dataclass of two children."""

    w: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A frozen dataclass with a child that no constructor sets."""

    w: Any
    note: str = "kept"
    again: Any = dataclasses.field(init=False, default=None)


@attrs.define
class Block:
    """An attrs class of two children."""

    first: Any
    second: Any


def function(x: Any) -> Any:
    """Something in a model that does not train."""
    return x


OTHERS: list[Any] = ["text", 3, None, function, True, np.arange(3), np.array([True, False]), (), {}, []]
"""What a model may hold besides parameters."""

SHAPES: list[tuple[int, ...]] = [(3,), (2, 3), (3, 3), (), (0, 2), (1, 4), (2, 1, 2), (17,)]

LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "C": lambda x: x,
    "F": lambda x: np.asfortranarray(x) if x.ndim > 1 else x,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x,
    "backwards": lambda x: x[::-1].copy()[::-1] if x.ndim else x,
    "permuted": lambda x: np.ascontiguousarray(x.transpose()).transpose(),
    "read-only": lambda x: fixed(x),  # noqa: PLW0108 defined below
}


def fixed(x: Any) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


@dataclasses.dataclass(frozen=True)
class Place:
    """A leaf of a drawn model: a new array, or one met before, as it is, viewed, or transposed."""

    array: int
    how: str


class Drawing:
    """Makes models; remembers the arrays it made, so that some may be tied."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw
        self.arrays: list[Any] = []
        self.rng = np.random.default_rng(draw(st.integers(0, 1000)))

    def tree(self, depth: int) -> Any:
        kinds = ["array", "array", "tie", "other"] + ["container"] * (3 * (depth > 0))
        kind = self.draw(st.sampled_from(kinds)) if depth < 3 else "container"
        if kind == "container":
            return self.container(depth)
        if kind == "other":
            return self.draw(st.sampled_from(OTHERS))
        if kind == "tie" and self.arrays:
            n = self.draw(st.integers(0, len(self.arrays) - 1))
            writable = self.arrays[n].flags.writeable and self.arrays[n].size > 0
            return Place(
                n, self.draw(st.sampled_from(["same", "view", "transposed"] if writable else ["same"]))
            )
        return self.array()

    def array(self) -> Place:
        x = np.asarray(self.rng.standard_normal(self.draw(st.sampled_from(SHAPES))))
        self.arrays.append(LAYOUTS[self.draw(st.sampled_from(list(LAYOUTS)))](x))
        return Place(len(self.arrays) - 1, "same")

    def container(self, depth: int) -> Any:
        build: list[Callable[..., Any]] = [
            lambda *v: dict(zip(("a", "b", 3), v, strict=False)),
            lambda *v: list(v),
            lambda *v: tuple(v),
            lambda *v: Two(*v[:2]),
            lambda *v: Layer(*v[:2]),
            lambda *v: Fixed(v[0]),
            lambda *v: Block(*v[:2]),
        ]
        children = [self.tree(depth - 1) for _ in range(self.draw(st.integers(2, 3)))]
        return self.draw(st.sampled_from(build))(*children)


def children(tree: Any) -> list[tuple[Any, Any]]:
    """The keys and children of a container; none for anything else."""
    if isinstance(tree, (Place, type)):
        return []
    if isinstance(tree, dict):
        return list(tree.items())
    if hasattr(tree, "_fields"):
        return [(k, getattr(tree, k)) for k in tree._fields]
    if isinstance(tree, list | tuple):
        return list(enumerate(tree))
    if dataclasses.is_dataclass(tree):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    return (
        [(a.name, getattr(tree, a.name)) for a in attrs.fields(type(tree))] if attrs.has(type(tree)) else []
    )


def mapped(tree: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """A tree with everything that is no container replaced; written for the test, apart from the package."""
    inner = children(tree)
    if not inner:
        return change(path, tree)
    new = [mapped(v, change, (*path, k)) for k, v in inner]
    if isinstance(tree, dict):
        return dict(zip(tree, new, strict=True))
    if isinstance(tree, list):
        return new
    if isinstance(tree, tuple):
        return type(tree)(*new) if hasattr(tree, "_fields") else tuple(new)
    if isinstance(tree, Fixed):
        return Fixed(new[0])
    return type(tree)(*new)


def places(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Place]]:
    """The places of a drawn model, in order."""
    if isinstance(tree, Place):
        yield path, tree
    for k, v in children(tree):
        yield from places(v, (*path, k))


def inside(tree: Any, path: Path) -> Any:
    """What stands at a path of a model, or of a state."""
    for key in path:
        tree = getattr(tree, key) if isinstance(key, str) and not isinstance(tree, dict) else tree[key]
    return tree


# -- rules ---------------------------------------------------------------------------------------------------


def falling(clock: Any) -> Any:
    """A schedule."""
    return 0.2 / (1 + clock)


RULES: dict[str, tuple[Callable[..., opt.Rule], dict[str, Any]]] = {
    "momentum": (opt.Momentum, {"eta": 0.1, "rho": 0.7}),
    "adam": (opt.Adam, {"eta": falling, "beta": (0.8, 0.9), "epsilon": 1e-3}),
    "accumulate": (
        lambda n, eta, lam: opt.Chain(opt.AccumGrad(n), opt.WeightDecay(lam), opt.Momentum(eta, 0.5)),
        {"n": 2, "eta": 0.1, "lam": 0.1},
    ),
    "clip": (opt.Nesterov, {"eta": 0.1, "rho": 0.5, "omega": 1.0}),
}


def given_to_setup(kind: str) -> opt.Rule:
    """The rule as a user writes it: the global norm in a chain."""
    make, hypers = RULES[kind]
    rule = make(**{k: v for k, v in hypers.items() if k != "omega"})
    return opt.Chain(opt.ClipGlobalNorm(hypers["omega"]), rule) if "omega" in hypers else rule


# -- one run -------------------------------------------------------------------------------------------------


class Run:
    """A model, its state and the reference, going through the same operations."""

    def __init__(self, draw: Callable[..., Any], engine: str) -> None:
        self.draw = draw
        self.kept: list[tuple[Any, Any, Reference]] = []
        drawing = Drawing(draw)
        tree = drawing.container(3)
        if not list(places(tree)):
            tree = [tree, drawing.array()]
        arrays = drawing.arrays
        views = {"same": lambda x: x, "view": lambda x: x[...], "transposed": lambda x: x.T}
        self.model = mapped(tree, lambda _, v: views[v.how](arrays[v.array]) if isinstance(v, Place) else v)
        self.tree = tree
        found = list(places(tree))
        kinds = [draw(st.sampled_from(list(RULES))) for _ in arrays]
        entries: dict[int, Entry] = {}
        turned: dict[Path, bool] = {}
        first: dict[int, bool] = {}
        for path, place in found:
            is_turned = place.how == "transposed" and arrays[place.array].ndim > 1
            if place.array not in entries:
                make, hypers = RULES[kinds[place.array]]
                entries[place.array] = Entry(np.array(inside(self.model, path)), make, dict(hypers))
                first[place.array] = is_turned
            turned[path] = is_turned != first[place.array]
        number = {n: i for i, n in enumerate(entries)}
        self.reference = Reference(
            {p: (number[v.array], turned[p]) for p, v in found}, list(entries.values())
        )
        kind_of = {".".join(map(str, p)): kinds[v.array] for p, v in reversed(found)}
        self.state = opt.setup(lambda path, _: given_to_setup(kind_of[str(path)]), self.model, engine=engine)

    # -- gradients --

    def gradients(self, tree: Any, path: Path = ()) -> tuple[Any, dict[Path, Any]]:
        """(gradients for a part of the model, the same as a table); some are None, some branches too."""
        rng = np.random.default_rng(self.draw(st.integers(0, 1000)))
        missing = self.draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
        table: dict[Path, Any] = {}
        shared: dict[tuple[int, bool], Any] = {}
        share = self.draw(st.booleans())

        def gradient(below: Path, v: Any) -> Any:
            if not isinstance(v, Place):
                return None
            full = (*path, *below)
            g = None if rng.random() < missing else rng.standard_normal(np.shape(self.reference.at(full)))
            g = g if g is None else np.asarray(g)
            if share and g is not None:
                g = shared.setdefault(self.reference.places[full], g)
            table[full] = g
            return g

        grads = mapped(tree, gradient)
        if self.draw(st.booleans()):
            grads = pruned(grads)
        return grads, table

    def duplicate(self) -> Any:
        """The model with arrays of its own, tied as they were."""
        copies: dict[int, Any] = {}

        def twin(path: Path, v: Any) -> Any:
            if path not in self.reference.places:
                return v
            n, turned = self.reference.places[path]
            if n not in copies:
                copies[n] = np.array(v, order="K")
                copies[n].flags.writeable = v.flags.writeable
            return copies[n].T if turned else copies[n]

        return mapped(self.model, twin)

    # -- operations --

    def node(self) -> Path:
        """The path of something below which there are parameters."""
        paths = {p[:n] for p in self.reference.places for n in range(len(p) + 1)}
        return self.draw(st.sampled_from(sorted(paths, key=repr)))

    def update_in_place(self) -> None:
        grads, table = self.gradients(self.tree)
        self.state, self.model = opt.update_(self.state, self.model, grads)
        self.reference.update(table)

    def update_purely(self) -> None:
        """The old state and model stay what they were, whatever is done with the new ones; see the end."""
        old = self.state, self.model, self.reference.copy()
        grads, table = self.gradients(self.tree)
        self.state, self.model = opt.update(self.state, self.model, grads)
        self.reference.update(table)
        self.compare()
        self.model = self.duplicate()  # what took no step is shared with the old model, and is written next
        self.update_in_place()
        self.compare()
        self.kept.append(old)

    def update_part(self) -> None:
        path = self.node()
        if path in self.reference.places and self.reference.places[path][1]:
            return  # the Leaf of a tie speaks for its first place
        if any(not inside(self.model, p).flags.writeable for p in self.reference.places):
            return  # a part with such an array comes back as another object
        grads, table = self.gradients(inside(self.tree, path), path)
        opt.update_(inside(self.state, path), inside(self.model, path), grads)
        self.reference.update(table, path)

    def freeze(self) -> None:
        path = self.node()
        opt.freeze_(inside(self.state, path))
        self.reference.freeze(path, frozen=True)

    def thaw(self) -> None:
        path = self.node()
        opt.thaw_(inside(self.state, path))
        self.reference.freeze(path, frozen=False)

    def adjust(self) -> None:
        path = self.node()
        known = set().union(*(self.reference.entries[n].settings for n in self.reference.below(path)))
        changes = {"eta": 0.03, "rho": 0.25, "beta": (0.5, 0.6), "omega": 0.5, "lam": 0.3, "n": 3}
        changes["eta"] = self.draw(st.sampled_from([0.03, 0.3, falling]))
        chosen = self.draw(st.sets(st.sampled_from(sorted(known)), min_size=1)) - {"epsilon"}
        if chosen:
            opt.adjust_(inside(self.state, path), **{k: changes[k] for k in sorted(chosen)})
            self.reference.adjust(path, **{k: changes[k] for k in chosen})
            if (
                "rho" in chosen
            ):  # the momentum behind an accumulation has a rho too, which the reference fixes
                self.give_back_rho(path)

    def give_back_rho(self, path: Path) -> None:
        numbers = {n for n in self.reference.below(path) if "n" in self.reference.entries[n].settings}
        for p, (n, _) in self.reference.places.items():
            if n in numbers:
                opt.adjust_(inside(self.state, p), rho=0.5)

    def fork(self) -> None:
        """`adjust` and `freeze` without underscore leave the old state alone; a predicate sees first
        places.
        """
        path = self.draw(st.sampled_from([self.first_path(n) for n in range(len(self.reference.entries))]))
        path = path[: self.draw(st.integers(0, len(path)))]
        old = self.state
        new = opt.freeze(opt.adjust(old, 0.5), where=lambda p, _: tuple(p)[: len(path)] == path)
        self.compare(old)
        self.state = new
        self.reference.adjust((), eta=0.5)
        for p, (n, _) in self.reference.places.items():
            if self.first_path(n)[: len(path)] == path:
                self.reference.freeze(p, frozen=True)

    def first_path(self, entry: int) -> Path:
        return next(p for p, (n, _) in self.reference.places.items() if n == entry)

    def pickled(self) -> None:
        self.state = pickle.loads(pickle.dumps(self.state))

    def copied(self) -> None:
        old = self.state, self.model, self.reference.copy()
        self.state, self.model = copy.deepcopy(self.state), self.duplicate()
        self.update_in_place()
        self.compare(*old)

    def shallow(self) -> None:
        self.state = copy.copy(self.state)

    # -- comparison --

    def compare(self, state: Any = None, model: Any = None, reference: Reference | None = None) -> None:
        """Everything that can be seen equals the reference: parameters, state, settings, frozen flags, clock,
        ties.
        """
        state = self.state if state is None else state
        model = self.model if model is None else model
        reference = self.reference if reference is None else reference
        seen: dict[int, Any] = {}
        for path, (n, _) in reference.places.items():
            entry = reference.entries[n]
            x = inside(model, path)
            np.testing.assert_allclose(x, reference.at(path), rtol=1e-9, atol=1e-11, err_msg=repr(path))
            leaf = inside(state, path)
            inner = leaf.state[1] if "omega" in entry.settings else leaf.state
            for got, wanted in zip(numbers(inner), numbers(entry.state), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-11, err_msg=repr(path))
            assert leaf.frozen == entry.frozen
            settings_match(leaf.rule, entry)
            first = seen.setdefault(n, x)
            assert x.size == 0 or np.shares_memory(first, x), f"the tie at {path} is cut"
            assert x.flags.writeable == first.flags.writeable
        assert opt.explain(state).clock == max(entry.clock for entry in reference.entries)

    def others_are_kept(self) -> None:
        """What does not train is the same object as at the beginning; containers keep their types."""

        def check(path: Path, v: Any) -> Any:
            if not isinstance(v, Place) and not isinstance(v, np.ndarray):
                assert inside(self.model, path) is v or inside(self.model, path) == v
            return v

        mapped(self.tree, check)
        assert type(self.model) is type(self.tree)


def pruned(grads: Any) -> Any:
    """None for every container of nothing but None; other containers by another kind that may stand for
    them.
    """
    inner = children(grads)
    if not inner:
        return grads
    new = {k: pruned(v) for k, v in inner}
    if all(v is None for v in new.values()):
        return None
    return list(new.values()) if isinstance(grads, list | tuple) and not hasattr(grads, "_fields") else new


def numbers(state: Any) -> list[Any]:
    """Arrays and numbers in a state, depth first."""
    if isinstance(state, tuple):
        return [x for v in state for x in numbers(v)]
    return [state]


def settings_match(rule: Any, entry: Entry) -> None:
    """Every setting of the reference is the same in the rule, wherever it stands."""
    rules = rule.rules if isinstance(rule, opt.Chain) else (rule,)
    for name, value in entry.settings.items():
        held = [getattr(r, name) for r in rules if hasattr(r, name)]
        assert held == [value] * len(held), name
        assert held, name


OPERATIONS = {
    "update_": Run.update_in_place,
    "update": Run.update_purely,
    "update_ a part": Run.update_part,
    "freeze_": Run.freeze,
    "thaw_": Run.thaw,
    "adjust_": Run.adjust,
    "adjust and freeze": Run.fork,
    "pickle": Run.pickled,
    "deepcopy": Run.copied,
    "copy": Run.shallow,
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["interpret", "numba"])
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(data=st.data())
def test_every_sequence_of_operations_agrees_with_the_reference(engine: str, data: st.DataObject) -> None:
    run = Run(data.draw, engine)
    run.compare()
    names = data.draw(st.lists(st.sampled_from(["update_", *OPERATIONS]), min_size=2, max_size=7))
    for name in names:
        OPERATIONS[name](run)
        run.compare()
    for old in run.kept:
        run.compare(*old)
    run.others_are_kept()


@pytest.mark.parametrize("engine", ["interpret", "numba"])
@pytest.mark.parametrize(
    "copied",
    [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
def test_a_copied_state_and_its_original_are_stepped_apart(copied: Callable[[Any], Any], engine: str) -> None:
    x = np.zeros(3)
    state = opt.setup(opt.Momentum(1.0, 0.5), x, engine=engine)
    for _ in range(2):
        state, x = opt.update_(state, x, np.ones(3))
    other, y = copied(state), x.copy()
    opt.update_(other, y, np.full(3, 4.0))
    opt.update_(state, x, np.zeros(3))
    np.testing.assert_array_equal(other.state.v, 0.75 + 4)
    np.testing.assert_array_equal(state.state.v, 0.75)
    np.testing.assert_array_equal(y, -2.5 - 4.75)
    np.testing.assert_array_equal(x, -2.5 - 0.75)
