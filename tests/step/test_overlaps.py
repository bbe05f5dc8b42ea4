"""Parameters that come to share memory after `setup` are refused; a step that raises has changed nothing."""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pytest
import torch

import optimisers as opt

TWO = {"a": opt.Descent(0.1), "b": opt.Momentum(0.1)}
TYPES = {"numpy": np.ones, "torch": torch.ones}

each_library = pytest.mark.parametrize("library", TYPES)
both_updates = pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)


def ones(library: str, n: int) -> Any:
    return TYPES[library](n, dtype=np.float32 if library == "numpy" else torch.float32)


def shifted(library: str) -> Any:
    b = ones(library, 41)
    return {"a": b[:-1], "b": b[1:]}


def same(library: str) -> Any:
    b = ones(library, 40)
    return {"a": b, "b": b}


def strided(library: str) -> Any:
    b = ones(library, 80)
    return {"a": b[::2], "b": b[::2]}


@each_library
@both_updates
@pytest.mark.parametrize("engine", [None, "interpret"])
@pytest.mark.parametrize("rule", [opt.Descent(0.1), TWO], ids=["one group", "two groups"])
@pytest.mark.parametrize("make", [shifted, same, strided], ids=lambda f: f.__name__)
def test_parameters_that_have_come_to_share_memory_are_refused(
    library: str, step: Callable[..., Any], engine: str | None, rule: Any, make: Callable[[str], Any]
) -> None:
    model = {"a": ones(library, 40), "b": ones(library, 40)}
    grads = {"a": ones(library, 40), "b": ones(library, 40)}
    state = opt.setup(rule, model, engine=engine)
    state, _ = step(state, model, grads)
    moved = make(library)
    with pytest.raises(opt.TreeMismatch, match=r"model\['a'\] and model\['b'\] share memory"):
        step(state, moved, grads)

    assert float(moved["a"].sum()) == 40


@each_library
@pytest.mark.parametrize("engine", [None, "interpret"])
def test_a_state_array_is_no_parameter(library: str, engine: str | None) -> None:
    model, grads = {"a": ones(library, 40)}, {"a": ones(library, 40)}
    state = opt.setup(opt.Momentum(0.1), model, engine=engine)
    opt.update_(state, model, grads)
    with pytest.raises(opt.TreeMismatch, match="share memory"):
        opt.update_(state, {"a": state["a"].state.v}, grads)


@each_library
@pytest.mark.parametrize("engine", [None, "interpret"])
def test_columns_of_one_matrix_lie_between_each_other(library: str, engine: str | None) -> None:
    """Their pieces of memory overlap, but no element belongs to both."""
    matrix = ones(library, 80).reshape(40, 2)
    model = {"a": matrix[:, 0], "b": matrix[:, 1]}
    state = opt.setup({"a": opt.Descent(0.5), "b": opt.Descent(0.25)}, model, engine=engine)
    for _ in range(2):
        opt.update_(state, model, {"a": ones(library, 40), "b": ones(library, 40)})

    assert np.asarray(matrix).tolist() == [[0.0, 0.5]] * 40


class Strict(tuple[Any, ...]):
    """A container whose constructor raises when it is told to."""

    __slots__ = ()
    armed = False

    def __new__(cls, items: Any) -> Self:
        if cls.armed:
            raise RuntimeError("the constructor of the container")
        return super().__new__(cls, items)


def locked() -> Any:
    x = np.ones(3, np.float32)
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("engine", [None, "interpret"])
@pytest.mark.parametrize(
    "make", [locked, lambda: torch.ones(()).expand(3)], ids=["a read-only array", "an expanded tensor"]
)
def test_a_constructor_that_raises_does_so_before_anything_is_written(
    make: Callable[[], Any], engine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = np.ones(3, np.float32) if isinstance(make(), np.ndarray) else torch.ones(3)
    inner = {"w": plain}
    model = {"deep": Strict([make(), inner]), "top": make()}
    state = opt.setup(opt.Adam(0.1), model, engine=engine)
    grads = {"deep": (plain * 0 + 1, {"w": plain * 0 + 1}), "top": plain * 0 + 1}
    monkeypatch.setattr(Strict, "armed", True)
    top = model["top"]
    with pytest.raises(RuntimeError, match="the constructor"):
        opt.update_(state, model, grads)

    assert model["top"] is top
    assert [float(x.sum()) for x in (model["deep"][0], plain, top)] == [3, 3, 3]
    assert opt.explain(state).clock == 0
    assert float(np.abs(np.asarray(state["top"].state.m)).sum()) == 0
    monkeypatch.setattr(Strict, "armed", False)
    _, new = opt.update_(state, model, grads)

    assert new["deep"][1]["w"] is plain
    np.testing.assert_allclose([float(x[0]) for x in (new["deep"][0], plain, new["top"])], 0.9, rtol=1e-6)
