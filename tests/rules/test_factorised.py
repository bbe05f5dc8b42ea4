"""Rules with factorisations: Shampoo, SOAP, SPlus, Kron, GaLore, Dion, PolarGrad.

Their paths beside the packages stand among the golden cases; here are their parts, against other formulas,
and every library and engine against the rule on plain arrays.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.rules import kron as kron_module
from optimisers.settings import adjusted
from tests import modern
from tests.table import FACTORISED

SHAPES = ((4, 4), (5, 4), (4, 5))
"""No axis is so long that gradients leave a part of it out: eigenvectors there are anything."""

every_rule = pytest.mark.parametrize("rule", FACTORISED.values(), ids=FACTORISED.keys())


def drawn(seed: int, shapes: Any = SHAPES, dtype: str = "float64") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"x{i}": rng.standard_normal(shape).astype(dtype) for i, shape in enumerate(shapes)}


def by_hand(rule: opt.Rule, model: dict[str, Any], gradients: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the rule leads on plain arrays of NumPy, its `apply` called leaf by leaf."""
    found: dict[str, Any] = {}
    for name, x in model.items():
        state = rule.init(x)
        for t, grads in enumerate(gradients):
            with Told(name, t):
                state, step = rule.apply(state, x, grads[name])
            x = x - step  # noqa: PLW2901 the parameter moves on
        found[name] = x
    return found


class Told:
    """A scope in which random numbers of plain arrays are those of a leaf and a step."""

    def __init__(self, name: str, t: int) -> None:
        self.name, self.t = name, t

    def __enter__(self) -> None:
        from optimisers.rules import lowrank

        self.rooms = (kron_module, lowrank)
        self.normal = opt.ops.normal
        for room in self.rooms:
            setattr(room, "normal", self.drawn)  # noqa: B010 a type checker knows modules as they are

    def __exit__(self, *_: object) -> None:
        for room in self.rooms:
            setattr(room, "normal", self.normal)  # noqa: B010

    def drawn(self, x: Any, seed: Any) -> Any:
        return self.normal(x, seed, step=self.t, leaf=(self.name,))


GRADIENTS = [drawn(10 + t) for t in range(7)]


@pytest.mark.parametrize("engine", ["numba", "interpret"])
@pytest.mark.parametrize("step", [opt.update, opt.update_], ids=["pure", "in place"])
@every_rule
def test_numpy_steps_as_the_rule_on_plain_arrays(
    rule: opt.Rule, step: Callable[..., Any], engine: str
) -> None:
    model = drawn(0)
    wanted = by_hand(rule, model, GRADIENTS)
    state = opt.setup(rule, model, engine=engine)
    for grads in GRADIENTS:
        state, model = step(state, model, grads)

    for name, x in wanted.items():
        np.testing.assert_allclose(model[name], x, atol=1e-9)


@every_rule
def test_long_rows_and_many_matrices_go_the_same_way(rule: opt.Rule) -> None:
    """Passes go over rows of this length, and stacks through the products in blocks."""
    shapes = ((48, 48), *[(40, 40)] * 3)
    model, gradients = drawn(0, shapes), [drawn(50 + t, shapes) for t in range(3)]
    wanted = by_hand(rule, model, gradients)
    state = opt.setup(rule, model)
    for grads in gradients:
        state, model = opt.update_(state, model, grads)

    for name, x in wanted.items():
        np.testing.assert_allclose(model[name], x, atol=1e-9)


@pytest.mark.parametrize("library", ["torch", "jax"])
@every_rule
def test_other_libraries_step_so_too(rule: opt.Rule, library: str) -> None:
    pytest.importorskip(library)
    face = modern.FACES[library]
    wanted = by_hand(rule, drawn(0), GRADIENTS)
    with modern.precise(library):
        model: Any = {k: face.array(x) for k, x in drawn(0).items()}
        state, step = opt.setup(rule, model), face.step()
        for grads in GRADIENTS:
            state, model = step(state, model, {k: face.array(g) for k, g in grads.items()})

        for name, x in wanted.items():
            np.testing.assert_allclose(face.numpy(model[name]), x, atol=1e-9)


