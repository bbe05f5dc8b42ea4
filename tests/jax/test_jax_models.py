"""Models of Flax and Equinox, transformations of Optax, and files: each with the real library.

What is expected comes from Optax, or from the same steps over plain dicts of NumPy.
"""

import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx, serialization
from flax.training.train_state import TrainState

import optimisers as opt

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)

both_updates = pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)


@pytest.fixture(autouse=True)
def _single_precision_before_and_after() -> Iterator[None]:
    assert not jax.config.jax_enable_x64
    yield
    assert not jax.config.jax_enable_x64


def near(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Two trees of one form hold the same numbers, to what the bias correction of Optax allows."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def by_numpy(rule: Any, model: Any, gradients: list[Any]) -> Any:
    """A dict of arrays after some steps, by the interpreter."""
    model = jax.tree.map(np.asarray, model)
    state = opt.setup(rule, model, engine="interpret")
    for g in gradients:
        state, model = opt.update(state, model, jax.tree.map(np.asarray, g))
    return model


# -- dicts of parameters -------------------------------------------------------------------------------------


class Dense(linen.Module):
    """Two layers."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dense(2)(jnp.tanh(linen.Dense(4)(x)))


class Normed(linen.Module):
    """A layer with statistics beside its parameters."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.Dense(1)(linen.BatchNorm(use_running_average=False)(linen.Dense(4)(x)))


DENSE = Dense()
PARAMS = DENSE.init(jax.random.key(0), X)


def linen_loss(params: Any) -> Any:
    return jnp.mean(DENSE.apply(params, X) ** 2)


def test_parameters_of_linen_train_as_with_optax() -> None:
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.05, weight_decay=0.1))
    rule = opt.Chain(opt.ClipGlobalNorm(0.5), opt.AdamW(0.05, lam=0.1))

    @jax.jit
    def ours(state: Any, params: Any) -> Any:
        return opt.update(state, params, jax.grad(linen_loss)(params))

    @jax.jit
    def theirs(state: Any, params: Any) -> Any:
        updates, state = tx.update(jax.grad(linen_loss)(params), state, params)
        return state, optax.apply_updates(params, updates)

    a, b = (opt.setup(rule, PARAMS), PARAMS), (tx.init(PARAMS), PARAMS)
    for _ in range(5):
        a, b = ours(*a), theirs(*b)
    near(a[1], b[1], rtol=1e-4)


@pytest.mark.slow
def test_statistics_of_linen_stay_beside_the_parameters() -> None:
    net = Normed()
    variables = net.init(jax.random.key(0), X)
    params, statistics = variables["params"], variables["batch_stats"]
    state = opt.setup(opt.Adam(0.05), params)

    @jax.jit
    def step(state: Any, params: Any, statistics: Any) -> Any:
        def loss(params: Any) -> Any:
            y, new = net.apply({"params": params, "batch_stats": statistics}, X, mutable=["batch_stats"])
            return jnp.mean((y - 1) ** 2), new["batch_stats"]

        (value, statistics_), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return *opt.update(state, params, grads), statistics_, value

    values: list[float] = []
    now = statistics
    for _ in range(8):
        state, params, now, value = step(state, params, now)
        values.append(float(value))

    assert values[-1] < 0.6 * values[0]
    assert bool((now["BatchNorm_0"]["mean"] != statistics["BatchNorm_0"]["mean"]).any())


def test_nested_dicts_as_those_of_haiku_are_addressed_by_path() -> None:
    params = {
        "mlp/~/linear_0": {"b": jnp.zeros(2), "w": jnp.ones((3, 2))},
        "mlp/~/linear_1": {"b": jnp.zeros(1), "w": jnp.ones((2, 1))},
    }
    grads = jax.tree.map(jnp.ones_like, params)
    state = opt.setup({"**.b": opt.Descent(0.5), "**": opt.Momentum(0.1)}, params)
    state = opt.freeze(state, "mlp/~/linear_1.w")
    state, new = jax.jit(opt.update)(state, params, grads)

    np.testing.assert_allclose(new["mlp/~/linear_0"]["b"], -0.5)
    np.testing.assert_allclose(new["mlp/~/linear_0"]["w"], 0.9)
    np.testing.assert_array_equal(new["mlp/~/linear_1"]["w"], 1)
    assert state["mlp/~/linear_1"]["w"].frozen
    assert state["mlp/~/linear_0"].b.rule == opt.Descent(0.5)


