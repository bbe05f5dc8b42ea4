"""Does a plan compute every value once, leave alone what stays as it is, and take the memory that is said?"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import optimisers as opt
from tests.worlds import STEPS

M, N = 24, 40


def model_of(shape: tuple[int, ...] = (M, N), count: int = 3, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for i in range(count)}


@pytest.mark.parametrize("shape", [(M, N), (N, N)], ids=str)
@pytest.mark.parametrize(
    ("rule", "products", "factorisations"),
    [
        # Gram matrices 2, dx and m into the bases 4, back 2; renewed: C q 2
        (opt.SOAP(), 10, {"eigh": 2, "qr": 2}),
        # Gram matrices 2, roots times m 2; renewed: q w q^T 2
        (opt.Shampoo(), 6, {"eigh": 2}),
        # Gram matrices 2, into the bases 2, back 2
        (opt.SPlus(), 6, {"eigh": 2}),
        # Q1 w Q2^T 2, both Gram matrices of it and of Q1^-T v Q2^-1 4, their gradients times Q 2, two bounds
        # of 2 each, Q^T Q along both axes 4
        (opt.Kron(), 16, {"solve_triangular": 2}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_every_product_and_factorisation_is_taken_once(
    rule: opt.Rule, products: int, factorisations: dict[str, int], shape: tuple[int, ...]
) -> None:
    steps = opt.explain(opt.setup(rule, model_of(shape))).groups[0].plan.steps

    assert sum(s.products for s in steps) == products
    names = [name for s in steps for name in s.factorisations]
    assert {name: names.count(name) for name in names} == factorisations


def test_what_a_step_needs_anyway_is_computed_before_what_only_some_steps_need() -> None:
    steps = opt.explain(opt.setup(opt.Shampoo(), model_of((N, N)))).groups[0].plan.steps

    (renewal,) = [s for s in steps if s.factorisations]
    assert renewal.sometimes
    assert renewal.products == 2
    assert all(not s.sometimes for s in steps if s is not renewal)


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(M, N), (N, N)], ids=str)
def test_between_renewals_roots_stay_and_are_not_written(step: Any, shape: tuple[int, ...]) -> None:
    model, grads = model_of(shape), model_of(shape, seed=1)
    state = opt.setup(opt.Shampoo(every=3), model)
    seen: list[Any] = []
    for _ in range(7):
        answer = step(state, model, grads)
        state, model = (state, model) if answer is None else answer[:2]
        seen.append([np.array(p.tolist()) for p in state["w1"].state.roots])

    same = [all(np.array_equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(seen)]
    assert same == [True, True, False, True, True, False]
    last = opt.explain(state).groups[0].plan.steps[-1]
    assert not {"roots[0]", "roots[1]", "s3", "s4"} & set(last.writes)


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_only_the_leaves_that_renew_have_their_roots_written(step: Any) -> None:
    model, grads = model_of((N, N)), model_of((N, N), seed=1)
    state = opt.setup(opt.Shampoo(every=4), model)
    for given in (grads, {**grads, "w1": None}, grads, grads, grads):
        answer = step(state, model, given)
        state, model = (state, model) if answer is None else answer[:2]

    late, own = model_of((N, N)), {"w1": grads["w1"]}
    alone = opt.setup(opt.Shampoo(every=4), {"w1": late["w1"]})
    half = {"w1": late["w1"]}
    for _ in range(4):
        opt.update_(alone, half, own)

    assert [int(state[k].state.t) for k in model] == [5, 4, 5]
    for a, b in zip(state["w1"].state.roots, alone["w1"].state.roots, strict=True):
        np.testing.assert_allclose(a.tolist(), b.tolist(), rtol=1e-5, atol=1e-6)
    assert state["w0"].state.roots[0].tolist() != state["w1"].state.roots[0].tolist()


@pytest.mark.parametrize(
    ("rule", "elements"),
    [
        (opt.Muon(0.02), M * N),
        (opt.NorMuon(0.02), M * N + M),
        (opt.Scion(0.01), M * N),
        (opt.SOAP(), 2 * M * N + 2 * (M * M + N * N)),
        (opt.Shampoo(), 2 * M * N + 2 * (M * M + N * N)),
        (opt.SPlus(), 2 * M * N + 2 * (M * M + N * N)),
        (opt.Kron(), M * N + M * M + N * N),
        (opt.Adafactor(), M + N),
        (opt.CAME(), M * N + 2 * (M + N)),
        (opt.SM3(), M * N + M + N),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_state_takes_the_bytes_of_its_papers(rule: opt.Rule, elements: int) -> None:
    said = opt.explain(opt.setup(rule, model_of(count=3)))

    assert sum(g.state_bytes for g in said.groups) == 3 * 4 * elements
