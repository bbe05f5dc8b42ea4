"""The clock is each leaf's own; behind a `when` it counts steps. Numbers are those of plain Python models."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.worlds import step_scaled


def rising(clock: Any) -> Any:
    """A rate by which one sees at which clocks a leaf was stepped: 1, 2, 4, ..."""
    return 2.0**clock


ENGINES = ["interpret", "numba"]


def model_of(*names: str) -> dict[str, Any]:
    return {name: np.zeros(2) for name in names}


ONE = np.ones(2)


# -- the clock of a leaf -------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_two_halves_in_turn_run_their_schedules_as_if_alone(engine: str) -> None:
    """Generator and discriminator: each is stepped by its own count."""
    model = {"g": model_of("w", "b"), "d": model_of("w")}
    state = opt.setup(opt.Descent(rising), model, engine=engine)
    for _ in range(3):
        opt.update_(state.g, model["g"], {"w": ONE, "b": ONE})
        state_d, model["d"] = opt.update(state.d, model["d"], {"w": ONE})
        opt.update_(state.d, model["d"], {"w": 0 * ONE})
        del state_d
    np.testing.assert_array_equal(model["g"]["w"], -(1 + 2 + 4))
    np.testing.assert_array_equal(model["g"]["b"], -(1 + 2 + 4))
    np.testing.assert_array_equal(model["d"]["w"], -(1 + 2 + 4))
    assert opt.current(state)["g.w"].eta == 8


@pytest.mark.parametrize("engine", ENGINES)
def test_one_leaf_at_a_time_meets_again_in_one_row(engine: str) -> None:
    model = model_of("a", "b", "c")
    state = opt.setup(opt.Adam(rising), model, engine=engine)
    whole = model_of("a", "b", "c")
    other = opt.setup(opt.Adam(rising), whole, engine=engine)
    for _ in range(3):
        for name in model:
            opt.update_(state[name], model[name], ONE)
        opt.update_(other, whole, dict.fromkeys(whole, ONE))
    for name in model:
        np.testing.assert_array_equal(model[name], whole[name])
    assert state == other


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frozen_leaf_and_one_without_gradient_are_covered(engine: str) -> None:
    model = model_of("a", "b", "c")
    state = opt.setup(opt.Descent(rising), model, engine=engine)
    opt.freeze_(state.a)
    opt.update_(state, model, {"a": ONE, "b": None, "c": ONE})
    opt.update_(state, model, {"a": ONE, "b": None, "c": ONE})
    opt.thaw_(state)
    opt.update_(state, model, {"a": ONE, "b": ONE, "c": ONE})
    np.testing.assert_array_equal(model["a"], -4)
    np.testing.assert_array_equal(model["b"], -4)
    np.testing.assert_array_equal(model["c"], -(1 + 2 + 4))


def test_a_pure_step_of_a_part_leaves_the_clocks_of_the_old_state() -> None:
    model = model_of("a", "b")
    state = opt.setup(opt.Descent(rising), model)
    new, _ = opt.update(state.a, model["a"], ONE)
    assert (opt.current(new).eta, opt.current(state)["a"].eta, opt.current(state)["b"].eta) == (2, 1, 1)


# -- the clock behind a condition ----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_behind_accumulation_the_clock_counts_steps(engine: str) -> None:
    """By hand: the mean of two ones is stepped by 1, then by 2, then by 4."""
    model = model_of("a")
    state = opt.setup(opt.Chain(opt.AccumGrad(2), opt.Descent(rising)), model, engine=engine)
    seen: list[float] = []
    rates: list[float] = []
    for _ in range(6):
        opt.update_(state, model, {"a": ONE})
        seen.append(float(model["a"][0]))
        rates.append(opt.current(state)["a"].rules[1].eta)
    assert seen == [0, -1, -1, -3, -3, -7]
    assert rates == [1, 2, 2, 4, 4, 8]


@pytest.mark.parametrize("engine", ENGINES)
def test_before_the_condition_the_clock_counts_updates(engine: str) -> None:
    """The decay stands before: its rate runs with the updates, that of the step with the steps."""

    class Scaled(opt.Rule):
        by: float = 1.0

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, self.by * dx

    model = model_of("a")
    rule = opt.Chain(Scaled(rising), opt.AccumGrad(2), opt.Descent(rising))
    state = opt.setup(rule, model, engine=engine)
    for _ in range(4):
        opt.update_(state, model, {"a": ONE})
    by_hand = -((1 + 2) / 2 * 1 + (4 + 8) / 2 * 2)
    np.testing.assert_array_equal(model["a"], by_hand)
    now = opt.current(state)["a"]
    assert (now.rules[0].by, now.rules[2].eta) == (16, 4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_skipped_step_does_not_advance_the_schedule(engine: str) -> None:
    model = model_of("a")
    state = opt.setup(opt.SkipNonFinite(opt.Descent(rising)), model, engine=engine)
    for g in (1.0, np.nan, np.inf, 1.0, 1.0):
        opt.update_(state, model, {"a": g * ONE})
    np.testing.assert_array_equal(model["a"], -(1 + 2 + 4))


@pytest.mark.parametrize("engine", ENGINES)
def test_conditions_in_conditions_have_clocks_of_their_own(engine: str) -> None:
    """AccumGrad behind SkipNonFinite counts sound steps; what stands behind both counts full windows."""
    model = model_of("a")
    rule = opt.SkipNonFinite(opt.Chain(opt.AccumGrad(2), opt.Descent(rising)))
    state = opt.setup(rule, model, engine=engine)
    for g in (1.0, np.nan, 3.0, np.nan, 1.0, 1.0):
        opt.update_(state, model, {"a": g * ONE})
    np.testing.assert_array_equal(model["a"], -((1 + 3) / 2 * 1 + 1 * 2))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_condition_of_one_leaf_counts_for_that_leaf(engine: str) -> None:
    class Loud(opt.Rule):
        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            return state, opt.when(opt.ops.sum(dx) > 1, dx)

    model = model_of("a", "b")
    state = opt.setup(opt.Chain(Loud(), opt.Descent(rising)), model, engine=engine)
    for a, b in ((1.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        opt.update_(state, model, {"a": a * ONE, "b": b * ONE})
    np.testing.assert_array_equal(model["a"], -(1 + 2 + 4))
    np.testing.assert_array_equal(model["b"], -(1 + 2))


def test_a_rule_that_calls_another_by_hand_still_resolves_its_schedules() -> None:
    class Twice(opt.Rule):
        rule: opt.Rule

        def init(self, x: Any) -> Any:
            return self.rule.init(x)

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            state, dx = self.rule.apply(state, x, dx)
            return state, 2 * dx

    model = model_of("a")
    state = opt.setup(Twice(opt.Descent(rising)), model)
    for _ in range(2):
        opt.update_(state, model, {"a": ONE})
    np.testing.assert_array_equal(model["a"], -2 * (1 + 2))


COPIES = {
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "adjusted": lambda state: opt.adjust(state, where="**", n=2),
}


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_copies_keep_the_count_of_steps(way: Any) -> None:
    model = model_of("a")
    state = opt.setup(opt.Chain(opt.AccumGrad(2), opt.Descent(rising)), model)
    for _ in range(4):
        opt.update_(state, model, {"a": ONE})
    new = way(state)
    for _ in range(2):
        opt.update_(new, model, {"a": ONE})
    np.testing.assert_array_equal(model["a"], -(1 + 2 + 4))


def test_a_rate_that_becomes_a_schedule_goes_on_from_the_steps_taken() -> None:
    """The rule changes its structure, and the leaf its group; its counts go with it."""
    model = model_of("a")
    state = opt.setup(opt.Chain(opt.AccumGrad(2), opt.Descent(1.0)), model)
    for _ in range(6):
        opt.update_(state, model, {"a": ONE})
    opt.adjust_(state, rising)
    assert opt.current(state)["a"].rules[1].eta == 8
    opt.adjust_(state, 1.0)
    opt.adjust_(state, rising, where="a")
    for _ in range(2):
        opt.update_(state, model, {"a": ONE})
    np.testing.assert_array_equal(model["a"], -(1 + 1 + 1 + 8))


# -- windows of accumulation ---------------------------------------------------------------------------------


class Gathering:
    """What torch does: gradients add up in .grad, and every n-th update divides the sum by n."""

    def __init__(self, n: int) -> None:
        self.n, self.updates, self.x, self.sum, self.held = n, 0, 0.0, 0.0, 0

    def update(self, g: float | None) -> None:
        self.updates += 1
        if g is None:
            return
        self.sum, self.held = self.sum + g, self.held + 1
        if self.updates % self.n == 0:
            self.x -= self.sum / max(self.n, self.held)
            self.sum, self.held = 0.0, 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(4))
def test_all_arrays_close_a_window_together(engine: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = model_of("a", "b", "c")
    state = opt.setup(opt.Chain(opt.AccumGrad(3), opt.Descent(1.0)), model, engine=engine)
    plain = {name: Gathering(3) for name in model}
    for _ in range(20):
        given = {n: None if rng.random() < 0.3 else float(rng.integers(-4, 5)) for n in model}
        opt.update_(state, model, {n: None if g is None else g * ONE for n, g in given.items()})
        for n, g in given.items():
            plain[n].update(g)
            np.testing.assert_allclose(model[n], plain[n].x, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_windows_agree_with_gradients_that_torch_accumulates() -> None:
    """As long as the closing update has a gradient: elsewhere torch steps by what it holds."""
    torch = pytest.importorskip("torch")
    w = {n: torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for n in ("a", "b")}
    sgd = torch.optim.SGD(w.values(), lr=0.5, momentum=0.9)
    model = model_of("a", "b")
    state = opt.setup(opt.Chain(opt.AccumGrad(4), opt.Momentum(0.5, 0.9)), model)
    rng = np.random.default_rng(0)
    for step in range(12):
        g = {n: None if n == "b" and step % 4 == 1 else rng.normal(size=2) for n in model}
        opt.update_(state, model, g)
        for n, value in g.items():
            if value is not None:
                held = w[n].grad
                new = torch.tensor(value) / 4
                w[n].grad = new if held is None else held + new
        if step % 4 == 3:
            sgd.step()
            sgd.zero_grad()
    for n, value in model.items():
        np.testing.assert_allclose(value, w[n].detach().numpy(), rtol=1e-12)


# -- other libraries, and what is saved ----------------------------------------------------------------------


def test_the_adapter_of_torch_saves_and_loads_the_steps_taken() -> None:
    torch = pytest.importorskip("torch")

    def made() -> tuple[Any, Any]:
        p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        return p, opt.TorchOptimizer([p], opt.Chain(opt.AccumGrad(2), opt.Descent(rising)))

    def steps(p: Any, o: Any, n: int) -> None:
        for _ in range(n):
            p.grad = torch.ones(2, dtype=torch.float64)
            o.step()

    p, o = made()
    steps(p, o, 5)
    q, other = made()
    q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(o.state_dict()))
    steps(q, other, 3)
    np.testing.assert_array_equal(q.detach().numpy(), -(1 + 2 + 4 + 8))
    assert other.param_groups[0]["eta"] == 8.0  # that of the step it has just taken
    other.read_groups()
    assert other.param_groups[0]["eta"] == 16.0


@pytest.mark.parametrize("jitted", [False, True])
def test_states_of_jax_count_steps(jitted: bool) -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    model = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    state = opt.setup(opt.Chain(opt.AccumGrad(2), opt.Descent(rising)), model)
    step = jax.jit(opt.update) if jitted else opt.update
    for _ in range(6):
        state, model = step(state, model, {"a": jnp.ones(2), "b": jnp.ones(3)})
    np.testing.assert_array_equal(model["a"], -(1 + 2 + 4))
    assert opt.current(state)["b"].rules[1].eta == 8
    flat, tree = jax.tree.flatten(state)
    state = jax.tree.unflatten(tree, flat)
    for _ in range(2):
        state, model = step(state, model, {"a": jnp.ones(2), "b": jnp.ones(3)})
    np.testing.assert_array_equal(model["b"], -(1 + 2 + 4 + 8))


def test_flax_saves_clocks_and_steps() -> None:
    jax = pytest.importorskip("jax")
    serialization = pytest.importorskip("flax.serialization")
    jnp = jax.numpy
    model = {"a": jnp.zeros(2)}
    rule = opt.Chain(opt.AccumGrad(2), opt.Descent(rising))
    state = opt.setup(rule, model)
    for _ in range(5):
        state, model = opt.update(state, model, {"a": jnp.ones(2)})
    fresh = serialization.from_state_dict(opt.setup(rule, model), serialization.to_state_dict(state))
    new, model = opt.update(fresh, model, {"a": jnp.ones(2)})
    np.testing.assert_array_equal(model["a"], -(1 + 2 + 4))
    assert opt.current(new)["a"].rules[1].eta == 8


@pytest.mark.slow
def test_a_population_counts_steps_each() -> None:
    """Under vmap every member has its own condition."""
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    rule = opt.SkipNonFinite(opt.Descent(rising))
    states = jax.vmap(lambda _: opt.setup(rule, {"a": jnp.zeros(2)}))(jnp.arange(2))
    models = {"a": jnp.zeros((2, 2))}
    for bad in (0, 1):
        g = jnp.ones((2, 2)).at[1].set(jnp.nan if bad else 1.0)
        states, models = jax.vmap(opt.update)(states, models, {"a": g})
    states, models = jax.vmap(opt.update)(states, models, {"a": jnp.ones((2, 2))})
    np.testing.assert_array_equal(models["a"][:, 0], [-(1 + 2 + 4), -(1 + 2)])


def test_a_schedule_behind_a_condition_compiles_once() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    made: list[int] = []

    @jax.jit
    def step(state: Any, model: Any, grads: Any) -> Any:
        made.append(1)
        return opt.update(state, model, grads)

    model = {"a": jnp.zeros(2)}
    state = opt.setup(opt.Chain(opt.AccumGrad(2), opt.Descent(rising)), model)
    for _ in range(5):
        state, model = step(state, model, {"a": jnp.ones(2)})
    assert len(made) == 1


def test_scalars_on_a_device_count_steps_and_updates() -> None:
    """By the launches of Triton; a step that a scaler of gradients skips is none."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from optimisers.engines.cuda import device_functions

    device = "cpu" if device_functions.INTERPRETED else "cuda"
    model = {n: torch.zeros(2, dtype=torch.float64, device=device) for n in ("a", "b")}
    rule = opt.Chain(opt.AccumGrad(2), opt.Descent(rising))
    state = opt.setup(rule, model, engine="triton", capturable=True)
    one = {n: torch.ones_like(x) for n, x in model.items()}
    scale, sound, bad = (torch.full((), v, device=device) for v in (1.0, 0.0, 1.0))
    opt.update_(state, model, one)
    opt.update_(state, model, one)
    for found in (sound, bad, sound):
        step_scaled(state, model, one, (scale, found))
    opt.update_(state.a, model["a"], one["a"])
    opt.update_(state.a, model["a"], one["a"])
    np.testing.assert_array_equal(model["a"].cpu(), -(1 + 2 + 4))
    np.testing.assert_array_equal(model["b"].cpu(), -(1 + 2))
    assert [opt.current(state[n]).rules[1].eta for n in model] == [8, 4]
    assert [opt.explain(state[n]).clock for n in model] == [6, 4]
