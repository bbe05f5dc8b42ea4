"""Every edit in every mode, against a plain model of what it means.

The model is a dict of numbers. Rates, gradients and state are short binary fractions, so every type of float
holds them exactly and nothing here needs a tolerance.
"""

import copy
import dataclasses
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import optimisers as opt
from optimisers.state.leaf import parts


class Counted(opt.Rule):
    """Momentum whose step grows with a counter."""

    eta: float = 0.5
    lam: float = 0.25

    def init(self, x: Any) -> Any:
        return {"v": opt.zeros_like(x), "n": 0}

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        v, n = 0.5 * state["v"] + dx, state["n"] + 1
        return {"v": v, "n": n}, self.eta * v + self.lam * n


class Renamed(Counted):
    """Another rule with the same form of state, which steps twice as far."""

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        state, dx = Counted.apply(self, state, x, dx)
        return state, 2 * dx


PATHS = ("net.a", "net.b", "c")
SIZES = {"net.a": 2, "net.b": 3, "c": 4}


# -- the plain model -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    """What one leaf is, in numbers."""

    x: float = 1.0
    v: float = 0.0
    n: int = 0
    eta: float = 0.5
    lam: float = 0.25
    far: int = 1
    frozen: bool = False
    clock: int = 0

    def step(self, g: float | None) -> None:
        self.clock += 1
        if self.frozen or g is None:
            return
        self.v, self.n = 0.5 * self.v + g, self.n + 1
        self.x -= self.far * (self.eta * self.v + self.lam * self.n)


Model = dict[str, Plain]


# -- modes ---------------------------------------------------------------------------------------------------


class Mode:
    """A library, and who steps."""

    library = "numpy"
    replaces = False
    options: dict[str, Any] = {}  # noqa: RUF012

    def array(self, n: int, value: float) -> Any:
        return np.full(n, value)

    def model(self) -> Any:
        a, b, c = (self.array(SIZES[p], 1.0) for p in PATHS)
        return {"net": {"a": a, "b": b}, "c": c}

    def setup(self, model: Any) -> Any:
        return opt.setup(Counted(), model, **self.options)

    def step(self, state: Any, model: Any, g: Any, *, pure: bool) -> Any:
        return (opt.update if pure else opt.update_)(state, model, g)


class Interpreted(Mode):
    options = {"engine": "interpret"}  # noqa: RUF012


class Torch(Mode):
    library = "torch"

    def array(self, n: int, value: float) -> Any:
        torch = importlib.import_module("torch")
        return torch.full((n,), value, dtype=torch.float64)


class Captured(Torch):
    """Scalars on the device, kernels of Triton."""

    library = "triton"

    def __init__(self) -> None:
        functions = importlib.import_module("optimisers.engines.cuda.device_functions")
        self.device = "cpu" if functions.INTERPRETED else "cuda"
        self.options = {"engine": "triton", "capturable": True}

    def array(self, n: int, value: float) -> Any:
        return Torch.array(self, n, value).to(self.device)


class Jax(Mode):
    library = "jax"
    replaces = True

    def array(self, n: int, value: float) -> Any:
        return importlib.import_module("jax").numpy.full(n, value)


class Jitted(Jax):
    def step(self, state: Any, model: Any, g: Any, *, pure: bool) -> Any:
        return importlib.import_module("jax").jit(opt.update)(state, model, g)


MODES = {c.__name__.lower(): c for c in (Mode, Interpreted, Torch, Captured, Jax, Jitted)}


def made(name: str) -> Mode:
    pytest.importorskip(MODES[name].library)
    return MODES[name]()


def at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def seen(state: Any, model: Any) -> dict[str, Any]:
    """What stands in a state and a model, as the plain model says it."""
    found: dict[str, Any] = {}
    for path in PATHS:
        leaf, x = at(state, path), np.asarray(at(model, path).tolist())
        v = np.asarray(leaf.state["v"].tolist())
        assert (x == x[0]).all()
        assert (v == v[0]).all()
        store, node, _ = parts(leaf)
        far = 2 if isinstance(leaf.rule, Renamed) else 1
        clock = int(store.clock_of(node.leaf))
        rule = leaf.rule
        found[path] = Plain(x[0], v[0], leaf.state["n"], rule.eta, rule.lam, far, leaf.frozen, clock)
    return found


def gradients(mode: Mode, values: dict[str, float | None]) -> Any:
    a, b, c = (None if values[p] is None else mode.array(SIZES[p], values[p]) for p in PATHS)  # type: ignore[arg-type]
    return {"net": {"a": a, "b": b}, "c": c}


