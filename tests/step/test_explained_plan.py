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
