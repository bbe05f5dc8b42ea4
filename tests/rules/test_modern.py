"""Do the modern rules walk the paths of the packages that have them, in every library and by every engine?"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests import modern
from tests.table import DTYPES, MODERN, Row, dtype_of, name
from tests.tensors import array, tensor
from tests.worlds import arrays_of, bits, close, gradients_of, trained

Case = dict[str, Any]


def exact(case: Case) -> bool:
    """Whether the formula of the case gives the path of its package to the last digits."""
    return case.get("formula_error") is not None and case["formula_error"] < 1e-9


def title(case: Case) -> str:
    return f"{case['rule']}-{case['class']}-{modern.CASES.index(case)}"


WALKED = [case for case in modern.CASES if exact(case) and not isinstance(modern.chosen(case), str)]
LAST = list({case["rule"]: case for case in WALKED}.values())
"""One case of each rule, with settings of its own."""


def follows(case: Case, library: str, engine: str | None = None) -> None:
    """The parameters after every step, and those to evaluate with, to 1e-10 of the largest move."""
    answer = modern.run(case, library, engine)
    assert not isinstance(answer, str)
    tolerance = 1e-10 if case["dtype"] == "float64" else 1e-5
    moved = [np.subtract(x, x0) for xs in case["xs"] for x, x0 in zip(xs, case["x0"], strict=True)]
    largest = max(np.abs(m).max(initial=0) for m in moved)
    wanted = [case["xs"], case.get("eval_xs")]
    for got, want in zip(answer, wanted, strict=True):
        assert (got is None) == (want is None)
        for after, expected in zip(got or (), want or (), strict=True):
            for x, y in zip(after, expected, strict=True):
                assert np.abs(x - np.array(y)).max(initial=0) <= tolerance * largest


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        pytest.param(case, engine, id=f"{title(case)}-{engine or 'fastest'}")
        for i, case in enumerate(WALKED)
        for engine in [None if i % 2 or case in LAST else "interpret"]
    ],
)
def test_numpy_walks_the_paths_of_the_packages(case: Case, engine: str | None) -> None:
    """By kernels at least once for each rule, and else by turns: every case is a kernel to compile."""
    follows(case, "numpy", engine)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("case", LAST, ids=title)
def test_other_libraries_walk_them_too(case: Case, library: str) -> None:
    pytest.importorskip(library)
    follows(case, library)


def test_a_case_that_we_do_not_walk_says_why() -> None:
    for case in modern.CASES:
        answer = modern.chosen(case)
        assert not isinstance(answer, str) or len(answer) > 10


def test_every_rule_of_the_table_is_walked_through_every_engine() -> None:
    assert len({row.name for row in MODERN}) == len(MODERN)


# -- every engine --------------------------------------------------------------------------------------------

every_row = pytest.mark.parametrize("row", MODERN, ids=name)


@every_row
def test_a_rule_gets_the_engine_and_the_passes_of_its_row(row: Row) -> None:
    for dtype in DTYPES:
        if row.takes(dtype):
            (group,) = opt.explain(opt.setup(row.rule, np.ones((3, 4), dtype_of(dtype)))).groups

            assert group.engine == row.engine_for(dtype)
            assert group.engine != "numba" or group.passes == row.passes or row.matrix


def of(row: Row, dtype: str, step: Callable[..., Any], engine: str | None, make: Callable[[Any], Any]) -> Any:
    """(numbers of the state, model) after four steps of a row in one library."""
    model = [make(a) for a in arrays_of(row, dtype)]
    grads = [[make(a) for a in g] for g in gradients_of(row, dtype, 4)]
    return trained(row.rule, model, grads, step, engine)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}")
        for i, row in enumerate(MODERN)
        for dtype in ("float32", ("float16", "complex64")[i % 2])
    ],
)
def test_kernels_step_as_the_interpreter_does(row: Row, dtype: str) -> None:
    """Halves and complex numbers by turns; and where a pass writes is printed alike for all rows: new arrays
    of every other one, and of all with sums.
    """
    if not row.takes("complex64"):
        with pytest.raises((opt.TraceError, opt.BadSetting)):
            of(row, "complex64", opt.update, "interpret", np.array)
    dtype = dtype if row.takes(dtype) else "float16"
    _, wanted = of(row, dtype, opt.update, "interpret", np.array)
    _, inplace = of(row, dtype, opt.update_, None, np.array)

    assert all(close(a, b, dtype) for a, b in zip(inplace, wanted, strict=True))
    if dtype == "float32":
        _, tensors = of(row, dtype, opt.update_, None, tensor)

        assert all(close(array(a), b, dtype) for a, b in zip(tensors, inplace, strict=True))
    if dtype == "float32" and (row.passes > 1 or MODERN.index(row) % 2):
        _, pure = of(row, dtype, opt.update, None, np.array)

        assert [bits(x) for x in pure] == [bits(x) for x in inplace]


@every_row
def test_kernels_of_triton_step_as_the_interpreter_does(row: Row) -> None:
    """With numbers on the host and on the device by turns."""
    pytest.importorskip("triton")
    _, wanted = of(row, "float32", opt.update_, "interpret", np.array)
    model = [tensor(a) for a in arrays_of(row, "float32")]
    captured = row.captured and MODERN.index(row) % 2 == 1
    state = opt.setup(row.rule, model, engine="triton", capturable=captured)
    for grads in gradients_of(row, "float32", 4):
        state, model = opt.update_(state, model, [tensor(g) for g in grads])

    assert all(close(array(a), b, "float32") for a, b in zip(model, wanted, strict=True))


WALKED_BY_NAME = {case["rule"] for case in LAST}


@pytest.mark.parametrize("row", [r for r in MODERN if r.name not in WALKED_BY_NAME], ids=name)
def test_under_jit_a_step_is_that_of_the_interpreter(row: Row) -> None:
    """Of rules, and of their forms, that walk no path of a package under JAX."""
    jax = pytest.importorskip("jax")
    _, wanted = of(row, "float32", opt.update, "interpret", np.array)
    model = [jax.numpy.asarray(a) for a in arrays_of(row, "float32")]
    state, step = opt.setup(row.rule, model), jax.jit(opt.update)
    for grads in gradients_of(row, "float32", 4):
        state, model = step(state, model, [jax.numpy.asarray(g) for g in grads])

    assert all(close(np.asarray(a), b, "float32") for a, b in zip(model, wanted, strict=True))


@pytest.mark.parametrize("size", [1e300, 1e-300])
@pytest.mark.parametrize(
    "rule", [opt.NormalizeGrad(epsilon=0.0), opt.ZClip(omega=1.0)], ids=["normalised", "clipped"]
)
def test_norms_of_all_arrays_neither_overflow_nor_vanish(rule: opt.Rule, size: float) -> None:
    """Their squares do: 5 elements of one size have sqrt(5) times it as their norm."""
    x = [np.zeros(3), np.zeros(2)]
    _, new = opt.update(
        opt.setup(opt.Chain(rule, opt.Descent(1.0)), x), x, [np.full(3, size), np.full(2, size)]
    )
    wanted = size if isinstance(rule, opt.ZClip) and size < 1 else 1 / np.sqrt(5)

    np.testing.assert_allclose(np.concatenate(new), -wanted, rtol=1e-12)


# -- the loss ------------------------------------------------------------------------------------------------


class Dropping(opt.Rule):
    """Steps by the loss times the gradient, behind whatever wraps it."""

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, opt.ops.loss(dx) * dx


WRAPPED = opt.EMA(opt.Chain(opt.ClipGlobalNorm(100.0), Dropping()), 0.5)


@pytest.mark.parametrize("engine", [None, "interpret", "triton", "captured"])
def test_a_rule_gets_the_loss_of_the_step_through_every_engine(engine: str | None) -> None:
    torch = pytest.importorskip("torch")
    captured = engine == "captured"
    for loss in (0.5, np.float32(0.5), torch.tensor(0.5)):
        x = torch.ones(3)
        state = opt.setup(WRAPPED, x, engine="triton" if captured else engine, capturable=captured)
        opt.update_(state, x, torch.full((3,), 2.0), loss=loss)

        assert x.tolist() == [0.0] * 3
        assert state.state.average.tolist() == [0.5] * 3


@pytest.mark.parametrize("jitted", [False, True])
def test_a_rule_gets_the_loss_under_jax(jitted: bool) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones(3)

    def step(state: Any, x: Any, loss: Any) -> Any:
        return opt.update(state, x, 2 * x, loss=loss)

    _, new = (jax.jit(step) if jitted else step)(opt.setup(WRAPPED, x), x, jax.numpy.asarray(0.5))

    assert new.tolist() == [0.0] * 3


def test_the_loss_of_optax_goes_both_ways() -> None:
    """The same step by Optax's Polyak rate, by ours inside Optax, and by Optax's inside ours."""
    optax = pytest.importorskip("optax")
    import jax.numpy as jnp

    params, grads = {"a": jnp.ones(3)}, {"a": jnp.full(3, 2.0)}
    theirs, ours = optax.polyak_sgd(0.4), opt.as_optax(opt.PolyakSPS(0.4))
    wanted, _ = theirs.update(grads, theirs.init(params), params, value=1.5)
    found, _ = ours.update(grads, ours.init(params), params, value=1.5)
    state = opt.setup(opt.from_optax(theirs), params)
    _, new = opt.update(state, params, grads, loss=1.5)

    np.testing.assert_allclose(found["a"], wanted["a"], rtol=1e-6)
    np.testing.assert_allclose(new["a"], params["a"] + wanted["a"], rtol=1e-6)


def test_a_closure_of_torch_hands_on_the_loss_that_it_returns() -> None:
    torch = pytest.importorskip("torch")
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = opt.TorchOptimizer([x], opt.PolyakSPS(10.0))

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (x * x).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # f = 3, |g|^2 = 12: x - g / 4

    assert x.tolist() == [0.5] * 3


def test_a_loss_that_is_missing_or_no_number_is_pointed_out() -> None:
    x = np.ones(3)
    state = opt.setup(opt.MoMo(), x)
    with pytest.raises(
        opt.BadState,
        match=r"MoMo asks .*update\(state, model, grads, loss=value\).*step\(closure\), as_optax",
    ):
        opt.update(state, x, x)
    with pytest.raises(opt.BadState, match=r"the loss has shape \(3,\); it is one number"):
        opt.update(state, x, x, loss=x)
    with pytest.raises(opt.TraceError, match="outside of an update"):
        opt.MoMo().apply(opt.MoMo().init(x), x, x)


# -- the parameters to evaluate with -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        opt.ScheduleFree(opt.Descent(0.1)),
        opt.SkipNonFinite(opt.SWA(opt.Descent(0.1))),
        opt.MixedPrecision(opt.EMA(opt.Descent(0.1), 0.5)),
        opt.Chain(opt.Lookahead(opt.Descent(0.1), 2)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_averages_are_found_behind_every_wrapper(rule: opt.Rule) -> None:
    """On a line, where all of them must lie between the start and the end."""
    x = np.full(3, 2.0, np.float32)
    state = opt.setup(rule, x)
    for _ in range(3):
        state, x = opt.update(state, x, np.ones(3, np.float32))
    shown = opt.averaged(state, x)

    assert shown.dtype == np.float32
    assert (x < shown).all() or isinstance(rule, opt.Chain)
    assert (shown <= 2.0).all()
