"""A schedule that computes with JAX, one of Optax among them, is a setting; so is one over a traced rate."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimisers as opt

optax: Any = importlib.import_module("optax")
Descent: Any = opt.Descent

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": optax.constant_schedule(0.1),
    "linear": optax.linear_schedule(0.1, 0.0, 4),
    "cosine": optax.cosine_decay_schedule(0.1, 4),
    "warmup cosine": optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 4),
    "exponential": optax.exponential_decay(0.1, 2, 0.9, staircase=True),
    "piecewise": optax.piecewise_constant_schedule(0.1, {2: 0.1}),
    "joined": optax.join_schedules([optax.constant_schedule(0.1), optax.linear_schedule(0.2, 0.1, 2)], [2]),
    "one cycle": optax.cosine_onecycle_schedule(6, 0.1),
    "restarts": optax.sgdr_schedule(
        [
            {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 1, "decay_steps": 2},
            {"init_value": 0.1, "peak_value": 0.2, "warmup_steps": 1, "decay_steps": 3},
        ]
    ),
    "a function of jax": lambda count: jax.lax.cond(
        count < 2, lambda: jnp.float32(0.1), lambda: jnp.float32(0.2)
    ),
}


@pytest.fixture(autouse=True)
def single() -> Any:
    with jax.enable_x64(False):
        yield


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_of_optax_is_followed_in_every_library(schedule: Callable[[Any], Any]) -> None:
    rates = [float(schedule(n)) for n in range(5)]
    for one in (np.ones(2, np.float32), jnp.ones(2)):
        for step in (
            opt.update,
            opt.update_,
            *([] if isinstance(one, np.ndarray) else [jax.jit(opt.update)]),
        ):
            model = {"w": one * 0}
            state = opt.setup(Descent(schedule), model)
            assert opt.current(state)["w"].eta == pytest.approx(rates[0])
            for n in range(5):
                state, model = step(state, model, {"w": one})
                np.testing.assert_allclose(model["w"], -sum(rates[: n + 1]), rtol=1e-5, atol=1e-7)


def test_it_counts_the_steps_taken_behind_a_condition() -> None:
    rule: Any = opt.Chain(opt.AccumGrad(2), Descent(SCHEDULES["linear"]))
    for one in (np.ones(2, np.float32), jnp.ones(2)):
        state, x = opt.setup(rule, one * 0), one * 0
        for _ in range(4):
            state, x = opt.update(state, x, one)
        np.testing.assert_allclose(x, -0.1 - 0.075, rtol=1e-6)


def test_it_is_adjusted_to_a_number_and_back() -> None:
    model = {"w": jnp.zeros(2)}
    state = opt.setup(Descent(SCHEDULES["linear"]), model)
    _, new = opt.update(opt.adjust(state, 0.5), model, {"w": jnp.ones(2)})
    np.testing.assert_allclose(new["w"], -0.5)
    back = opt.adjust(opt.adjust(state, 0.5), SCHEDULES["linear"])
    np.testing.assert_allclose(opt.update(back, model, {"w": jnp.ones(2)})[1]["w"], -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda rate, clock: rate / (1 + clock),
        lambda rate, clock: opt.ops.maximum(rate * (1 - clock / 8), 0.01),
    ],
)
def test_a_schedule_over_a_traced_rate_is_mapped_and_differentiated(
    schedule: Callable[[Any, Any], Any],
) -> None:
    def trained(rate: Any) -> Any:
        model = jnp.zeros(2)
        state = opt.setup(Descent(lambda clock: schedule(rate, clock)), model)
        for _ in range(3):
            state, model = opt.update(state, model, jnp.ones(2))
        return model[0]

    def wanted(rate: float) -> float:
        return -sum(float(schedule(rate, n)) for n in range(3))

    rates = [0.1, 0.2]
    np.testing.assert_allclose(
        jax.jit(jax.vmap(trained))(jnp.array(rates)), [wanted(r) for r in rates], rtol=1e-5
    )
    slope = (wanted(0.21) - wanted(0.19)) / 0.02
    np.testing.assert_allclose(jax.grad(trained)(0.2), slope, rtol=1e-4)


def test_a_rule_that_uses_a_traced_number_says_what_to_write() -> None:
    def trained(rate: Any) -> Any:
        class Closed(opt.Rule):
            def apply(self, state: Any, x: Any, dx: Any) -> Any:
                return state, rate * dx

        return opt.update(opt.setup(Closed(), jnp.ones(2)), jnp.ones(2), jnp.ones(2))[1]

    with pytest.raises(opt.TraceError, match="make it a field of the rule"):
        jax.jit(trained)(0.1)


def modules() -> dict[str, Any]:
    nnx, equinox = importlib.import_module("flax.nnx"), importlib.import_module("equinox")
    return {
        "NNX": nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
        "Equinox": equinox.nn.Linear(2, 2, key=jax.random.key(0)),
        "a jitted function of an array": jax.jit(lambda x: x * jnp.ones(3)),
        "a rule": opt.Adam(),
    }


@pytest.mark.parametrize("name", ["NNX", "Equinox", "a jitted function of an array", "a rule"])
def test_a_model_is_no_schedule_though_it_can_be_called(name: str) -> None:
    given = modules()[name]
    state = opt.setup(opt.AdamW(), {"w": jnp.ones(2)})
    for give in (
        lambda: opt.AdamW(given),
        lambda: opt.AdamW(beta=(given, 0.9)),
        lambda: opt.AdamW(lam=given),
        lambda: opt.adjust(state, given),
    ):
        with pytest.raises(opt.BadSetting, match=r"AdamW\.(eta|beta\[0\]|lam) is .*takes a"):
            give()


class Halving:
    """A schedule that is an object."""

    def __call__(self, clock: Any) -> Any:
        return 0.1 * 0.5**clock


def test_an_object_that_gives_numbers_is_a_schedule() -> None:
    for schedule in (Halving(), jax.jit(Halving())):
        state, model = opt.setup(Descent(schedule), jnp.zeros(1)), jnp.zeros(1)
        for _ in range(2):
            state, model = opt.update(state, model, jnp.ones(1))
        np.testing.assert_allclose(model, -0.15, rtol=1e-6)
