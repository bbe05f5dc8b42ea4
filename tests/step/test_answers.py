"""What is no answer of a rule is refused, by every engine and by both updates, and nothing has changed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.worlds import WORLDS, World, by_engine, worlds_with

Answer = Callable[[Any, Any], Any]

ANSWERS: dict[str, tuple[Answer, str]] = {
    "nothing at all": (lambda _s, _dx: None, r"returned None; it returns a pair"),
    "the step alone": (lambda _s, dx: dx, r"returned one array; it returns a pair"),
    "a list": (lambda s, dx: [s, dx], r"returned list; it returns a pair"),
    "three": (lambda s, dx: (s, dx, dx), r"returned a tuple of 3; it returns a pair"),
    "True": (lambda s, _dx: (s, True), r"a condition as the step; write where\("),
    "a mask": (lambda s, dx: (s, dx > 0), r"a condition as the step; write where\("),
    "text": (lambda s, _dx: (s, "0.1"), r"returned a str as the step"),
    "a list as step": (lambda s, dx: (s, [dx]), r"returned a list as the step"),
    "a function": (lambda s, dx: (s, lambda: dx), r"returned a function as the step"),
    "a number": (lambda s, _dx: (s, 0.1), r"one number as the step for a whole array"),
    "one sum": (lambda s, dx: (s, opt.ops.sum(dx)), r"one number as the step for a whole array"),
    "sums of columns": (lambda s, dx: (s, opt.ops.sum(dx, axis=0)), r"a step of shape \(3,\).*\(5, 3\)"),
    "its transpose": (lambda s, dx: (s, opt.ops.transpose(dx)), r"a step of shape \(3, 5\).*\(5, 3\)"),
    "complex numbers": (lambda s, dx: (s, 1j * dx), r"complex step for real parameters"),
    "a state that is gone": (lambda _s, dx: (None, dx), r"of another form than init"),
    "a longer state": (lambda s, dx: ((s, s), dx), r"of another form than init"),
    "a state of columns": (
        lambda _s, dx: (opt.ops.sum(dx, axis=0), dx),
        r"a state of shape \(3,\).*\(5, 3\)",
    ),
    "a complex state": (lambda _s, dx: (1j * dx, dx), r"real in init and complex in apply"),
}


class Answering(opt.Rule):
    """Answers as it is told."""

    answer: Any = opt.static(None)

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return self.answer(state, dx)


def stepped(world: World, rule: opt.Rule, model: Any) -> None:
    world.step(world.setup(rule, model), model, world.model(seed=1, n=2))


@pytest.mark.parametrize("inner", [False, True], ids=["alone", "in a chain"])
@worlds_with("case", ANSWERS, *by_engine(WORLDS))
def test_what_is_no_answer_is_refused(world: World, case: tuple[Answer, str], inner: bool) -> None:
    answer, says = case
    rule = Answering(answer)
    with world.open():
        model = world.model(n=2)
        before = {k: np.array(world.get(v)) for k, v in model.items()}
        with pytest.raises(opt.TraceError, match=says):
            stepped(world, opt.Chain(rule, opt.Descent()) if inner else rule, model)

        for key, value in before.items():
            np.testing.assert_array_equal(world.get(model[key]), value)
