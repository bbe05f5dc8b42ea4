"""Norms whose squares are no numbers of their type, too large or too small. `math.hypot` has them right."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers.engines.cpu import threads

SIZES = {
    "float32": (1e38, 1e-38, 1e-44, 1.0),
    "float64": (1e300, 3e-300, 5e-322, 1e160, 1e-170, 1.0),
    "complex64": (1e38, 1e-38),
    "complex128": (1e300, 1e-300),
}
CASES = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]


def gradients(dtype: str, size: float) -> list[Any]:
    """Of several chunks, of one, and none; the first array has elements of other sizes beside those."""
    rng = np.random.default_rng(0)
    long, short = rng.uniform(0.1, 0.2, 150_000), np.array([[0.5, -1.0], [0.0, 0.25]])
    long[7], long[-3] = 1e-30, 0.0
    found = [long * size / 100, short * size, np.zeros(5)]
    if dtype.startswith("complex"):
        found = [g * (0.6 - 0.8j) for g in found]
    return [g.astype(dtype) for g in found]


def length(*arrays: Any) -> float:
    """The norm of all elements together."""
    parts = [p for a in arrays for p in (a.real, a.imag)] if np.iscomplexobj(arrays[0]) else arrays
    return math.hypot(*(float(v) for p in parts for v in p.ravel()))


def steps(rule: opt.Rule, grads: list[Any], engine: str, library: str = "numpy") -> list[Any]:
    """What a step takes from parameters that are zero, at a rate of 1."""
    chain = opt.Chain(rule, opt.Descent(1.0))
    wrap = {"numpy": np.array, "torch": torch.tensor}[library]
    model = [wrap(np.zeros_like(g)) for g in grads]
    state = opt.setup(chain, model, engine=engine)
    _, model = opt.update(state, model, [wrap(g) for g in grads])
    return [-np.asarray(x) for x in model]


def agree(found: list[Any], grads: list[Any], sizes: list[float], omega: float) -> None:
    for f, g, size in zip(found, grads, sizes, strict=True):
        wanted = g * (omega / size) if size > omega else g
        rtol = 1e-12 if g.dtype.name in ("float64", "complex128") else 3e-7
        np.testing.assert_allclose(f, wanted, rtol=rtol, atol=float(np.finfo(g.dtype).smallest_subnormal))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("engine", ["interpret", "numba"])
@pytest.mark.parametrize(("dtype", "size"), CASES)
def test_gradients_are_clipped_to_the_norm_they_have(
    dtype: str, size: float, engine: str, library: str
) -> None:
    grads = gradients(dtype, size)
    omega = size / 8
    own = [length(g) for g in grads]
    agree(steps(opt.ClipNorm(omega), grads, engine, library), grads, own, omega)
    whole = [length(*grads)] * len(grads)
    agree(steps(opt.ClipGlobalNorm(omega), grads, engine, library), grads, whole, omega)


@pytest.mark.parametrize("engine", ["interpret", "numba"])
def test_leaves_of_very_different_sizes_have_one_norm(engine: str) -> None:
    grads = [np.full(3, 1e300), np.full(70_000, 1e-300), np.ones(2)]
    found = steps(opt.ClipGlobalNorm(1.0), grads, engine)
    np.testing.assert_allclose(found[0], 1 / math.sqrt(3), rtol=1e-12)
    assert not found[1].any()
    np.testing.assert_allclose(found[2], 1e-300 / math.sqrt(3), rtol=1e-12)


@pytest.mark.parametrize("engine", ["interpret", "numba"])
def test_groups_of_several_types_have_one_norm(engine: str) -> None:
    grads = [np.full(2, 3e300), np.full(2, 1e38, np.float32), np.full(2, 4e300 + 0j)]
    found = steps(opt.ClipGlobalNorm(5.0), grads, engine)
    np.testing.assert_allclose(found[0], 3 / math.sqrt(2), rtol=1e-12)
    np.testing.assert_allclose(found[2], 4 / math.sqrt(2), rtol=1e-12)


@pytest.mark.parametrize("engine", ["interpret", "numba"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_or_spreads(bad: float, engine: str) -> None:
    grads = [np.full(3, 1e300), np.array([1.0, bad])]
    with pytest.raises(opt.DomainError, match=r"grads\[1\]"):
        steps(opt.ClipGlobalNorm(1.0), grads, engine)
    found = steps(opt.ClipGlobalNorm(1.0, throw=False), grads, engine)
    assert not np.isfinite(found[1][1])


@pytest.mark.parametrize("size", [1e38, 1e-38, 1.0])
@pytest.mark.parametrize("engine", [None, "interpret"])
@pytest.mark.parametrize("jit", [False, True])
def test_so_it_is_under_jax_without_float64(size: float, engine: str | None, *, jit: bool) -> None:
    grads = gradients("float32", size)
    omega = size / 8
    for rule, sizes in (
        (opt.ClipNorm(omega, throw=False), [length(g) for g in grads]),
        (opt.ClipGlobalNorm(omega, throw=False), [length(*grads)] * 3),
    ):
        model = [jnp.zeros(g.shape, g.dtype) for g in grads]
        state = opt.setup(opt.Chain(rule, opt.Descent(1.0)), model, engine=engine)
        step = jax.jit(opt.update) if jit else opt.update
        _, model = step(state, model, [jnp.asarray(g) for g in grads])
        for f, g, own in zip(model, grads, sizes, strict=True):
            wanted = g * (omega / own) if own > omega else g
            # XLA takes numbers below the normal ones for 0
            np.testing.assert_allclose(-np.asarray(f), wanted, rtol=2e-6, atol=1.2e-38)


def test_a_norm_has_the_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [np.random.default_rng(n).standard_normal(400_000).astype(np.float32) for n in range(2)]
    found = set[bytes]()
    for count in (1, 2, 3, 5):
        monkeypatch.setattr(threads, "available", lambda count=count: count)
        found.add(b"".join(x.tobytes() for x in steps(opt.ClipGlobalNorm(1.0), grads, "numba")))
    assert len(found) == 1


@pytest.mark.parametrize("library", [np, torch, jnp])
def test_norms_of_plain_arrays_are_right_too(library: Any) -> None:
    kind = library.float32 if library is jnp else library.float64
    size = 1e38 if library is jnp else 1e300
    x = library.asarray(np.array([3.0, 0.0, -4.0]) * size / 4, dtype=kind)
    assert float(opt.norm(x)) == pytest.approx(1.25 * size)
    assert float(opt.norm(x * 0)) == 0
    assert math.isnan(float(opt.norm(x * math.nan)))
    assert float(opt.norm(x[:0])) == 0
    rows = opt.ops.norm2(library.stack([x, x / 2]), axis=1)
    np.testing.assert_allclose(np.asarray(rows), [1.25 * size, 0.625 * size], rtol=1e-6)


def test_a_total_is_a_sum_a_norm_or_the_largest() -> None:
    assert opt.total(-3.0) == -3.0
    assert opt.total(-3.0, p=2) == opt.total(-3.0, p=math.inf) == 3.0
    with pytest.raises(opt.TraceError, match=r"p=3\); it takes 1 for the sum, 2 .*, or inf for"):
        opt.total(3.0, p=3)


@pytest.mark.parametrize("engine", [None, "interpret"])
@pytest.mark.parametrize("size", [3e38, math.inf, math.nan])
@pytest.mark.parametrize("rule", [opt.ClipNorm(1.0), opt.ClipGlobalNorm(1.0)], ids=repr)
def test_inside_jit_a_norm_that_is_no_number_is_seen(rule: opt.Rule, size: float, engine: Any) -> None:
    """Outside the check raises; there nothing can, and a step of 0 would be taken for one."""
    with jax.enable_x64(False):
        model = {"a": jnp.zeros(2), "b": jnp.zeros(70_000)}
        grads = {"a": jnp.full(2, size, jnp.float32), "b": jnp.ones(70_000)}
        state = opt.setup(opt.Chain(rule, opt.Descent(1.0)), model, engine=engine)
        with pytest.raises(opt.DomainError, match="norm"):
            opt.update(state, model, grads)
        _, new = jax.jit(opt.update)(state, model, grads)

        assert np.isnan(new["a"]).all()


def test_inside_jit_a_check_that_is_skipped_spoils_nothing() -> None:
    rule = opt.SkipNonFinite(opt.Chain(opt.ClipNorm(1.0), opt.Descent(1.0)))
    model = {"a": jnp.zeros(2)}
    state, new = jax.jit(opt.update)(opt.setup(rule, model), model, {"a": jnp.full(2, jnp.inf)})

    assert new["a"].tolist() == [0.0, 0.0]
    _, new = jax.jit(opt.update)(state, new, {"a": jnp.array([3.0, 4.0])})
    np.testing.assert_allclose(new["a"], [-0.6, -0.8], rtol=1e-6)


class Shared(opt.Rule):
    """Keeps a root that it also sums, beside the sum of squares that it does not keep."""

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        root = opt.sqrt(opt.ops.abs(dx))
        step = opt.ops.sum(root) / x.size + opt.sqrt(opt.ops.sum(dx * dx * dx * dx)) / opt.norm(dx) ** 2
        return root, step + 0 * x


def test_what_is_kept_is_summed_as_it_is_and_what_is_not_in_double_precision() -> None:
    text = opt.kernel(Shared(), np.float32).split("One pass")[1]
    assert "t1 = math.sqrt(t0)" in text
    assert "t2 = float64(dx) * float64(dx)" in text
    assert 'loader("float32", 0, 1, "float32")' in text
    for size in (1e-30, 1.0, 1e30):
        g = np.full(1000, size, np.float32)
        state, x = opt.update(opt.setup(Shared(), g, engine="numba"), np.zeros_like(g), g)
        np.testing.assert_allclose(x, -math.sqrt(size) - 1 / math.sqrt(1000), rtol=1e-6)
        assert (state.state == np.sqrt(g)).all()


BY_NORMS: dict[str, opt.Rule] = {
    "to a norm that float32 hardly has": opt.ClipNorm(1e-6),
    "to the cubic mean": opt.ClipNorm(0.5, 3.0),
    "to the largest": opt.ClipNorm(0.5, math.inf),
    "all arrays": opt.ClipGlobalNorm(1.0),
    "by rows": opt.AdaptiveClip(epsilon=1.0),
    "root mean square": opt.ClipRMS(0.5),
    "normalised": opt.NormalizeGrad(2.0),
    "grown": opt.NormGrowthCap(1.5),
    "outliers": opt.ZClip(0.9, 2.5, 1.0, 1),
}
STEPS: dict[str, opt.Rule] = {
    **{name: opt.Chain(rule, opt.Descent(1.0)) for name, rule in BY_NORMS.items()},
    "LARS": opt.LARS(0.5, 0.9, trust=0.1),
    "LARS apart": opt.LARS(0.5, 0.9, trust=0.1, apart=True),
    "NovoGrad": opt.NovoGrad(0.1),
    "DoG": opt.DoG(1.0, 1e-2),
    "LDoG": opt.LDoG(1.0, 1e-2),
    "DoWG": opt.DoWG(1.0, 1e-2),
    "DAdaptSGD": opt.DAdaptSGD(1.0, 0.5, d0=1e-2),
}


@pytest.mark.parametrize("world", ["numpy", "numba", "jitted"])
@pytest.mark.parametrize("rule", STEPS.values(), ids=STEPS)
def test_a_step_by_norms_is_that_of_float64(rule: opt.Rule, world: str) -> None:
    """The formula itself, in numbers whose squares are never too large, says what float32 should find."""
    draws = np.random.default_rng(0).uniform(0.2, 1.0, (2, 3, 4)).astype(np.float32)
    engine = {"numpy": "interpret", "numba": "numba", "jitted": None}[world]
    step = jax.jit(opt.update) if world == "jitted" else opt.update
    wrap: Any = jnp.asarray if world == "jitted" else np.array
    with jax.enable_x64(False):
        start = opt.setup(rule, wrap(np.ones((3, 4), np.float32)), engine=engine)
        for size in (1e-30, 1e19, 2e25, 8e37):
            x, kept = np.ones((3, 4)), rule.init(np.ones((3, 4)))
            state, found = start, wrap(x.astype(np.float32))
            for draw in draws:
                g = (draw * size).astype(np.float32)
                kept, by = rule.apply(kept, x, g.astype(np.float64))
                x = x - by
                state, found = step(state, found, wrap(g))
                np.testing.assert_allclose(np.asarray(found), x, rtol=2e-5, atol=2e-6, err_msg=f"{size:g}")
