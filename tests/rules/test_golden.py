"""Every rule of Optimisers.jl walks the paths that its published formulas give, in every library.

`golden/optimisers_jl.json` has a row for each rule, setting and element type: the chain of rules, the start,
25 gradients and the parameters after each. They were computed in float64 and complex128 from the formulas of
Optimisers.jl 0.4.8, by no code of this package. A row runs as soon as its rules exist here.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests.goldens import PRESENT, REDUCING, ROWS, array_of, names_of, rule_of, title_of
from tests.worlds import WORLDS, World, by_engine, worlds_with

ROWS_OF_RULE = {
    "Descent": 4, "Momentum": 4, "Nesterov": 4, "RMSProp": 6, "Rprop": 2, "Adam": 4, "Lion": 2, "RAdam": 4,
    "AdaMax": 2, "OAdam": 4, "AdaGrad": 4, "AdaDelta": 4, "AMSGrad": 2, "NAdam": 4, "AdamW": 4,
    "AdaBelief": 4,
}  # fmt: skip
"""How many rows of one rule alone there are."""

CHAINS: list[tuple[str, ...]] = [
    ("WeightDecay", "Momentum"),
    ("SignDecay", "WeightDecay", "Adam"),
    ("ClipGrad", "Nesterov"),
    ("ClipNorm", "RMSProp"),
    ("ClipNorm", "Descent"),
    ("ClipNorm", "Descent"),
    ("AccumGrad", "ClipNorm", "AdamW"),
    ("AccumGrad", "WeightDecay", "Descent"),
    (),
]
"""The rules of every other row."""


def walked(row: dict[str, Any], world: World, dtype: str) -> Iterator[tuple[Any, Any]]:
    """(the parameters after each step, what they should be)."""
    with world.open():
        x, *gradients = (
            world.put(array_of(a, row["dtype"]).astype(dtype)) for a in (row["x"], *row["gradients"])
        )
        state = world.setup(rule_of(row), x)
        for gradient, wanted in zip(gradients, row["path"], strict=True):
            state, x = world.step(state, x, gradient)
            yield world.get(x), array_of(wanted, row["dtype"])


GOLDEN = {title_of(row): row for row in PRESENT}
ENGINES = by_engine([world for world in WORLDS if not world.capturable])
OTHERS = [world for world in WORLDS if world.library != "numpy" and world.engine != "triton"]


@worlds_with("row", GOLDEN, *ENGINES)
def test_double_precision_walks_the_golden_path(row: dict[str, Any], world: World) -> None:
    if world.engine == "triton" and row["dtype"].startswith("complex"):
        with world.open(), pytest.raises(opt.BadSetting, match="element type complex128"):
            next(walked(row, world, row["dtype"]))
        return
    tolerance = 1e-10 if REDUCING & set(names_of(row)) else 1e-12
    for n, (x, wanted) in enumerate(walked(row, world, row["dtype"])):
        assert x.dtype == row["dtype"]
        np.testing.assert_allclose(x, wanted, rtol=tolerance, atol=tolerance, err_msg=f"after step {n + 1}")


@worlds_with("row", GOLDEN, *by_engine([w for w in WORLDS if w.library == "numpy"]), OTHERS)
def test_single_precision_stays_beside_the_golden_path(row: dict[str, Any], world: World) -> None:
    """By both engines of NumPy; the other libraries take turns, since what they share with it has laws."""
    single = "complex64" if row["dtype"] == "complex128" else "float32"
    for n, (x, wanted) in enumerate(walked(row, world, single)):
        assert x.dtype == single
        assert np.abs(x - wanted).max() <= 1e-5 * np.abs(wanted).max(), f"after step {n + 1}"


def test_a_row_runs_for_every_rule_that_exists() -> None:
    """Counted by the table above, not by the filter that chose the rows."""
    alone = sum(count for name, count in ROWS_OF_RULE.items() if hasattr(opt, name))
    chained = sum(all(hasattr(opt, name) for name in chain) for chain in CHAINS)

    assert len(PRESENT) == alone + chained


def test_the_table_of_counts_covers_the_golden_file() -> None:
    assert sum(ROWS_OF_RULE.values()) + len(CHAINS) == len(ROWS) == 67


def test_the_rules_of_the_core_are_all_here() -> None:
    core = (
        "Descent",
        "Momentum",
        "Nesterov",
        "Adam",
        "AdamW",
        "WeightDecay",
        "SignDecay",
        "ClipGrad",
        "ClipNorm",
    )

    assert [name for name in (*core, "ClipGlobalNorm", "AccumGrad", "Chain") if not hasattr(opt, name)] == []
    assert len(PRESENT) >= 28