def test_a_frozen_dict_of_flax_keeps_its_type() -> None:
    from flax.core import freeze

    params = freeze({"a": {"w": jnp.ones(2)}})
    _, new = opt.update(opt.setup(opt.Descent(0.5), params), params, params)

    assert type(new) is type(params)
    np.testing.assert_allclose(new["a"]["w"], 0.5)


# -- Flax NNX ------------------------------------------------------------------------------------------------


NOISE_PROOF, NOISE_PROOF_OPTAX = opt.Adam(0.1, epsilon=0.1), optax.adam(0.1, eps=0.1)
"""The bias before a BatchNorm has a slope of nothing but rounding errors, which epsilon keeps small."""


class Net(nnx.Module):
    """Layers with statistics, a dropout with its own random numbers, and a plain attribute."""

    def __init__(self, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.bn, self.drop = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.note = "kept"

    def __call__(self, x: Any) -> Any:
        return self.b(jnp.tanh(self.bn(self.a(x))))


def nnx_loss(net: Net) -> Any:
    return jnp.mean(net(X) ** 2)


def nnx_params(net: Net) -> dict[str, Any]:
    """The parameters by path, as NumPy has them."""
    flat = nnx.to_flat_state(nnx.state(net, nnx.Param))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


def nnx_by_optax(tx: Any, steps: int) -> tuple[dict[str, Any], list[float]]:
    """(parameters, losses) of the same net trained by Optax."""
    net = Net()
    trainer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def step(net: Net, trainer: Any) -> Any:
        value, grads = nnx.value_and_grad(nnx_loss)(net)
        trainer.update(net, grads)
        return value

    losses = [float(step(net, trainer)) for _ in range(steps)]
    return nnx_params(net), losses


def same_params(got: dict[str, Any], wanted: dict[str, Any], rtol: float = 2e-4) -> None:
    assert sorted(got) == sorted(wanted)
    for name, x in wanted.items():
        np.testing.assert_allclose(got[name], x, rtol=rtol, atol=1e-5, err_msg=name)


def test_only_the_parameters_of_a_net_are_trained() -> None:
    net = Net()
    found = [str(path) for path, _ in opt.trainables(net, path=True)]

    assert len(found) == 6
    for name in ("a.kernel", "a.bias", "b.kernel", "b.bias", "bn.scale", "bn.bias"):
        assert sum(path.startswith(name) for path in found) == 1
    of_state = sum(x.size for x in jax.tree.leaves(opt.setup(opt.Adam(), net)))
    assert of_state == 2 * (3 * 4 + 4 + 4 * 2 + 2 + 4 + 4) + 6 + 1


@both_updates
def test_a_net_takes_eager_steps(step: Callable[..., Any]) -> None:
    net = Net()
    start = nnx_params(net)
    state = opt.setup(NOISE_PROOF, net)
    grads = nnx.grad(nnx_loss)(net)
    mean, random = net.bn.mean[...], net.drop.rngs
    _, new = step(state, net, grads)
    of_grads = {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(grads)}
    wanted = by_numpy(NOISE_PROOF, start, [of_grads])

    assert (new is net) == (step is opt.update_)
    same_params(nnx_params(new), wanted)
    if step is opt.update:
        same_params(nnx_params(net), start, rtol=0)
    assert new.bn.mean[...] is mean or bool((new.bn.mean[...] == mean).all())
    assert type(new.drop.rngs) is type(random)
    assert new.note == "kept"


@both_updates
def test_a_net_trains_inside_nnx_jit(step: Callable[..., Any]) -> None:
    net = Net()
    state = opt.setup(NOISE_PROOF, net)

    @nnx.jit
    def train(net: Net, state: Any) -> Any:
        value, grads = nnx.value_and_grad(nnx_loss)(net)
        state, new = step(state, net, grads)
        return value, state, None if step is opt.update_ else new

    losses: list[float] = []
    before = np.asarray(net.bn.mean[...])
    for _ in range(4):
        value, state, new = train(net, state)
        net = net if step is opt.update_ else new
        losses.append(float(value))
    wanted, of_optax = nnx_by_optax(NOISE_PROOF_OPTAX, 4)

    np.testing.assert_allclose(losses, of_optax, rtol=1e-3)
    same_params(nnx_params(net), wanted, rtol=1e-3)
    assert bool((np.asarray(net.bn.mean[...]) != before).any())


def test_a_net_may_be_split_and_merged() -> None:
    net = Net()
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    state = opt.setup(NOISE_PROOF, params)

    @jax.jit
    def step(state: Any, params: Any, rest: Any) -> Any:
        def loss(params: Any) -> Any:
            net = nnx.merge(graph, params, rest, copy=True)
            return nnx_loss(net), nnx.split(net, nnx.Param, ...)[2]

        (_, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return *opt.update(state, params, grads), rest

    for _ in range(4):
        state, params, rest = step(state, params, rest)
    wanted, _ = nnx_by_optax(NOISE_PROOF_OPTAX, 4)
    same_params(nnx_params(nnx.merge(graph, params, rest)), wanted, rtol=1e-3)


def test_a_tied_parameter_of_a_net_has_one_leaf() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Param(jnp.asarray([1.0, 2.0]))
            self.head = self.embed

    net = Tied()
    state = opt.setup(opt.Momentum(0.5), net)
    grads = nnx.grad(lambda m: jnp.sum(m.embed[...] * m.head[...]))(net)
    _, new = opt.update_(state, net, grads)

    assert sum(x.size for x in jax.tree.leaves(state)) == 2 + 2 + 1
    assert new.embed is new.head
    np.testing.assert_allclose(new.embed[...], [0.0, 0.0])


def test_parts_of_a_net_are_frozen_and_adjusted_by_path() -> None:
    net = Net()
    state = opt.setup(opt.Descent(0.5), net)
    opt.freeze_(state.bn)
    opt.adjust_(state.b, 0.25)
    start = nnx_params(net)
    grads = jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param))
    opt.update_(state, net, grads)
    got = nnx_params(net)

    np.testing.assert_array_equal(got["bn.scale"], start["bn.scale"])
    np.testing.assert_allclose(got["b.bias"], start["b.bias"] - 0.25, rtol=1e-6)
    np.testing.assert_allclose(got["a.bias"], start["a.bias"] - 0.5, rtol=1e-6)


