"""What tests of all engines share: rules by types, models for them, how results are compared, and the worlds
in which one story is told: arrays of which library, stepped by which engine, in place or not.
"""

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.state.leaf import parts
from optimisers.step.update import update_listed
from tests.table import DTYPES, TABLE, Row, numbers

ENGINES = ("interpret", "numba")

STEPS = (opt.update, opt.update_)

both_updates = pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)


COMPLEX_PAIRS = ("Adam", "SignDecay", "ClipNorm-2", "Chain-accumulate-clip-AdamW", "LongestSeen", "RowScaled")
"""Rows of which both kinds of update are tried on complex numbers too."""


def arrays_of(row: Row, dtype: str, seed: int = 0) -> list[Any]:
    """A model of the shapes that a rule takes."""
    rng = np.random.default_rng(seed)
    return [numbers(rng, shape, dtype) for shape in row.shapes()]


def gradients_of(row: Row, dtype: str, steps: int = 7) -> list[list[Any]]:
    return [arrays_of(row, dtype, seed=100 + n) for n in range(steps)]


def bits(a: Any) -> bytes:
    """An array by its bytes: NaN equals itself, 0 does not equal -0."""
    return repr((np.shape(a), str(a.dtype))).encode() + np.ascontiguousarray(a).tobytes()


def leaves(state: Any) -> list[opt.Leaf]:
    """Every leaf of a state, depth first."""
    if isinstance(state, opt.Leaf):
        return [state]
    if not isinstance(state, opt.Branch):
        return []
    children = [state[k] for k in state] if isinstance(next(iter(state), None), str) else list(state)
    return [leaf for child in children for leaf in leaves(child)]


def numbers_in(state: Any) -> list[Any]:
    """Arrays and numbers in the state of one leaf, depth first."""
    if isinstance(state, dict):
        return [x for v in state.values() for x in numbers_in(v)]
    if isinstance(state, tuple):
        return [x for v in state for x in numbers_in(v)]
    return [] if state is None else [state]


def trained(
    rule: Any, model: Any, gradients: Any, step: Callable[..., Any] = opt.update, engine: str | None = None
) -> Any:
    """(state, model) after a step for each of the gradients; the model given is not written."""
    model = copy.deepcopy(model)
    state = opt.setup(rule, model, engine=engine)
    for grads in gradients:
        state, model = step(state, model, grads)
    return state, model


EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "complex64": 2.0**-23}


def close(a: Any, b: Any, dtype: str) -> bool:
    """To one unit of a half store, or a few of the arithmetic, of values of about 1."""
    units = {"float16": 1, "bfloat16": 1}.get(dtype, 16)
    wide = complex if dtype.startswith("complex") else float
    a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
    limit = units * EPS.get(dtype, 2.0**-52) * np.maximum(1, np.abs(b))
    return bool((np.abs(a - b) <= limit).all())