@every_rule
def test_float32_stays_near_float64(rule: opt.Rule) -> None:
    wide, narrow = drawn(0), {k: x.astype("float32") for k, x in drawn(0).items()}
    for model, dtype in ((wide, "float64"), (narrow, "float32")):
        state = opt.setup(rule, model)
        for grads in GRADIENTS:
            state, _ = opt.update_(state, model, {k: g.astype(dtype) for k, g in grads.items()})

    for name, x in wide.items():
        assert np.abs(narrow[name] - x).max() < 2e-3 * np.abs(x - drawn(0)[name]).max()


# -- the parts, by other formulas ----------------------------------------------------------------------------


def stepped(rule: opt.Rule, count: int, shape: tuple[int, ...] = (4, 5)) -> tuple[Any, Any, list[Any]]:
    """(state, parameters, gradients) after some steps of one array."""
    model, gradients = drawn(0, (shape,)), [drawn(20 + t, (shape,)) for t in range(count)]
    state = opt.setup(rule, model)
    for grads in gradients:
        state, model = opt.update(state, model, grads)
    return state["x0"].state, model["x0"], [g["x0"] for g in gradients]


def test_shampoo_keeps_inverse_fourth_roots_of_mean_grams() -> None:
    """Their fourth powers, multiplied out, times the Gram matrices are the identity."""
    state, _, gradients = stepped(opt.Shampoo(0.1, (0.9, 0.8), epsilon=1e-3, every=1), 6)
    for axis, root in enumerate(state.roots):
        gram, weight = np.zeros(root.shape), 0.0
        for g in gradients:
            g = g.T if axis else g  # noqa: PLW2901 axis first
            gram, weight = 0.8 * gram + 0.2 * g @ g.T, 0.8 * weight + 0.2
        fourth = root @ root @ root @ root
        np.testing.assert_allclose(
            fourth @ (gram / weight + 1e-3 * np.eye(len(gram))), np.eye(len(gram)), atol=1e-8
        )


def test_shampoo_steps_as_long_as_adam() -> None:
    grafted = opt.Shampoo(0.1, (0.9, 0.99), graft_beta=0.95, graft_epsilon=1e-6)
    model, grads = drawn(0), drawn(1)
    _, after = opt.update(opt.setup(grafted, model), model, grads)
    _, adam = opt.update(opt.setup(opt.Adam(0.1, (0.9, 0.95), 1e-6), model), model, grads)
    for name, x in model.items():
        assert np.linalg.norm(after[name] - x) == pytest.approx(np.linalg.norm(adam[name] - x), rel=1e-12)
        assert not np.allclose(after[name], adam[name])


def test_soap_takes_no_step_at_the_first_gradient_and_is_adam_without_bases() -> None:
    """By Adam with its epsilon before the bias is taken away, written out."""
    rule = opt.SOAP(0.1, (0.9, 0.8), 0.05, 1e-4, max_dim=1)
    model, gradients = drawn(0), [drawn(30 + t) for t in range(5)]
    x = model["x0"]
    m, v = np.zeros_like(x), np.zeros_like(x)
    state = opt.setup(rule, model)
    for t, grads in enumerate(gradients):
        state, model = opt.update(state, model, grads)
        if t:
            m, v = 0.9 * m + 0.1 * grads["x0"], 0.8 * v + 0.2 * grads["x0"] ** 2
            step = np.sqrt(1 - 0.8**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-4)
            x = x - 0.1 * (step + 0.05 * x)
        np.testing.assert_allclose(model["x0"], x, rtol=1e-12)


def test_soap_keeps_orthonormal_bases_near_the_eigenvectors() -> None:
    """With one gradient again and again they are those of its Gram matrices."""
    model, grads = drawn(0, ((4, 5),)), drawn(1, ((4, 5),))
    state = opt.setup(opt.SOAP(0.01, every=1), model)
    for _ in range(30):
        state, model = opt.update(state, model, grads)
    left, right = state["x0"].state.bases
    u, _, vh = np.linalg.svd(grads["x0"])
    np.testing.assert_allclose(np.abs(left.T @ u), np.eye(4), atol=1e-6)
    np.testing.assert_allclose(np.abs(right.T @ vh.T)[:4, :4], np.eye(4), atol=1e-6)
    np.testing.assert_allclose(right.T @ right, np.eye(5), atol=1e-12)


