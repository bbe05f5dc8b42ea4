"""What other threads do to a state while it is stepped leaves every step whole."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optimisers as opt
from optimisers.step import update
from optimisers.step.jobs import Steps


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


EDITS: dict[str, Callable[[Any], None]] = {
    "number": lambda s: opt.adjust_(s, eta=0.5),
    "part": lambda s: opt.adjust_(s, eta=0.5, where="a"),
    "schedule": lambda s: opt.adjust_(s, eta=lambda t: 0.5 + 0 * t),
    "rule": lambda s: setattr(s["a"], "rule", opt.Momentum(0.5, 0.9)),
    "frozen": opt.freeze_,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_an_edit_from_another_thread_waits_for_the_step(
    library: str, edit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Any = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}[library]
    model, grads = ({k: make([value] * 3) for k in "ab"} for value in (0.0, 1.0))
    state = opt.setup(opt.Momentum(0.1, 0.9), model)
    state, model = opt.update_(state, model, grads)
    others: list[threading.Thread] = []

    def beside(function: Callable[..., Any]) -> Callable[..., Any]:
        """The same, and then an edit from another thread begins."""

        def called(*args: Any) -> Any:
            found = function(*args)
            others.append(threading.Thread(target=EDITS[edit], args=(state,)))
            others[-1].start()
            others[-1].join(0.1)
            return found

        return called

    if library == "jax":
        monkeypatch.setattr(update, "stepped", beside(update.stepped))
    else:
        monkeypatch.setattr(Steps, "prepare", beside(Steps.prepare))
    state, model = opt.update_(state, model, grads)
    monkeypatch.undo()
    others[0].join()
    # Two steps of momentum by hand: v = 0.1, then 0.9 * 0.1 + 0.1.
    for leaf in "ab":
        np.testing.assert_allclose(np.asarray(model[leaf]), -0.1 - 0.19, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(state[leaf].state), 0.19, rtol=1e-6)
    state, model = opt.update_(state, model, grads)
    velocity = 0.0 if edit == "frozen" else 0.9 * 0.19 + 0.5
    np.testing.assert_allclose(np.asarray(model["a"]), -0.29 - velocity, rtol=1e-6)