# -- worlds --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """Where a story is told. A story is a function of a world; it makes its arrays with `put` and `model`."""

    library: str
    engine: str | None
    step: Callable[..., Any] = opt.update_
    capturable: bool = False

    def __str__(self) -> str:
        where = f"{self.library}-{self.engine or 'fastest'}-{self.step.__name__}"
        return f"{where}-capturable" if self.capturable else where

    @property
    def writable(self) -> bool:
        """Whether arrays can be written, and so may be views of each other."""
        return self.library != "jax"

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """64 bits for JAX; a stand-in in CuPy's place."""
        if self.library == "jax":
            with importlib.import_module("jax").enable_x64(True):
                yield
        elif self.library == "cupy":
            with importlib.import_module("tests.standin_cupy").in_place():
                yield
        else:
            yield

    def put(self, a: Any) -> Any:
        """A copy of an array of NumPy, or of a nest of them, as arrays of this world."""
        if isinstance(a, dict):
            return {k: self.put(v) for k, v in a.items()}
        if isinstance(a, list):
            return [self.put(v) for v in a]
        return self._put(a) if isinstance(a, np.ndarray) else a

    def _put(self, a: Any) -> Any:
        if self.library == "numpy":
            return np.array(a)
        if self.library == "torch":
            made = importlib.import_module("tests.tensors").tensor(a)
            return made.to(_device()) if self.engine == "triton" else made
        if self.library == "jax":
            return importlib.import_module("jax.numpy").array(a)
        return importlib.import_module("tests.standin_cupy").array(a)

    def get(self, x: Any) -> Any:
        """What stands in a model or a state, as NumPy has it."""
        if self.library == "torch" and hasattr(x, "detach"):
            return importlib.import_module("tests.tensors").array(x.cpu())
        return x.get() if self.library == "cupy" and hasattr(x, "get") else np.array(x)

    def model(self, dtype: str = "float64", seed: int = 0, n: int = 5) -> dict[str, Any]:
        """Leaves a, b, c, ... of one shape, so that they share a group."""
        return self.put(plain_model(dtype, seed, n))

    def setup(self, rule: Any, model: Any) -> Any:
        return opt.setup(rule, model, engine=self.engine, capturable=self.capturable)

    def snapshot(self, state: Any, model: Any) -> Any:
        """All that a step may change, by its bytes."""
        inside = [
            (repr(leaf.rule), leaf.frozen, [bits(self.get(v)) for v in numbers_in(leaf.state)])
            for leaf in leaves(state)
        ]
        store = parts(state)[0]
        clocks = [int(store.clock_of(i)) for i, kind in enumerate(store.shapes) if kind is not None]
        arrays = model.values() if isinstance(model, dict) else model
        return clocks, inside, [bits(self.get(x)) for x in arrays]


def _device() -> str:
    """Where Triton's kernels run here."""
    functions = importlib.import_module("optimisers.engines.cuda.device_functions")
    return "cpu" if functions.INTERPRETED else "cuda"


def plain_model(dtype: str = "float64", seed: int = 0, n: int = 5) -> dict[str, Any]:
    """The arrays of `World.model`, of NumPy."""
    rng = np.random.default_rng(seed)
    return {key: numbers(rng, (5, 3), dtype) for key in "abcdefgh"[:n]}


ENGINES_OF = {
    "numpy": ("interpret", "numba"),
    "torch": ("interpret", "numba", "triton"),
    "jax": (None,),
    "cupy": ("interpret", None),
}
"""Library -> its engines; None for the fastest, where it is not asked for by name."""

WORLDS = [
    World(library, engine, step, capturable)
    for library, engines in ENGINES_OF.items()
    for engine in engines
    for step in (opt.update, opt.update_)
    for capturable in ((False, True) if engine == "triton" else (False,))
]


def _param(world: World) -> Any:
    absent = [n for n in (world.library, world.engine) if n in ("torch", "jax", "triton")]
    missing = [n for n in absent if importlib.util.find_spec(n) is None]
    return pytest.param(world, id=str(world), marks=[pytest.mark.skip(f"no {n} here") for n in missing])


def worlds(*chosen: World) -> Any:
    """A test is run in each of these worlds."""
    return pytest.mark.parametrize("world", [_param(w) for w in chosen])


def by_engine(chosen: list[World]) -> list[list[World]]:
    """The worlds of each engine: they differ in the kind of step, and in where a state has its numbers."""
    found: dict[tuple[Any, ...], list[World]] = {}
    for world in chosen:
        found.setdefault((world.library, world.engine), []).append(world)
    return list(found.values())


def worlds_with(name: str, values: dict[str, Any], *turns: list[World]) -> Any:
    """A test is run for every value and each list of worlds, which take turns. Where a list holds the worlds
    of one engine, each value meets each engine, and by one or the other each kind of step.
    """
    cases = []
    for (i, taking), (j, (title, value)) in itertools.product(enumerate(turns), enumerate(values.items())):
        world = _param(taking[(i + j) % len(taking)])
        cases.append(pytest.param(*world.values, value, id=f"{world.id}-{title}", marks=world.marks))
    return pytest.mark.parametrize(("world", name), cases)


