"""MLX by a back end from outside, one of the examples: rows of the table, and paths of packages."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from tests import modern
from tests.installed import from_outside, needs
from tests.rules.test_modern import LAST, Case, title
from tests.table import TABLE, Row
from tests.worlds import arrays_of, close, gradients_of, trained

pytestmark = needs("mlx")

SPLIT = "MixedPrecision-split"
"""The row whose parameters NumPy has not."""


@pytest.fixture(scope="module")
def mlx() -> Iterator[Any]:
    """MLX's arrays, known until the tests here are done."""
    with from_outside():
        yield importlib.import_module("mlx_backend").mx


def of_mlx(mx: Any, tree: Any) -> Any:
    """Arrays of NumPy in a nest, as those of MLX."""
    if isinstance(tree, dict):
        return {k: of_mlx(mx, v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [of_mlx(mx, v) for v in tree]
    return None if tree is None else mx.array(tree)


@pytest.mark.parametrize("step", [opt.update, opt.update_])
@pytest.mark.parametrize("row", [r for r in TABLE if r.name != SPLIT], ids=lambda r: r.name)
def test_arrays_of_mlx_are_stepped_as_those_of_numpy_are(
    row: Row, step: Callable[..., Any], mlx: Any
) -> None:
    start, gradients = arrays_of(row, "float32"), gradients_of(row, "float32")

    _, wanted = trained(row.rule, start, gradients, step)
    _, found = trained(row.rule, of_mlx(mlx, start), of_mlx(mlx, gradients), step)

    assert all(isinstance(x, mlx.array) for x in found)
    assert all(close(np.array(x), y, "float32") for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", LAST, ids=title)
def test_mlx_walks_the_paths_of_the_packages_in_float32(case: Case, mlx: Any) -> None:
    found, shown = modern.walked(
        modern.chosen(case), {**case, "dtype": "float32"}, modern.Face(mlx.array, np.array), None
    )

    moved = max(
        np.abs(np.subtract(x, x0)).max(initial=0)
        for xs in case["xs"]
        for x, x0 in zip(xs, case["x0"], strict=True)
    )
    for got, want in ((found, case["xs"]), (shown, case.get("eval_xs"))):
        for after, expected in zip(got or (), want or (), strict=True):
            for x, y in zip(after, expected, strict=True):
                assert np.abs(x - np.array(y)).max(initial=0) <= 1e-4 * moved
