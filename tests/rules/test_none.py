"""A parameter without a gradient takes no step, by every modern rule and wrapper, behind every face: it and
what is its own stay as they are, the others step, and it goes on as if the step had not been.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.table import MODERN
from tests.tensors import tensor
from tests.worlds import bits, leaves, numbers_in

GONE = ("b", "", "b", "ab", "", "b")
"""Step by step, the parameters without a gradient: one that joins late, one that pauses, none at all."""

GIVEN: dict[str, opt.Rule] = {
    "MoMo": opt.MoMo(0.1),
    "MoMoAdam": opt.MoMoAdam(0.1),
    "PolyakSPS": opt.PolyakSPS(0.4),
    "Sophia": opt.Sophia(0.1),
    "SophiaG": opt.SophiaG(0.1),
    "AdaHessian": opt.AdaHessian(0.1),
    "PrivateAggregate": opt.Chain(opt.PrivateAggregate(0.5, 1.0, 3), opt.Descent(0.1)),
}

WRAPPERS: dict[str, Any] = {
    **{
        row.name: row.rule
        for row in MODERN
        if row.name in ("ScheduleFree", "GPA", "Lookahead", "SWA", "Cautious")
    },
    **{
        row.name: row.rule
        for row in MODERN
        if row.name in ("Mechanic", "Prodigy", "DoG", "LDoG", "DoWG", "ZClip")
    },
    "EMA": opt.EMA(opt.Chain(opt.AccumGrad(2), opt.ClipNorm(0.5), opt.Adam(0.05)), 0.75),
    "SkipNonFinite": opt.SkipNonFinite(opt.Chain(opt.AccumGrad(2), opt.Adam(0.1))),
    "selected": {"b": opt.ScheduleFree(opt.AdamW(0.1)), "**": opt.Lookahead(opt.Prodigy(), 2)},
    "one frozen": {"c": None, "**": opt.Mechanic(opt.SWA(opt.Momentum(0.1), 1, 2), 0.01)},
    **GIVEN,
}
"""These go through every face; the other rules go through them by turns."""

OTHERS = {row.name: row.rule for row in MODERN if row.name not in WRAPPERS}

TOGETHER = {
    *(
        "Prodigy",
        "Prodigy-plain",
        "DAdaptAdam",
        "DAdaptSGD",
        "DAdaptLion",
        "DoG",
        "DoWG",
        "NormalizeGrad",
        "ZClip",
    ),
    *("Mechanic", "MoMo", "MoMoAdam", "PolyakSPS", "PrivateAggregate", "selected", "one frozen"),
}
"""Whose arrays have numbers in common, which come from the gradients of all."""

CLOCKED = {"EMA", "APOLLO", "APOLLO-mini", "AddNoise", "SGLD", "CorrectedDecay"}
"""With windows, random numbers or schedules: they follow from the clock, which goes on for all arrays."""


def model() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal((4, 6)) for key in "abc"}


def given(title: str, t: int) -> tuple[list[Any], dict[str, Any]]:
    """(gradients, and second ones where the rule takes such; the loss where it asks for it) of a step."""
    rng = np.random.default_rng(100 + t)
    front = (3,) if title == "PrivateAggregate" else ()
    orders = 2 if title in ("Sophia", "SophiaG", "AdaHessian") else 1
    sets = [{k: rng.standard_normal((*front, 4, 6)) for k in "abc"} for _ in range(orders)]
    return (
        [{k: None if k in GONE[t] else g for k, g in each.items()} for each in sets],
        {"loss": 2.0 / (1 + t)} if title in ("MoMo", "MoMoAdam", "PolyakSPS") else {},
    )


Face = Callable[[str, Any], Iterator[dict[str, Any]]]
"""The parameters after each step, as NumPy has them."""


def plain(title: str, rule: Any) -> Iterator[dict[str, Any]]:
    """By the interpreter, which says what is right."""
    x = model()
    state = opt.setup(rule, x, engine="interpret")
    for t in range(len(GONE)):
        orders, loss = given(title, t)
        state, x = opt.update(state, x, *orders, **loss)
        yield x


def in_place(title: str, rule: Any) -> Iterator[dict[str, Any]]:
    x = model()
    state = opt.setup(rule, x)
    for t in range(len(GONE)):
        orders, loss = given(title, t)
        opt.update_(state, x, *orders, **loss)
        yield {k: v.copy() for k, v in x.items()}


def pure(title: str, rule: Any) -> Iterator[dict[str, Any]]:
    x = model()
    state = opt.setup(rule, x)
    for t in range(len(GONE)):
        orders, loss = given(title, t)
        state, x = opt.update(state, x, *orders, **loss)
        yield x


def of_torch(title: str, rule: Any) -> Iterator[dict[str, Any]]:
    torch = pytest.importorskip("torch")
    params = {k: torch.nn.Parameter(tensor(v)) for k, v in model().items()}
    optimizer = opt.TorchOptimizer(list(params.items()), rule)
    for t in range(len(GONE)):
        (grads, *second), loss = given(title, t)
        for k, p in params.items():
            kept = "grad_sample" if title == "PrivateAggregate" else "grad"
            setattr(p, kept, None if grads[k] is None else tensor(grads[k]))
        more: dict[str, Any] = {}
        if second:
            more["hessians"] = {k: None if h is None else tensor(h) for k, h in second[0].items()}
        if loss:
            optimizer.step(lambda loss=loss: torch.tensor(loss["loss"]))
        else:
            optimizer.step(**more)
        yield {k: p.detach().numpy().copy() for k, p in params.items()}


def jitted(title: str, rule: Any) -> Iterator[dict[str, Any]]:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        x = jax.tree.map(jax.numpy.asarray, model())
        state, step = opt.setup(rule, x), jax.jit(opt.update)
        for t in range(len(GONE)):
            orders, loss = given(title, t)
            state, x = step(state, x, *(jax.tree.map(jax.numpy.asarray, g) for g in orders), **loss)
            yield {k: np.asarray(v) for k, v in x.items()}


FACES: dict[str, Face] = {"update_": in_place, "update": pure, "TorchOptimizer": of_torch, "jit": jitted}


@pytest.mark.parametrize(
    ("title", "rule", "face"),
    [
        *(pytest.param(n, r, f, id=f"{n}-{k}") for n, r in WRAPPERS.items() for k, f in FACES.items()),
        *(
            pytest.param(n, r, [*FACES.values()][i % 4], id=f"{n}-{[*FACES][i % 4]}")
            for i, (n, r) in enumerate(OTHERS.items())
        ),
    ],
)
def test_every_face_steps_those_that_have_gradients_and_no_others(title: str, rule: Any, face: Face) -> None:
    before = model()
    for t, (found, wanted) in enumerate(zip(face(title, rule), plain(title, rule), strict=True)):
        for k, x in wanted.items():
            np.testing.assert_allclose(found[k], x, rtol=1e-9, atol=1e-9, err_msg=f"{k} at step {t}")
            if k in GONE[t]:
                assert bits(found[k]) == bits(before[k])
        before = found


ALL = WRAPPERS | OTHERS
every = pytest.mark.parametrize(("title", "rule"), ALL.items(), ids=[*ALL])


@every
@pytest.mark.parametrize("engine", [None, "interpret"])
def test_what_is_its_own_stays_as_it_is(title: str, rule: Any, engine: str | None) -> None:
    x = model()
    state = opt.setup(rule, x, engine=engine)
    for t, gone in enumerate(GONE):
        orders, loss = given(title, t)
        before = {k: [bits(np.asarray(v)) for v in numbers_in(leaves(state[k])[0].state)] for k in gone}
        state, x = opt.update(state, x, *orders, **loss)
        after = {k: [bits(np.asarray(v)) for v in numbers_in(leaves(state[k])[0].state)] for k in gone}

        assert after == before


ALONE = {n: r for n, r in ALL.items() if n not in TOGETHER | CLOCKED}


@pytest.mark.parametrize(("title", "rule"), ALONE.items(), ids=[*ALONE])
def test_it_goes_on_as_if_the_step_had_not_been(title: str, rule: Any) -> None:
    """Alone, given only the gradients that there were."""
    *_, together = plain(title, rule)
    for k in "ab":
        x = {k: model()[k]}
        state = opt.setup(rule, x, engine="interpret")
        for t, gone in enumerate(GONE):
            orders, loss = given(title, t)
            if k not in gone:
                state, x = opt.update(state, x, *({k: g[k]} for g in orders), **loss)

        np.testing.assert_allclose(x[k], together[k], rtol=1e-12, atol=1e-12)