# -- Equinox -------------------------------------------------------------------------------------------------


class Perceptron(eqx.Module):
    """Layers, a function, a static field, a number, and whole numbers."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    act: Callable[[Any], Any]
    counts: Any
    width: int = eqx.field(static=True)
    scale: float = 2.0

    def __init__(self, seed: int = 1) -> None:
        a, b = jax.random.split(jax.random.key(seed))
        self.first, self.second = eqx.nn.Linear(3, 4, key=a), eqx.nn.Linear(4, 2, key=b)
        self.act, self.counts, self.width = jax.nn.relu, jnp.arange(3), 4

    def __call__(self, x: Any) -> Any:
        return self.second(self.act(self.first(x))) * self.scale


def eqx_loss(model: Perceptron) -> Any:
    return jnp.mean(jax.vmap(model)(X) ** 2)


@eqx.filter_jit
def eqx_slopes(model: Perceptron) -> Any:
    return eqx.filter_grad(eqx_loss)(model)


def eqx_by_optax(tx: Any, steps: int) -> Perceptron:
    model = Perceptron()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(state: Any, model: Any) -> Any:
        updates, state = tx.update(
            eqx.filter_grad(eqx_loss)(model), state, eqx.filter(model, eqx.is_inexact_array)
        )
        return state, eqx.apply_updates(model, updates)

    for _ in range(steps):
        state, model = step(state, model)
    return model


@pytest.mark.slow
def test_a_whole_module_of_equinox_trains_and_the_rest_of_it_is_kept() -> None:
    model = new = Perceptron()
    state = opt.setup(opt.Adam(0.1), model)
    for _ in range(3):
        state, new = opt.update(state, new, eqx_slopes(new))
    wanted = eqx_by_optax(optax.adam(0.1), 3)

    near(eqx.filter(new, eqx.is_inexact_array), eqx.filter(wanted, eqx.is_inexact_array), rtol=1e-4)
    assert (new.act, new.width, new.scale) == (model.act, 4, 2.0)
    assert new.counts is model.counts
    assert type(new) is Perceptron
    assert jax.tree.structure(eqx.filter(new, eqx.is_array)) == jax.tree.structure(
        eqx.filter(model, eqx.is_array)
    )


@pytest.mark.slow
@pytest.mark.parametrize("donate", ["none", "all"])
def test_a_module_trains_inside_filter_jit(donate: str) -> None:
    model = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, Perceptron())
    state = opt.setup(opt.Adam(0.1), model)

    @eqx.filter_jit(donate=donate)
    def step(state: Any, model: Any) -> Any:
        return opt.update(state, model, eqx.filter_grad(eqx_loss)(model))

    for _ in range(3):
        state, model = step(state, model)
    wanted = eqx_by_optax(optax.adam(0.1), 3)
    near(eqx.filter(model, eqx.is_inexact_array), eqx.filter(wanted, eqx.is_inexact_array), rtol=1e-4)


def test_the_parameters_of_a_module_may_be_partitioned_off() -> None:
    params, rest = eqx.partition(Perceptron(), eqx.is_inexact_array)
    state = opt.setup(opt.Adam(0.1), params)

    @jax.jit
    def step(state: Any, params: Any) -> Any:
        return opt.update(state, params, jax.grad(lambda p: eqx_loss(eqx.combine(p, rest)))(params))

    for _ in range(3):
        state, params = step(state, params)
    wanted = eqx_by_optax(optax.adam(0.1), 3)
    near(params, eqx.filter(wanted, eqx.is_inexact_array), rtol=1e-4)


def test_fields_of_a_module_are_addresses() -> None:
    model = Perceptron()
    state = opt.setup({"second.**": opt.Descent(0.5), "**": opt.Adam()}, model)
    opt.freeze_(state.first.weight)
    _, new = opt.update(state, model, jax.tree.map(jnp.ones_like, eqx.filter(model, eqx.is_inexact_array)))

    assert new.first.weight is model.first.weight
    np.testing.assert_allclose(new.second.bias, model.second.bias - 0.5, rtol=1e-6)
    assert [str(p) for p, _ in opt.trainables(model, path=True)] == [
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
    ]


def test_a_module_of_equinox_is_destructured_and_put_together() -> None:
    model = Perceptron()
    flat, back = opt.destructure(model)
    slope = jax.jit(jax.grad(lambda v: eqx_loss(back(v))))(flat)
    wanted = eqx_slopes(model)

    assert flat.shape == (4 * 3 + 4 + 2 * 4 + 2,)
    np.testing.assert_allclose(opt.destructure(wanted)[0], slope, rtol=1e-5, atol=1e-6)
    assert back(flat).act is model.act


# -- our rules in Optax --------------------------------------------------------------------------------------

PLAIN = {"b": jnp.asarray([0.5, -1.0]), "w": jnp.asarray([[1.0, 2.0], [-3.0, 0.25]])}
SLOPES = [jax.tree.map(lambda x, k=k: jnp.sin(x * k) + 0.1 * k, PLAIN) for k in range(1, 6)]


def run(tx: Any, gradients: list[Any] = SLOPES, params: Any = PLAIN) -> tuple[Any, Any]:
    """(parameters, state) after some jitted steps of a transformation."""
    state, step = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


PLACES: dict[str, Callable[[Any], Any]] = {
    "alone": lambda tx: tx,
    "after a clip": lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx),
    "before a scale": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "partition": lambda tx: optax.partition({"x": tx, "y": optax.sgd(0.5)}, {"w": "x", "b": "y"}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(0.2)), ("ours", tx)),
    "extra arguments": optax.with_extra_args_support,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_rule_works_wherever_a_transformation_of_optax_does(place: Callable[[Any], Any]) -> None:
    got, _ = run(place(opt.as_optax(opt.Adam(0.1, epsilon=1e-6))))
    wanted, _ = run(place(optax.adam(0.1, eps=1e-6)))
    near(got, wanted, rtol=1e-4, atol=1e-5)


PAIRS: dict[str, tuple[Any, Any]] = {
    "AdamW": (opt.AdamW(0.1, lam=0.1), optax.adamw(0.1, weight_decay=0.1)),
    "Nesterov": (opt.Lion(0.01), optax.lion(0.01, weight_decay=0.0)),
    "clip inside": (
        opt.Chain(opt.ClipGlobalNorm(0.1), opt.Descent(0.1)),
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    ),
    "schedule": (opt.Descent(opt.Cosine(0.1, 4)), optax.sgd(optax.cosine_decay_schedule(0.1, 4))),
    "by glob": (
        {"b": opt.Descent(0.3), "**": opt.Descent(0.1)},
        optax.partition({"x": optax.sgd(0.1), "y": optax.sgd(0.3)}, {"w": "x", "b": "y"}),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_rules_give_the_updates_of_their_peers(ours: Any, theirs: Any) -> None:
    near(run(opt.as_optax(ours))[0], run(theirs)[0], rtol=1e-4, atol=1e-5)


def test_bad_gradients_are_passed_by_in_apply_if_finite() -> None:
    bad = [SLOPES[0], jax.tree.map(lambda x: x * jnp.nan, PLAIN), SLOPES[1]]
    got, _ = run(optax.apply_if_finite(opt.as_optax(opt.Momentum(0.1)), 3), bad)
    wanted, _ = run(opt.as_optax(opt.Momentum(0.1)), [bad[0], bad[2]])
    near(got, wanted)


def test_the_state_in_a_transformation_is_adjusted_and_frozen_without_compiling_for_a_rate() -> None:
    tx = opt.as_optax(opt.Descent(0.1))
    state, step = tx.init(PLAIN), jax.jit(tx.update)
    step(SLOPES[0], state, PLAIN)
    updates, _ = step(SLOPES[0], opt.adjust(state, 0.5), PLAIN)
    np.testing.assert_allclose(updates["w"], -0.5 * SLOPES[0]["w"], rtol=1e-5, atol=1e-7)
    assert step._cache_size() == 1
    updates, _ = step(SLOPES[0], opt.freeze(state, "w"), PLAIN)
    np.testing.assert_array_equal(updates["w"], 0)


def test_a_transformation_ignores_further_arguments_and_takes_none() -> None:
    tx = opt.as_optax(opt.Descent(0.5))
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    updates, _ = tx.update({"b": None, "w": SLOPES[0]["w"]}, tx.init(PLAIN), PLAIN, value=1.0, grad=None)

    assert updates["b"] is None
    np.testing.assert_allclose(updates["w"], -0.5 * SLOPES[0]["w"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("params", [jnp.ones(3), [jnp.ones(2), (jnp.ones(1),)]], ids=["bare", "nested"])
def test_a_transformation_takes_any_pytree(params: Any) -> None:
    updates, _ = opt.as_optax(opt.Descent(0.5)).update(
        params, opt.as_optax(opt.Descent(0.5)).init(params), params
    )
    near(updates, jax.tree.map(lambda x: -0.5 * x, params))


def test_updates_have_the_type_of_the_parameters() -> None:
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = opt.as_optax(opt.Adam(0.1))
    updates, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)

    assert updates["w"].dtype == jnp.bfloat16
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16
    assert str(state["w"].state.m.dtype) == "float32"


@pytest.mark.slow
def test_a_step_of_a_transformation_may_be_mapped_scanned_and_differentiated() -> None:
    tx = opt.as_optax(opt.Momentum(0.1))

    def last(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda x: x**3, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
        return jnp.sum(params**2)

    def of_optax(x: Any) -> Any:
        v = 0.0
        for _ in range(3):
            v = 0.9 * v + 0.1 * x**3
            x = x - v
        return jnp.sum(x**2)

    x = jnp.asarray([0.5, -1.0])
    np.testing.assert_allclose(jax.grad(last)(x), jax.grad(of_optax)(x), rtol=1e-5)
    stacked = jax.vmap(last)(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(stacked, [of_optax(x), of_optax(2 * x)], rtol=1e-5)


@pytest.mark.slow
def test_the_trainer_of_nnx_takes_a_rule() -> None:
    got, losses = nnx_by_optax(opt.as_optax(NOISE_PROOF), 4)
    wanted, of_optax = nnx_by_optax(NOISE_PROOF_OPTAX, 4)

    np.testing.assert_allclose(losses, of_optax, rtol=1e-3)
    same_params(got, wanted, rtol=1e-3)


def test_the_train_state_of_linen_takes_a_rule_and_a_new_rate() -> None:
    def trained(tx: Any, change: Callable[[Any], Any]) -> tuple[Any, int]:
        ts = TrainState.create(apply_fn=DENSE.apply, params=PARAMS, tx=tx)

        @jax.jit
        def step(ts: Any) -> Any:
            return ts.apply_gradients(grads=jax.grad(linen_loss)(ts.params))

        start = step(step(ts)), step(ts)  # the step of `create` is a Python number at first
        before = step._cache_size()
        return step(change(start[1])).params, step._cache_size() - before

    ours, compiled = trained(
        opt.as_optax(opt.Descent(0.1)), lambda ts: ts.replace(opt_state=opt.adjust(ts.opt_state, 0.7))
    )
    grads = jax.grad(linen_loss)
    first = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, grads(PARAMS))
    near(ours, jax.tree.map(lambda p, g: p - 0.7 * g, first, grads(first)))
    assert compiled == 0


def test_the_updates_of_a_rule_are_applied_by_equinox() -> None:
    got, wanted = (eqx_by_optax(tx, 3) for tx in (opt.as_optax(opt.Adam(0.1)), optax.adam(0.1)))
    near(eqx.filter(got, eqx.is_inexact_array), eqx.filter(wanted, eqx.is_inexact_array), rtol=1e-4)


def test_a_transformation_without_parameters_says_what_to_write() -> None:
    tx = opt.as_optax(opt.AdamW(lam=0.1))
    with pytest.raises(opt.BadState) as caught:
        tx.update(SLOPES[0], tx.init(PLAIN))

    assert str(caught.value) == "as_optax(rule) needs the parameters; write tx.update(grads, state, params)"


def test_a_gradient_of_the_wrong_shape_in_a_transformation_is_named() -> None:
    tx = opt.as_optax(opt.Adam())
    with pytest.raises(opt.TreeMismatch, match=re.escape("gradient of shape (3,) for parameters of shape")):
        tx.update({"b": jnp.ones(3), "w": SLOPES[0]["w"]}, tx.init(PLAIN), PLAIN)


@pytest.mark.parametrize("given", [optax.adam(0.1), opt.Adam], ids=["a transformation", "a class"])
def test_as_optax_takes_rules_only(given: Any) -> None:
    with pytest.raises(opt.BadState):
        opt.as_optax(given).init(PLAIN)


# -- transformations of Optax here ---------------------------------------------------------------------------

WHOLE: dict[str, Any] = {
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(optax.linear_schedule(0.1, 0.0, 4))),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 2),
    "lamb": optax.lamb(0.1),
    "adafactor": optax.adafactor(0.1),
    "lbfgs": optax.lbfgs(0.05, linesearch=None),
}


@pytest.mark.parametrize("tx", WHOLE.values(), ids=WHOLE)
def test_a_transformation_of_optax_steps_a_whole_model(tx: Any) -> None:
    state, params = opt.setup(opt.from_optax(tx), PLAIN), PLAIN
    step = jax.jit(opt.update)
    for g in SLOPES:
        state, params = step(state, params, g)
    near(params, run(tx)[0], rtol=1e-3 if tx is WHOLE["lbfgs"] else 1e-5, atol=1e-5)


@pytest.mark.slow
@both_updates
def test_a_transformation_of_optax_steps_eagerly_and_models_of_any_kind(step: Callable[..., Any]) -> None:
    model = Perceptron()
    state = opt.setup(opt.from_optax(optax.adam(0.1)), model)
    state, new = step(state, model, eqx_slopes(model))
    wanted = eqx_by_optax(optax.adam(0.1), 1)
    near(eqx.filter(new, eqx.is_inexact_array), eqx.filter(wanted, eqx.is_inexact_array))

    assert new.act is model.act


def test_a_tied_array_counts_once_in_a_transformation_of_optax() -> None:
    x = jnp.asarray([1.0, 2.0])
    model = {"a": x, "b": x}
    state = opt.setup(opt.from_optax(optax.sgd(0.1)), model, ties=[("a", "b")])
    _, new = opt.update(state, model, {"a": jnp.ones(2), "b": jnp.full(2, 2.0)})

    assert new["a"] is new["b"]
    np.testing.assert_allclose(new["a"], x - 0.3, rtol=1e-6)


def test_the_state_of_a_transformation_of_optax_is_a_pytree_with_keys() -> None:
    state = opt.setup(opt.from_optax(optax.adam(0.1)), PLAIN)
    again = opt.setup(opt.from_optax(optax.adam(0.1)), PLAIN)
    tx = optax.adam(0.1)
    rule = opt.from_optax(tx)
    names = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(state)]

    assert len(names) == len(set(names)) == 5
    assert jax.tree.structure(jax.tree.map(lambda x: x, state)) == jax.tree.structure(state)
    assert jax.tree.structure(opt.setup(rule, PLAIN)) == jax.tree.structure(opt.setup(rule, PLAIN))
    assert len(jax.tree.leaves(again)) == 5


def valley(model: Any) -> Any:
    """Smallest at b = (0, 1), w = (0 1; 2 3)."""
    goal = {"b": jnp.arange(2.0), "w": jnp.arange(4.0).reshape(2, 2)}
    return sum(
        jnp.sum(s * (model[k] - goal[k]) ** 2)
        for k, s in (("b", 1.0), ("w", jnp.asarray([[1.0, 9], [3, 5]])))
    )


@pytest.mark.slow
def test_lbfgs_with_its_line_search_finds_the_bottom_of_a_valley() -> None:
    """It asks for the loss of models, and for its value and slope."""
    state, model = opt.setup(opt.from_optax(optax.lbfgs()), PLAIN), PLAIN

    @jax.jit
    def step(state: Any, model: Any) -> Any:
        value, grads = jax.value_and_grad(valley)(model)
        return state.stepped(model, grads, value=value, grad=grads, value_fn=valley)

    for _ in range(12):
        state, model = step(state, model)

    assert float(valley(model)) < 1e-6


@pytest.mark.parametrize("given", [opt.Adam(), opt.Adam, 0.1], ids=["a rule", "a class", "a number"])
def test_from_optax_takes_transformations_only(given: Any) -> None:
    with pytest.raises(opt.BadState) as caught:
        opt.from_optax(given)

    assert str(caught.value) == (
        f"from_optax takes a transformation of Optax, such as optax.adam(1e-3); {given!r} was given"
    )


def test_from_optax_steps_arrays_of_jax_only() -> None:
    with pytest.raises(opt.BadState) as caught:
        opt.setup(opt.from_optax(optax.adam(0.1)), {"w": np.ones(3)})

    assert str(caught.value) == "model['w'] is no array of JAX, which is what Optax steps"


def test_from_optax_needs_every_gradient_and_its_shape() -> None:
    state = opt.setup(opt.from_optax(optax.adam(0.1)), PLAIN)
    with pytest.raises(opt.TreeMismatch, match=r"grads\['w'\] is None"):
        opt.update(state, PLAIN, {"b": SLOPES[0]["b"], "w": None})
    with pytest.raises(
        opt.TreeMismatch, match=re.escape("gradient of shape (2,) for parameters of shape (2, 2)")
    ):
        opt.update(state, PLAIN, {"b": SLOPES[0]["b"], "w": jnp.ones(2)})
    with pytest.raises(opt.TreeMismatch):
        opt.update(state, PLAIN, {"b": SLOPES[0]["b"]})


def test_a_whole_state_has_no_leaf_to_freeze() -> None:
    state = opt.setup(opt.from_optax(optax.adam(0.1)), PLAIN)
    with pytest.raises(opt.BadState):
        opt.freeze(state)


# -- files ---------------------------------------------------------------------------------------------------

FILED = opt.Chain(opt.WeightDecay(0.01), opt.Adam(0.1))


def advanced() -> tuple[Any, Any]:
    """(state, parameters) after three steps, a rate of its own and a frozen part."""
    state, params = opt.setup(FILED, PARAMS), PARAMS
    for _ in range(3):
        state, params = opt.update(state, params, PARAMS)
    return opt.adjust(state, 0.025), params


def goes_on_alike(a: Any, b: Any, params: Any) -> None:
    """Both states are equal, and the next step is the same to the last bit."""
    assert a == b
    assert jax.tree.structure(a) == jax.tree.structure(b)
    (_, x), (_, y) = (opt.update(s, params, PARAMS) for s in (a, b))
    for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_array_equal(p, q)


def test_orbax_saves_and_restores_a_state(tmp_path: Path) -> None:
    state, params = advanced()
    with ocp.StandardCheckpointer() as files:
        files.save(tmp_path / "state", state)
        files.wait_until_finished()
        typed = files.restore(tmp_path / "state", opt.setup(FILED, PARAMS))
        shapes = files.restore(tmp_path / "state", jax.eval_shape(lambda: state))
        untyped = files.restore(tmp_path / "state")
    goes_on_alike(typed, state, params)
    goes_on_alike(shapes, state, params)

    assert isinstance(untyped, dict)
    assert len(untyped) == len(jax.tree.leaves(state))


def test_msgpack_of_flax_saves_and_restores_a_state() -> None:
    state, params = advanced()
    saved = serialization.to_bytes(state)
    goes_on_alike(serialization.from_bytes(opt.setup(FILED, PARAMS), saved), state, params)
    both = serialization.to_bytes({"params": params, "state": state})
    back = serialization.from_bytes({"params": PARAMS, "state": opt.setup(FILED, PARAMS)}, both)
    goes_on_alike(back["state"], state, params)
    near(back["params"], params, rtol=0, atol=0)


def test_a_file_of_another_rule_is_refused_by_name() -> None:
    state, _ = advanced()
    with pytest.raises(opt.TreeMismatch, match="the saved state is that of another model or rule"):
        serialization.from_bytes(opt.setup(opt.Momentum(), PARAMS), serialization.to_bytes(state))


@pytest.mark.slow
def test_flax_may_be_imported_after_the_state_was_made() -> None:
    script = (
        "import jax.numpy as jnp, optimisers as opt\n"
        "m = {'w': jnp.ones(2)}\n"
        "s = opt.setup(opt.Momentum(), m)\n"
        "s, m = opt.update(s, m, m)\n"
        "from flax import serialization\n"
        "assert serialization.from_bytes(opt.setup(opt.Momentum(), m), serialization.to_bytes(s)) == s"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr[-800:]


def test_equinox_saves_and_restores_a_state() -> None:
    state, params = advanced()
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    goes_on_alike(eqx.tree_deserialise_leaves(file, opt.setup(FILED, PARAMS)), state, params)


def test_a_train_state_with_a_rule_is_restored_by_msgpack() -> None:
    ts = TrainState.create(apply_fn=DENSE.apply, params=PARAMS, tx=opt.as_optax(opt.Adam(0.1)))
    later = ts.apply_gradients(grads=PARAMS)
    back = serialization.from_bytes(ts, serialization.to_bytes(later))

    assert back.opt_state == later.opt_state
    near(back.params, later.params, rtol=0, atol=0)