class Run:
    """A state beside its plain model."""

    def __init__(self, mode: Mode) -> None:
        self.mode, self.model = mode, mode.model()
        self.state = mode.setup(self.model)
        self.plain: Model = {p: Plain() for p in PATHS}

    def step(self, *values: float | None, pure: bool = True, part: str = "") -> None:
        given = dict(zip(PATHS, values, strict=True))
        state, model, g = self.state, self.model, gradients(self.mode, given)
        if part:
            state, model, g = state[part], model[part], g[part]
        new, out = self.mode.step(state, model, g, pure=pure)
        if not part:
            self.state, self.model = new, out
        else:
            self.model = {**self.model, part: out}
            if pure or isinstance(self.mode, Jitted):
                self.state = whole_of(self.state, new)
        for path, value in given.items():
            if not part or path.split(".")[0] == part:
                self.plain[path].step(value)

    def check(self) -> None:
        assert seen(self.state, self.model) == self.plain


def whole_of(state: Any, part: Any) -> Any:
    """The whole tree over the store of a part."""
    from optimisers.state.leaf import handle

    _, node, path = parts(state)
    return handle(parts(part)[0], node, path)


# -- edits ---------------------------------------------------------------------------------------------------

WHERE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "everything": (None, PATHS),
    "a glob": ("net.*", PATHS[:2]),
    "one path": ("c", PATHS[2:]),
    "a path": (opt.KeyPath("net", "b"), PATHS[1:2]),
    "a function": (lambda path, _: "b" in str(path), PATHS[1:2]),
    "a rule": (Counted, PATHS),
    "a list": (["c", "net.a"], (PATHS[0], PATHS[2])),
}


def put(model: Model, leaves: tuple[str, ...], **values: Any) -> None:
    for path in leaves:
        vars(model[path]).update(values)


PURE: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "adjust": (
        lambda s, w: opt.adjust(s, 0.125, where=w),
        lambda s, w: opt.adjust_(s, 0.125, where=w),
        {"eta": 0.125},
    ),
    "adjust another": (
        lambda s, w: opt.adjust(s, lam=0.5, where=w),
        lambda s, w: opt.adjust_(s, lam=0.5, where=w),
        {"lam": 0.5},
    ),
    "freeze": (opt.freeze, opt.freeze_, {"frozen": True}),
    "thaw": (opt.thaw, opt.thaw_, {"frozen": False}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pure", [True, False], ids=["pure", "in place"])
@pytest.mark.parametrize("edit", PURE)
@pytest.mark.parametrize("where", WHERE)
def test_an_edit_means_the_same_in_every_mode(mode: str, edit: str, where: str, pure: bool) -> None:
    run = Run(made(mode))
    run.step(1, 2, -1, pure=pure)
    run.check()
    if edit == "thaw":
        opt.freeze_(run.state)
        put(run.plain, PATHS, frozen=True)
        run.step(1, 1, 1, pure=pure)
    new, inplace, values = PURE[edit]
    selector, leaves = WHERE[where]
    before, old, state = seen(run.state, run.model), run.model, run.state
    kept = copy.deepcopy(old)
    if pure:
        run.state = new(run.state, selector)
        assert seen(state, old) == before
    else:
        inplace(run.state, selector)
    put(run.plain, leaves, **values)
    run.check()
    run.step(2, None, 1, pure=pure)
    run.step(-1, 1, 1, pure=pure)
    run.check()
    if pure:
        assert seen(state, kept) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pure", [True, False], ids=["pure", "in place"])
@pytest.mark.parametrize("edit", PURE)
def test_an_edit_of_a_part_leaves_the_rest(mode: str, edit: str, pure: bool) -> None:
    run = Run(made(mode))
    new, inplace, values = PURE[edit]
    run.step(1, 2, -1)
    if pure:
        run.state = whole_of(run.state, new(run.state["net"], None))
    else:
        inplace(run.state["net"], None)
    put(run.plain, PATHS[:2], **values)
    run.check()
    run.step(1, 1, 1, part="net", pure=pure)
    run.step(1, 1, 1, pure=pure)
    run.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["", "net", "c"])
