"""Rules with noise: how much there is, what a walk samples, and what the gradients of examples become."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.tensors import array, tensor


def test_the_variance_of_added_noise_falls_with_the_steps() -> None:
    n = 200_000
    x, zeros = np.zeros(n), np.zeros(n)
    state = opt.setup(opt.Chain(opt.AddNoise(0.3, 0.7, seed=2), opt.Descent(1.0)), x)
    for t in range(4):
        before = x
        state, x = opt.update(state, x, zeros)
        noise = before - x

        assert np.allclose(noise, np.sqrt(0.3 / (1 + t) ** 0.7) * opt.ops.normal(zeros, 2, step=t))
        assert noise.var() == pytest.approx(0.3 / (1 + t) ** 0.7, rel=5 * np.sqrt(2 / n))
        assert abs(noise.mean()) < 5 * np.sqrt(0.3 / n)


def test_each_part_of_complex_gradients_has_the_noise_of_a_real_one() -> None:
    x = np.zeros(100_000, complex)
    _, new = opt.update(opt.setup(opt.SGLD(0.1, 2.0), x), x, x)

    assert new.real.var() == pytest.approx(0.4, rel=0.03)
    assert new.imag.var() == pytest.approx(0.4, rel=0.03)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_langevin_dynamics_sample_a_normal_distribution(temperature: float) -> None:
    """Of the loss a (x - b)^2 / 2 the walk has the mean b and the variance T / (a (1 - eta a / 2))."""
    n, a, b, eta = 100_000, np.array([[1.0], [4.0]]), np.array([[0.5], [-2.0]]), 0.2
    x = np.zeros((2, n))
    state = opt.setup(opt.SGLD(eta, temperature, seed=8), x)
    for _ in range(60):
        state, x = opt.update_(state, x, a * (x - b))
    wanted = temperature / (a * (1 - eta * a / 2))

    assert np.abs(x.mean(1, keepdims=True) - b).max() < 5 * np.sqrt(wanted.max() / n)
    assert x.var(1) == pytest.approx(wanted.ravel(), rel=5 * np.sqrt(2 / n))


def test_at_no_temperature_the_walk_is_descent() -> None:
    x = np.ones(3)
    _, walked = opt.update(opt.setup(opt.SGLD(0.1, 0.0), x), x, x)

    assert (walked == x - 0.1 * x).all()


@pytest.mark.parametrize("make", [opt.AddNoise, opt.SGLD, opt.PrivateAggregate])
def test_a_seed_that_engines_cannot_hold_is_refused(make: Callable[..., opt.Rule]) -> None:
    for seed in (-1, 1 << 24):
        with pytest.raises(opt.BadSetting, match=r"seed is .* from 0 to 16777215"):
            make(seed=seed)
    with pytest.raises(opt.BadSetting, match="whole number"):
        make(seed=0.5)


# -- the gradients of single examples ------------------------------------------------------------------------

SHAPES = {"w": (2, 3), "b": (3,), "s": ()}


def model() -> dict[str, Any]:
    return {k: np.zeros(shape) for k, shape in SHAPES.items()}


def examples(n: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal((n, *shape)) for k, shape in SHAPES.items()}


def private(grads: dict[str, Any], omega: float, sigma: float, seed: int, step: int = 0) -> dict[str, Any]:
    """Algorithm 1 of the paper, example by example."""
    n = len(grads["s"])
    total = {k: np.zeros(SHAPES[k]) for k in grads}
    for i in range(n):
        norm = np.sqrt(sum(np.sum(g[i] ** 2) for g in grads.values()))
        for k, g in grads.items():
            total[k] += g[i] / max(1, norm / omega)
    noise = {k: opt.ops.normal(total[k], seed, step=step, leaf=(k,)) for k in grads}
    return {k: (total[k] + sigma * omega * noise[k]) / n for k in grads}


def put_jax(a: Any) -> Any:
    return pytest.importorskip("jax.numpy").array(a)


@pytest.mark.parametrize("put", [np.array, tensor, put_jax], ids=["numpy", "torch", "jax"])
@pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)
def test_examples_are_clipped_over_the_whole_model(put: Any, step: Any) -> None:
    x = {k: put(v) for k, v in model().items()}
    state = opt.setup(opt.Chain(opt.PrivateAggregate(2.0, 0.4, seed=6), opt.Descent(1.0)), x)
    for t, n in enumerate((5, 5, 1)):
        grads = examples(n, t)
        before = {k: array(v) if hasattr(v, "detach") else np.array(v) for k, v in x.items()}
        state, x = step(state, x, {k: put(g) for k, g in grads.items()})
        for k, want in private(grads, 2.0, 0.4, 6, t).items():
            got = before[k] - np.asarray(x[k], float)
            assert np.abs(got - want).max() < (1e-6 if put is put_jax else 1e-12)


def test_frozen_arrays_and_those_without_gradients_count_in_no_norm() -> None:
    grads, x = examples(4), model()
    state = opt.freeze(opt.setup(opt.PrivateAggregate(0.5, 0.0), x), "b")
    _, new = opt.update(state, x, {**grads, "b": None, "s": None})
    norms = np.sqrt((grads["w"] ** 2).sum((1, 2)))

    assert np.allclose(new["w"], -(grads["w"] * np.minimum(1, 0.5 / norms)[:, None, None]).mean(0))
    assert new["b"] is x["b"]


def test_rules_of_an_array_clip_by_their_own_setting_at_their_clock() -> None:
    grads, x = examples(3), model()
    state = opt.setup(opt.PrivateAggregate(lambda clock: 0.5 * (1 + clock), 0.0), x)
    state = opt.adjust(state, omega=0.1, where="b")
    norms = np.sqrt(sum((g.reshape(3, -1) ** 2).sum(1) for g in grads.values()))
    for clock in (0, 1):
        before = x
        state, x = opt.update(state, x, grads)
        for k, omega in (("w", 0.5 * (1 + clock)), ("b", 0.1)):
            weights = np.minimum(1, omega / norms).reshape(3, *[1] * len(SHAPES[k]))
            assert np.allclose(before[k] - x[k], (weights * grads[k]).mean(0))


def test_jit_and_vmap_take_gradients_of_examples() -> None:
    jax = pytest.importorskip("jax")
    x = {k: jax.numpy.array(v) for k, v in model().items()}
    grads = examples(5)

    @jax.jit
    def step(omega: Any) -> Any:
        state = opt.setup(opt.PrivateAggregate(omega, 0.4, seed=6), x)
        return opt.update(state, x, {k: jax.numpy.array(g) for k, g in grads.items()})[1]

    many = jax.vmap(step)(jax.numpy.array([2.0, 0.3]))
    for i, omega in enumerate((2.0, 0.3)):
        for k, want in private(grads, omega, 0.4, 6).items():
            assert np.abs(np.asarray(step(omega)[k]) + want).max() < 1e-6
            assert np.abs(np.asarray(many[k][i]) + want).max() < 1e-6


def test_a_tied_transpose_sums_the_gradients_of_each_example() -> None:
    w = np.zeros((2, 2))
    g = np.random.default_rng(0).standard_normal((2, 3, 2, 2))
    x = {"a": w, "b": w.T}
    _, new = opt.update(opt.setup(opt.PrivateAggregate(1e9, 0.0), x), x, {"a": g[0], "b": g[1]})

    assert np.allclose(new["a"], -(g[0] + g[1].transpose(0, 2, 1)).mean(0))


def test_gradients_without_their_axis_are_refused_by_path() -> None:
    x, grads = model(), examples(4)
    state = opt.setup(opt.PrivateAggregate(), x)
    with pytest.raises(opt.TreeMismatch, match=r"shape \(3,\).*grads\['b'\].*\(examples, 3\).*jax.vmap"):
        opt.update(state, x, {**grads, "b": grads["b"][0]})
    with pytest.raises(opt.TreeMismatch, match=r"of 4 at grads\['w'\] and of 3 at grads\['b'\]"):
        opt.update(state, x, {**grads, "b": grads["b"][:3]})
    with pytest.raises(opt.TreeMismatch, match="no example"):
        opt.update(state, x, examples(0))
    with pytest.raises(opt.TreeMismatch, match=r"of type float for .*grads\['s'\]"):
        opt.update(state, x, {**grads, "s": 1.0})
    plain = opt.setup(opt.Descent(), x)
    with pytest.raises(opt.TreeMismatch, match=r"shape \(4, 2, 3\) for parameters of shape \(2, 3\)"):
        opt.update(plain, x, grads)


def test_gradients_of_examples_come_first() -> None:
    for rules in ((opt.Adam(), opt.PrivateAggregate()), (opt.PrivateAggregate(), opt.PrivateAggregate())):
        with pytest.raises(opt.BadSetting, match=r"write it first, Chain\(PrivateAggregate\(\), ...\)"):
            opt.Chain(*rules)
    opt.Lookahead(opt.Chain(opt.PrivateAggregate(), opt.Descent()))


def test_how_many_examples_there_are_is_known_in_an_update_alone() -> None:
    with pytest.raises(opt.TraceError, match="outside of an update"):
        opt.PrivateAggregate().apply((), np.zeros(2), np.zeros(2))
