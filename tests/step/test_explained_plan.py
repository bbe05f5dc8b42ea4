"""What `explain` says of a step: its array operations, and why each faster engine was refused."""

from typing import Any

import numpy as np

import optimisers as opt


class Squared(opt.Rule):
    """Steps by (dx dx') dx: two products, of 2 n m n and 2 n n m operations for an (n, m) matrix."""

    def init(self, x: Any) -> Any:
        return ()

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return state, (dx @ opt.ops.transpose(dx)) @ dx


def test_products_are_counted() -> None:
    model = [np.ones((4, 6), np.float32) for _ in range(3)]
    state = opt.setup(Squared(), model)
    (group,) = opt.explain(state).groups

    assert group.products == 2
    assert group.flops == 3 * (2 * 4 * 6 * 4 + 2 * 4 * 4 * 6)
    assert "2 products of matrices" in str(opt.explain(state))

    assert group.workspace == 0

    opt.update_(state, model, [x.copy() for x in model])
    (group,) = opt.explain(state).groups

    assert group.workspace >= 3 * 4 * 6 * 4  # one stack at least


def test_rules_without_products_say_nothing_of_them() -> None:
    state = opt.setup(opt.Adam(), [np.ones(3)])
    (group,) = opt.explain(state).groups

    assert (group.products, group.flops, group.workspace, group.refusals) == (0, 0, 0, ())
    assert "array operations" not in str(opt.explain(state))


def test_every_engine_that_was_refused_says_why() -> None:
    state = opt.setup(opt.Adam(), [np.ones(3, np.longdouble)])
    (group,) = opt.explain(state).groups

    assert group.engine == "interpret"
    assert [name for name, _ in group.refusals] == ["numba"]
    assert group.reason == group.refusals[0][1]
    assert group.reason in str(opt.explain(state))


class Factored(opt.Rule):
    """A sum along each axis, a product that runs in every second step only, and two passes."""

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        state = state + opt.ops.sum(dx, axis=0) / (1 + opt.ops.sum(opt.ops.abs(dx), axis=1, keepdims=True))
        return state, (state @ dx.T) @ dx


def test_the_plan_names_what_runs_one_thing_after_the_other() -> None:
    rule = opt.Chain(opt.AccumGrad(2), Factored())
    (group,) = opt.explain(opt.setup(rule, [np.ones((4, 40), "f")])).groups
    steps = group.plan.steps

    assert [s.kind for s in steps] == ["pass over rows", "pass", "array operations", "pass"]
    assert [s.reductions for s in steps] == [2, 0, 0, 0]
    assert steps[0].bytes == 8  # the gradient and its running sum, read once
    assert [bool(s.where) for s in steps] == [True, True, True, False]
    assert "clock" in steps[0].where[0]
    assert steps[-1].writes == ("sum", "s1", "x")
    assert sum(s.bytes for s in steps if s.kind != "array operations") == group.bytes_per_parameter
    assert steps[2].flops == 2 * 2 * 4 * 4 * 40
    assert group.plan.describe()[0].startswith("1. pass over rows: reads dx, sum; 2 reductions; 8 bytes")


def test_one_pass_alone_says_no_more_than_the_line_above_it() -> None:
    (group,) = opt.explain(opt.setup(opt.AdamW(), [np.ones(3)])).groups

    assert [s.kind for s in group.plan.steps] == ["pass"]
    assert group.plan.describe() == []