def test_hyperparameters_as_numbers(mode: str, part: str) -> None:
    """What the step uses, what the rule says and what a later edit keeps are one."""
    run = Run(made(mode))
    run.step(1, 2, -1)
    old = run.state
    inside = tuple(p for p in PATHS if p.split(".")[0] == part or not part)
    new = opt.with_hyperparameters(run.state[part] if part else run.state, {"eta": 0.125})
    run.state = whole_of(run.state, new)
    before = copy.deepcopy(run.plain)
    put(run.plain, inside, eta=0.125)
    run.check()
    assert float(opt.hyperparameters(at(run.state, inside[0]))["eta"]) == 0.125
    run.step(1, 1, 1)
    opt.adjust_(run.state, lam=0.5)
    put(run.plain, PATHS, lam=0.5)
    run.step(1, 1, 1)
    run.check()
    assert [at(old, p).rule.eta for p in PATHS] == [before[p].eta for p in PATHS]


@pytest.mark.parametrize("mode", MODES)
def test_leaves_are_assigned_to(mode: str) -> None:
    run = Run(made(mode))
    run.step(1, 2, -1)
    leaf = run.state["net"]["b"]
    leaf.state = {"v": run.mode.array(3, 0.75), "n": 4}
    put(run.plain, ("net.b",), v=0.75, n=4)
    run.check()
    run.state["c"].rule = Counted(0.125, 0.5)
    put(run.plain, ("c",), eta=0.125, lam=0.5)
    run.check()
    run.state["net"]["a"].frozen = True
    put(run.plain, ("net.a",), frozen=True)
    run.step(1, 1, 1)
    run.check()
    run.state["net"]["b"].rule = Renamed(0.25, 0.25)
    put(run.plain, ("net.b",), eta=0.25, lam=0.25, far=2)
    run.check()
    run.step(1, 1, 1)
    run.check()


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", COPIES)
def test_copies_and_pickles_are_edited_apart(mode: str, way: str) -> None:
    run = Run(made(mode))
    run.step(1, 2, -1)
    opt.adjust_(run.state["c"], 0.125)
    opt.freeze_(run.state["net"]["a"])
    put(run.plain, ("c",), eta=0.125)
    put(run.plain, ("net.a",), frozen=True)
    before, model = copy.deepcopy(run.plain), copy.deepcopy(run.model)
    old, run.state = run.state, COPIES[way](run.state)
    run.check()
    run.state["net"]["b"].state = {"v": run.mode.array(3, 0.5), "n": 7}
    put(run.plain, ("net.b",), v=0.5, n=7)
    opt.adjust_(run.state, lam=0.5)
    put(run.plain, PATHS, lam=0.5)
    opt.thaw_(run.state)
    put(run.plain, PATHS, frozen=False)
    run.step(1, 1, 1)
    run.check()
    assert seen(old, model) == before


def test_flax_loads_what_was_edited() -> None:
    serialization = pytest.importorskip("flax.serialization")
    run = Run(made("jax"))
    run.step(1, 2, -1)
    opt.adjust_(run.state["c"], 0.125)
    run.state["net"]["b"].state = {"v": run.mode.array(3, 0.5), "n": 7}
    put(run.plain, ("c",), eta=0.125)
    put(run.plain, ("net.b",), v=0.5, n=7)
    run.step(1, 1, 1)
    saved = serialization.to_state_dict(run.state)
    target = opt.adjust(opt.with_hyperparameters(run.state, {"lam": 1.0}), 0.75)
    run.state = serialization.from_state_dict(target, saved)
    run.check()
    run.step(1, 1, 1)
    run.check()