def test_kron_walks_the_paths_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose random numbers the cases hold, whose step has the noise of the fit in it, and which folds arrays
    into matrices otherwise: the rule does neither, so both are put in here.
    """
    cases = [c for c in modern.CASES if c["rule"] == "Kron"]
    assert len(cases) == 2
    monkeypatch.setattr(kron_module, "folded", lambda shape: (int(np.prod(shape[:-1])), shape[-1]))
    for case in cases:
        settings = {k: v for k, v in case["rule_settings"].items() if k not in ("rule", "noisy_step")}
        rule = opt.Kron(often=(1.0, 1.0), **settings)
        for j, x in enumerate(np.array(x0) for x0 in case["x0"]):
            state = rule.init(x)
            for t, grads in enumerate(case["grads"]):
                v = np.array(case["inputs"]["randoms"][t][j])
                monkeypatch.setattr(kron_module, "normal", lambda *_, v=v: v)
                state, _ = rule.apply(state, x, np.array(grads[j]))
                x = x - noisy_step(rule, state, x, v)  # noqa: PLW2901 the parameter moves on
                np.testing.assert_allclose(x, np.array(case["xs"][t][j]), atol=1e-11)


def noisy_step(rule: Any, state: Any, x: Any, v: Any) -> Any:
    """The step of the package, from the momentum and the factors of a state."""
    rows = (int(np.prod(x.shape[:-1])), x.shape[-1]) if x.ndim > 1 else (x.size, 1)
    w = (state.m / state.weight).reshape(rows)
    u = w + 2**-11.5 * np.abs(w).mean() * v.reshape(rows)
    left, *right = state.factors
    u = left.T @ (left @ u) if left.shape[1] > 1 or x.ndim > 1 else left * left * u
    u = u @ right[0].T @ right[0] if right else u
    u = u * min(1, 1.1 / (np.sqrt((u * u).mean()) + 1e-12))
    return rule.eta * (u.reshape(x.shape) + (rule.lam * x if x.ndim > 1 else 0))


def test_kron_whitens() -> None:
    """Fitted to gradients of one covariance C, the preconditioner nears C^(-1/2), up to a number."""
    rng = np.random.default_rng(0)
    root = np.diag([3.0, 1.0, 0.3])
    rule = opt.Kron(0.0, 0.0, often=(1.0, 1.0), precond_eta=lambda t: 0.2 / (1 + 0.01 * t))
    model: Any = {"x": np.zeros((3, 3))}
    state = opt.setup(rule, model)
    for _ in range(800):
        state, model = opt.update(state, model, {"x": root @ rng.standard_normal((3, 3))})
    left, right = state["x"].state.factors
    found = np.diag(left.T @ left @ root)
    np.testing.assert_allclose(found / found.mean(), 1, atol=0.15)
    assert np.linalg.cond(right.T @ right) < 1.5


def test_galore_stays_in_the_space_that_it_found() -> None:
    """Until it is renewed, steps are of the rank it is given, on the shorter side."""
    for shape in ((6, 4), (4, 6)):
        model = drawn(0, (shape,))
        state = opt.setup(opt.GaLore(0.1, rank=2, every=5), model)
        for t in range(5):
            state, after = opt.update(state, model, drawn(40 + t, (shape,)))
            assert np.linalg.matrix_rank(after["x0"] - model["x0"], tol=1e-9) == 2
        leaf = state["x0"].state
        assert leaf.adam.m.shape == ((6, 2) if shape == (6, 4) else (2, 6))
        u, _, vh = np.linalg.svd(drawn(40, (shape,))["x0"])
        leading = vh[:2].T if shape == (6, 4) else u[:, :2]
        np.testing.assert_allclose(np.abs(leading.T @ leaf.basis), np.eye(2), atol=1e-9)


def test_dion_of_full_rank_without_momentum_is_a_polar_factor() -> None:
    """P Q^T with Q from power iteration on one gradient again and again."""
    model, grads = drawn(0, ((4, 4),)), drawn(1, ((4, 4),))
    state = opt.setup(opt.Dion(0.1, 0.0, 0.0, rank=4), model)
    u, _, vh = np.linalg.svd(grads["x0"])
    before = model["x0"]
    for _ in range(60):
        before = model["x0"]
        state, model = opt.update(state, model, grads)
    np.testing.assert_allclose((before - model["x0"]) / 0.1, u @ vh, atol=1e-4)


def test_polar_gradient_is_as_long_as_the_nuclear_norm() -> None:
    model, grads = drawn(0, ((4, 5),)), drawn(1, ((4, 5),))
    u, s, vh = np.linalg.svd(grads["x0"], full_matrices=False)
    for rule in (opt.PolarGrad(0.1, 0.0), opt.PolarGrad(0.1, 0.0, coefficients="exact", steps=30)):
        _, after = opt.update(opt.setup(rule, model), model, grads)
        np.testing.assert_allclose(after["x0"], model["x0"] - 0.1 * s.sum() * u @ vh, atol=1e-9)


@every_rule
def test_a_matrix_is_found(rule: opt.Rule) -> None:
    """From inputs of which some directions count a hundred times as much as others."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((5, 50)) * np.array([[3.0], [2.0], [1.0], [0.5], [0.3]])
    model, target = drawn(0, ((4, 5),)), rng.standard_normal((4, 5))

    def loss(w: Any) -> float:
        return float(np.mean(((w - target) @ inputs) ** 2))

    before = loss(model["x0"])
    rate = 1.0 if getattr(rule, "graft", "adam") is None else 0.1  # sums make steps short by themselves
    falling = adjusted(rule, {"lam": 0.0, "eta": opt.Linear(rate, 0.001, 600)})
    state = opt.setup(falling, model)
    for _ in range(600):
        grads = {"x0": (model["x0"] - target) @ inputs @ inputs.T / 50}
        state, model = opt.update(state, model, grads)
    assert loss(model["x0"]) < 0.01 * before


