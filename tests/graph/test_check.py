"""The checker takes what lowering makes, and refuses graphs that leave an engine something to decide."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.graph.check import Malformed, check
from optimisers.graph.expr import Expr, order
from optimisers.graph.trace import Program, trace
from tests.table import TABLE, Row, name, numbers


def loaded(array: str = "x", kind: str = "real", domain: str = "array") -> Expr:
    return Expr("load", domain=domain, type=kind, value=array)


X, Z, FREE = loaded(), loaded("dx", "complex"), loaded("s0", domain="free")
CONDITION = Expr("less", (X, X), domain="array", type="bool")
COLUMN = Expr("column", value=Expr("number", value=0))


def array(op: str, *args: Expr, kind: str = "real") -> Expr:
    return Expr(op, args, domain="array", type=kind)


BROKEN: dict[str, tuple[Expr, str]] = {
    "an operation that nobody knows": (array("cube", X), "no engine knows cube"),
    "an input that is not loaded": (Expr("input", domain="array", value="x"), "no engine knows input"),
    "a type that there is not": (array("negative", X, kind="integer"), "type integer"),
    "a domain that there is not": (Expr("negative", (X,), domain="matrix"), "domain matrix"),
    "too few arguments": (array("add", X), "1 arguments; add takes 2"),
    "a condition added to a number": (array("add", X, CONDITION), "argument 1 is bool where number goes"),
    "a number as a condition": (array("where", X, X, X), "argument 0 is real where bool goes"),
    "a number in a logical operation": (
        array("logical_and", CONDITION, X, kind="bool"),
        "argument 1 is real where bool goes",
    ),
    "a real branch of a complex choice": (
        array("where", CONDITION, X, Z, kind="complex"),
        "argument 1 is real where complex goes",
    ),
    "a product said to be real": (array("multiply", X, Z), "multiply gives complex"),
    "a comparison said to be a number": (array("less", X, X), "less gives bool"),
    "an order of complex numbers": (array("less", Z, Z, kind="bool"), "less of complex numbers"),
    "a cast to the same type": (array("cast", X), "its own type"),
    "a cast that drops a part": (array("cast", Z), "imaginary part"),
    "a condition in memory": (loaded(kind="bool"), "a condition in memory"),
    "a condition that is stored": (
        Expr("store", (CONDITION,), domain="array", value="x"),
        "bool where real goes",
    ),
    "a real number stored as complex": (
        Expr("store", (X,), domain="array", type="complex", value="x"),
        "real where complex goes",
    ),
    "another shape beside arrays": (array("add", X, FREE), "without spread"),
    "another shape stored as it is": (
        Expr("store", (FREE,), domain="array", value="x"),
        "a free value stored as array",
    ),
    "an array that is spread": (array("spread", X), "spread takes a free value"),
    "an array said to be a scalar": (Expr("add", (X, COLUMN)), "arguments that are array"),
    "a sum of a scalar": (Expr("sum", (COLUMN,)), "gives a scalar of an array"),
    "a product of matrices of x's shape": (array("matmul", X, X), "matmul is free"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_graphs_are_refused(case: str) -> None:
    graph, said = BROKEN[case]
    with pytest.raises(Malformed, match=said):
        check([graph])


@pytest.mark.parametrize("case", ["a condition added to a number", "another shape beside arrays"])
def test_faults_are_found_below_the_root(case: str) -> None:
    with pytest.raises(Malformed, match=BROKEN[case][1]):
        check([Expr("store", (array("sqrt", BROKEN[case][0]),), domain="array", value="x")])


def program_of(row: Row, dtype: str) -> Program:
    x = numbers(np.random.default_rng(0), row.shapes()[0], dtype)
    return trace(row.rule, row.rule.init(x), x)


@pytest.mark.parametrize("row", TABLE, ids=name)
def test_what_every_rule_is_lowered_to_is_whole(row: Row) -> None:
    for dtype in ("float32", "complex64"):
        if not row.takes(dtype):
            continue
        program = program_of(row, dtype)
        lowered = [program.lowering.value(e, "number") for e in program.roots if e.type != "complex"]
        check([*lowered, *(program.lowering.scalar(g) for g in program.guards)])


class Mixed(opt.Rule):
    """Conditions as numbers and numbers as conditions, on elements and on scalars."""

    eta: float = 0.5

    def init(self, x: Any) -> Any:
        return opt.zeros_like(x)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        positive, long = dx > 0, opt.ops.sum(opt.abs2(dx)) > 1
        return state + positive, self.eta * (positive + long) + opt.where(long & positive, dx, 2 * dx)


def made(rule: opt.Rule, test: Callable[[Expr], bool]) -> list[Expr]:
    x = np.ones(3, np.float32)
    program = trace(rule, rule.init(x), x)
    assert program.new_x is not None
    return [e for e in order([program.lowering.value(program.new_x)]) if test(e)]


def test_conditions_become_numbers_where_numbers_go_and_nowhere_else() -> None:
    casts = made(Mixed(), lambda e: e.op == "cast")
    assert {(e.args[0].type, e.type) for e in casts} == {("bool", "real"), ("real", "bool")}


@pytest.mark.parametrize("engine", ["interpret", "numba"])
def test_conditions_count_as_one_and_zero(engine: str) -> None:
    """Against the formula, by hand."""
    dx = np.array([1.5, -2.0, 0.25], np.float32)
    state, model = opt.update(
        opt.setup(Mixed(), {"w": np.zeros(3, np.float32)}, engine=engine),
        {"w": np.zeros(3, np.float32)},
        {"w": dx},
    )
    assert model["w"].tolist() == [-(0.5 * 2 + 1.5), -(0.5 * 1 - 4.0), -(0.5 * 2 + 0.25)]
    assert state["w"].state.tolist() == [1, 0, 1]