@pytest.mark.parametrize("capturable", [False, True], ids=["host", "captured"])
def test_the_adapter_of_torch_loads_what_was_edited(capturable: bool) -> None:
    torch = pytest.importorskip("torch")
    mode: Any = made("captured" if capturable else "torch")
    plain = {p: Plain() for p in PATHS}

    def fresh() -> tuple[dict[str, Any], Any]:
        named = {p: torch.nn.Parameter(mode.array(SIZES[p], 1.0)) for p in PATHS}
        return named, opt.TorchOptimizer(list(named.items()), Counted(), **mode.options)

    def step(named: dict[str, Any], optimizer: Any, *values: float) -> None:
        for (path, p), g in zip(named.items(), values, strict=True):
            p.grad = torch.full_like(p, g)
            plain[path].step(g)
        optimizer.step()

    def same(named: dict[str, Any], optimizer: Any) -> None:
        for path, p in named.items():
            leaf, want = optimizer.tree[path], plain[path]
            assert set(p.tolist()) == {want.x}
            assert (leaf.state["v"].tolist()[0], leaf.state["n"]) == (want.v, want.n)
            assert (leaf.rule.eta, leaf.rule.lam, leaf.frozen) == (want.eta, want.lam, want.frozen)
            assert int(optimizer.state_dict()["state"][list(named).index(path)]["step"]) == want.clock

    named, optimizer = fresh()
    step(named, optimizer, 1, 2, -1)
    opt.adjust_(optimizer.tree["c"], 0.125)
    opt.freeze_(optimizer.tree["net.a"])
    put(plain, ("c",), eta=0.125)
    put(plain, ("net.a",), frozen=True)
    step(named, optimizer, 1, 1, 1)
    same(named, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    other, loaded = fresh()
    for path, p in other.items():
        p.data.copy_(named[path].data)
    loaded.load_state_dict(saved)
    same(other, loaded)
    opt.thaw_(loaded.tree)
    put(plain, PATHS, frozen=False)
    loaded.param_groups[0]["lam"] = 0.5
    loaded.param_groups[0]["weight_decay"] = 0.5
    put(plain, PATHS, lam=0.5)
    step(other, loaded, 1, -1, 2)
    same(other, loaded)


# -- traced --------------------------------------------------------------------------------------------------


def value_after(eta: float, steps: int = 2, leaves: tuple[str, ...] = PATHS) -> dict[str, float]:
    """The plain parameters after an edit of eta and some steps with gradients of 1."""
    plain = {p: Plain() for p in PATHS}
    put(plain, leaves, eta=eta)
    for _ in range(steps):
        for leaf in plain.values():
            leaf.step(1)
    return {p: leaf.x for p, leaf in plain.items()}


TRACED: dict[str, Callable[[Any, Any, tuple[str, ...]], Any]] = {
    "adjust": lambda state, eta, _: opt.adjust(state, eta),
    "adjust a part": lambda state, eta, _: whole_of(state, opt.adjust(state["net"], eta)),
    "adjust by a glob": lambda state, eta, _: opt.adjust(state, eta, where="net.*"),
    "with_hyperparameters": lambda state, eta, _: opt.with_hyperparameters(state, {"eta": eta}),
    "with_hyperparameters of a part": lambda state, eta, _: whole_of(
        state, opt.with_hyperparameters(state["net"], {"eta": eta})
    ),
}


def stepped_by(mode: Mode, edit: str, eta: Any, state: Any = None) -> Any:
    model = mode.model()
    state = TRACED[edit](mode.setup(model) if state is None else state, eta, PATHS)
    for _ in range(2):
        state, model = opt.update(state, model, gradients(mode, dict.fromkeys(PATHS, 1.0)))
    return model


def leaves_edited(edit: str) -> tuple[str, ...]:
    return PATHS[:2] if "part" in edit or "glob" in edit else PATHS


@pytest.mark.slow
@pytest.mark.parametrize("edit", TRACED)
@pytest.mark.parametrize("inside", [True, False], ids=["set up inside", "set up outside"])
def test_jax_traces_edits(edit: str, inside: bool) -> None:
    jax = pytest.importorskip("jax")
    mode = made("jax")
    state = None if inside else mode.setup(mode.model())
    run = lambda eta: stepped_by(mode, edit, eta, state)  # noqa: E731
    edited = leaves_edited(edit)

    out = jax.jit(run)(0.125)
    assert {p: float(at(out, p)[0]) for p in PATHS} == value_after(0.125, leaves=edited)

    many = jax.vmap(run)(jax.numpy.array([0.125, 0.75]))
    for i, eta in enumerate((0.125, 0.75)):
        found = {p: float(at(many, p)[i][0]) for p in PATHS}
        assert found == value_after(eta, leaves=edited)

    # The parameters are linear in eta, so a difference is the derivative.
    slope = jax.grad(lambda eta: sum(x[0] for x in jax.tree.leaves(run(eta))))(0.25)
    low, high = (sum(value_after(eta, leaves=edited).values()) for eta in (0.0, 1.0))
    assert float(slope) == high - low
    if state is not None:
        assert {at(state, p).rule.eta for p in PATHS} == {0.5}


@pytest.mark.parametrize("edit", TRACED)
@pytest.mark.parametrize("inside", [True, False], ids=["set up inside", "set up outside"])
def test_torch_traces_edits(edit: str, inside: bool) -> None:
    torch = pytest.importorskip("torch")
    mode = made("torch")
    state = None if inside else mode.setup(mode.model())
    edited = leaves_edited(edit)

    def total(eta: Any) -> Any:
        out = stepped_by(mode, edit, eta, state)
        return sum(at(out, p)[0] for p in PATHS)

    slope, value = torch.func.grad_and_value(total)(torch.tensor(0.25, dtype=torch.float64))
    low, high = (sum(value_after(eta, leaves=edited).values()) for eta in (0.0, 1.0))
    assert float(slope) == high - low
    assert float(value) == sum(value_after(0.25, leaves=edited).values())

    eta = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    total(eta).backward()
    assert float(eta.grad) == high - low
    if state is not None:
        assert {at(state, p).rule.eta for p in PATHS} == {0.5}


def test_scalars_of_a_captured_state_are_not_traced() -> None:
    torch = pytest.importorskip("torch")
    run = Run(made("captured"))
    eta = torch.tensor(0.25, requires_grad=True)
    for edit in (opt.adjust, lambda s, e: opt.with_hyperparameters(s, {"eta": e})):
        with pytest.raises(opt.BadState, match="without capturable"):
            edit(run.state, eta)
    run.step(1, 1, 1)
    run.check()


# -- any sequence --------------------------------------------------------------------------------------------

FRACTIONS = st.sampled_from([0.125, 0.25, 0.5, 1.0])
GRADIENTS = st.sampled_from([None, -1.0, 1.0, 2.0])
ACTIONS = st.one_of(
    st.tuples(st.just("step"), GRADIENTS, GRADIENTS, GRADIENTS, st.booleans()),
    st.tuples(st.just("part"), GRADIENTS, GRADIENTS, st.booleans()),
    st.tuples(st.just("adjust"), st.sampled_from([*WHERE]), st.sampled_from(["eta", "lam"]), FRACTIONS),
    st.tuples(st.just("numbers"), st.sampled_from(["eta", "lam"]), FRACTIONS, st.booleans()),
    st.tuples(st.just("freeze"), st.sampled_from([*WHERE]), st.booleans()),
    st.tuples(st.just("state"), st.sampled_from(PATHS), FRACTIONS, st.integers(0, 3)),
    st.tuples(st.just("rule"), st.sampled_from(PATHS), FRACTIONS, st.booleans()),
    st.tuples(st.just("copy"), st.sampled_from([*COPIES])),
)


def acted(run: Run, action: Any) -> None:
    kind, *rest = action
    if kind == "step":
        run.step(*rest[:3], pure=rest[3])
    elif kind == "part":
        run.step(rest[0], rest[1], None, part="net", pure=rest[2])
    elif kind == "adjust":
        selector, leaves = WHERE[rest[0]]
        opt.adjust_(run.state, where=selector, **{rest[1]: rest[2]})
        put(run.plain, leaves, **{rest[1]: rest[2]})
    elif kind == "numbers":
        part = run.state["net"] if rest[2] else run.state
        run.state = whole_of(run.state, opt.with_hyperparameters(part, {rest[0]: rest[1]}))
        put(run.plain, PATHS[:2] if rest[2] else PATHS, **{rest[0]: rest[1]})
    elif kind == "freeze":
        selector, leaves = WHERE[rest[0]]
        (opt.freeze_ if rest[1] else opt.thaw_)(run.state, selector)
        put(run.plain, leaves, frozen=rest[1])
    elif kind == "state":
        at(run.state, rest[0]).state = {"v": run.mode.array(SIZES[rest[0]], rest[1]), "n": rest[2]}
        put(run.plain, (rest[0],), v=rest[1], n=rest[2])
    elif kind == "rule":
        at(run.state, rest[0]).rule = (Renamed if rest[2] else Counted)(rest[1], 0.25)
        put(run.plain, (rest[0],), eta=rest[1], lam=0.25, far=2 if rest[2] else 1)
    else:
        run.state = COPIES[rest[0]](run.state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "examples"), [("mode", 60), ("interpreted", 25), ("torch", 40), ("captured", 12), ("jax", 8)]
)
def test_any_sequence_of_edits_and_steps(mode: str, examples: int) -> None:
    made(mode)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(ACTIONS, min_size=3, max_size=9))
    def any_of(actions: list[Any]) -> None:
        run = Run(made(mode))
        for action in actions:
            acted(run, action)
        run.check()

    any_of()


def test_other_hyperparameters_are_checked_as_everywhere() -> None:
    state = opt.setup(opt.Adam(1.0), {"w": np.ones(3), "b": np.ones(2)})
    opt.adjust_(state["w"], 0.5)
    for values, text in (
        ({"eta": np.array([1.0, 2.0, 3.0])}, r"eta has shape \(3,\)"),
        ({"eta": np.array([7.0])}, r"eta has shape \(1,\)"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"eta": float("nan")}, "eta is nan"),
    ):
        with pytest.raises(opt.BadSetting, match=text):
            opt.with_hyperparameters(state, values)
    new = opt.with_hyperparameters(state, {"eta": np.array([3.0, 2.0])})
    assert sorted(opt.hyperparameters(new)["eta"].tolist()) == [2.0, 3.0]