def rows_by_turns(*engines: str | None) -> Any:
    """Every row by each engine: in single precision, and in one other type that it takes, by turns. What a
    rule computes is one graph, whatever the type; types differ in how values are read, computed and written,
    and each is met by many rows.
    """
    cases = []
    for (i, row), (j, engine) in itertools.product(enumerate(TABLE), enumerate(engines)):
        others = [dtype for dtype in DTYPES if row.takes(dtype) and dtype != row.single]
        chosen = {row.single, *others[(i + 2 * j) % len(others) :][:1]} if others else {row.single}
        chosen |= {"complex64"} if row.name in COMPLEX_PAIRS else set()
        cases += [
            pytest.param(row, dtype, engine, id=f"{row.name}-{dtype}-{engine or 'fastest'}")
            for dtype in sorted(chosen)
        ]
    return pytest.mark.parametrize(("row", "dtype", "engine"), cases)


Story = Callable[[World], tuple[Any, Any]]


def same_story(story: Story, world: World, dtype: str = "float64") -> None:
    """A story ends as it does for arrays of NumPy by the interpreter: float64 to 1e-12, the others as near as
    engines are to each other.
    """
    plain = World("numpy", "interpret", world.step)
    with np.errstate(all="ignore"):
        state, expected = story(plain)
    with world.open():
        got, model = story(world)
        assert [*model] == [*expected]
        for k, wanted in expected.items():
            assert_near(world.get(model[k]), wanted, dtype)
        for leaf, like in zip(leaves(got), leaves(state), strict=True):
            assert (repr(leaf.rule), leaf.frozen) == (repr(like.rule), like.frozen)
            for a, b in zip(numbers_in(leaf.state), numbers_in(like.state), strict=True):
                assert_near(world.get(a), plain.get(b), "float32")
        assert int(opt.explain(got).clock) == opt.explain(state).clock


def assert_near(a: Any, b: Any, dtype: str) -> None:
    """Two arrays of two engines, NaN where NaN is."""
    assert a.dtype == b.dtype
    if b.dtype == np.float64:
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    else:
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        assert close(np.nan_to_num(a), np.nan_to_num(b), dtype), (a, b)


RULES = {
    "Momentum": opt.Momentum(0.1, 0.5),
    "AdamW": opt.AdamW(0.1),
    "accumulated": opt.Chain(opt.AccumGrad(2), opt.Momentum(0.1, 0.5)),
    "clipped": opt.Chain(opt.ClipGlobalNorm(0.5), opt.ClipNorm(0.4), opt.AdamW(0.1)),
    "skipping": opt.SkipNonFinite(opt.Chain(opt.AccumGrad(2), opt.Adam(0.1))),
    "averaged": opt.EMA(opt.Chain(opt.AccumGrad(2), opt.ClipNorm(0.5), opt.Adam(0.05)), 0.75),
}
"""What stories are told of: rules with counters, conditions, totals and averages."""

SCHEDULES = {
    "Linear": opt.Linear(0.1, 0.3, 4),
    "Cosine": opt.Cosine(0.3, 4, warmup=1),
    "Exponential": opt.Exponential(0.1, 0.5, 2),
}


def with_none(grads: dict[str, Any], without: str) -> dict[str, Any]:
    return {key: None if key in without else g for key, g in grads.items()}


def step_scaled(state: Any, model: dict[str, Any], grads: dict[str, Any], scaling: tuple[Any, Any]) -> None:
    """A step in place by scaled gradients; `scaling` is (the factor, whether something was found)."""
    store = parts(state)[0]
    update_listed(store, store.layout.root, [*model.values()], [[grads[k] for k in model]], scaling)
