"""What other threads do to a state while it is stepped leaves every step whole."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import optimisers as opt


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads change places often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def adjusted(state: Any) -> None:
    opt.adjust_(state["l7"], eta=0.01)
    opt.adjust_(state, eta=0.001)


def ruled(state: Any) -> None:
    state["l3"].rule = opt.Adam(0.02)
    state["l3"].rule = opt.Adam(0.001)


def frozen(state: Any) -> None:
    opt.freeze_(state["l5"])
    opt.thaw_(state["l5"])


def read(state: Any) -> None:
    assert np.isfinite(state["l4"].state.m).all()
    str(opt.explain(state))
    opt.hyperparameters(state)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("neighbour", [adjusted, ruled, frozen, read], ids=lambda f: f.__name__)
def test_edits_beside_steps_tear_none(neighbour: Callable[[Any], None]) -> None:
    model = {f"l{n}": np.ones(4, np.float32) for n in range(12)}
    grads = {name: np.full(4, 0.5, np.float32) for name in model}
    state = opt.setup(opt.Adam(0.001), model)
    done, errors = threading.Event(), list[Exception]()

    def beside() -> None:
        try:
            while not done.is_set():
                neighbour(state)
        except Exception as error:  # noqa: BLE001 the test looks at it
            errors.append(error)

    worker = threading.Thread(target=beside)
    worker.start()
    try:
        for _ in range(150):
            opt.update_(state, model, grads)
    finally:
        done.set()
        worker.join()

    assert errors == []
    for name, x in model.items():
        assert np.isfinite(x).all()
        assert (x < 1).all() or name == "l5"
        assert (x > 1 - 150 * 0.02 * 1.01).all()