# -- what goes wrong -----------------------------------------------------------------------------------------


@every_rule
def test_gradients_of_zero_move_nothing_but_the_decay(rule: opt.Rule) -> None:
    still = adjusted(rule, {"lam": 0.0})
    model = drawn(0)
    state = opt.setup(still, model)
    for _ in range(3):
        state, after = opt.update(state, model, {k: 0 * x for k, x in model.items()})
        for name, x in model.items():
            np.testing.assert_array_equal(after[name], x)


@every_rule
def test_gradients_of_one_direction_are_finite(rule: opt.Rule) -> None:
    """Of rank 1, of huge and of tiny size, in float32."""
    explodes = getattr(rule, "graft", "adam") is None  # without the length of another rule
    for size in (1.0, 1e-15) if explodes else (1.0, 1e15, 1e-15):
        model = drawn(0, ((6, 4),), "float32")
        grads = {"x0": np.float32(size) * np.outer(np.arange(1, 7), np.arange(1, 5)).astype("float32")}
        state = opt.setup(rule, model)
        for _ in range(4):
            state, model = opt.update(state, model, grads)
        limit = 1e18 if isinstance(rule, opt.PolarGrad) else 100
        assert np.abs(model["x0"]).max() < limit, size


@every_rule
def test_a_gradient_that_is_nan_spoils_its_own_array_alone(rule: opt.Rule) -> None:
    model, grads = drawn(0), drawn(1)
    grads["x1"] = np.full_like(grads["x1"], np.nan)
    state, after = opt.update(opt.setup(rule, model), model, grads)
    _, after = opt.update(state, after, drawn(2))
    assert np.isnan(after["x1"]).any()
    assert np.isfinite(after["x0"]).all()
    assert np.isfinite(after["x2"]).all()


def test_dion_refuses_what_is_no_matrix() -> None:
    with pytest.raises(opt.BadSetting, match=r"x0.*\(3,\)|\(3,\).*x0"):
        opt.setup(opt.Dion(), {"x0": np.ones(3)})


def test_kron_refuses_complex_numbers() -> None:
    with pytest.raises(opt.BadSetting, match="real arrays"):
        opt.setup(opt.Kron(), {"x": np.ones((2, 2), complex)})
