"""A step is stored as a whole, whatever signal comes while it is."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers.engines import signals
from optimisers.engines.signals import held

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no signals for users")


class Timeout(Exception):
    """What a handler raises."""


@pytest.fixture
def at() -> Iterator[Callable[[int, Callable[..., object]], None]]:
    """Sets the handler of a signal for one test."""
    before: dict[int, Any] = {}

    def put(number: int, handler: Callable[..., object]) -> None:
        before.setdefault(number, signal.signal(number, handler))

    yield put
    for number, handler in before.items():
        signal.signal(number, handler)


def boom(*_: object) -> None:
    raise Timeout


def send(number: int) -> None:
    os.kill(os.getpid(), number)


NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGRTMIN", "SIGRTMAX")
KINDS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


# -- a block -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", KINDS, ids=str)
def test_a_handler_waits_until_the_block_is_done(number: int, at: Callable[..., None]) -> None:
    seen: list[str] = []
    at(number, lambda *_: seen.append("handler"))
    with held():
        send(number)
        seen.append("block")

    assert seen == ["block", "handler"]


def test_what_a_handler_raises_is_raised_when_the_block_is_done(at: Callable[..., None]) -> None:
    at(signal.SIGUSR1, boom)
    seen: list[str] = []

    def block() -> None:
        with held():
            send(signal.SIGUSR1)
            seen.append("block")

    with pytest.raises(Timeout):
        block()

    assert seen == ["block"]


def test_every_handler_is_called_though_one_raises(at: Callable[..., None]) -> None:
    seen: list[int] = []
    at(signal.SIGUSR1, boom)
    at(signal.SIGUSR2, lambda number, _: seen.append(number))

    def block() -> None:
        with held():
            send(signal.SIGUSR1)
            send(signal.SIGUSR2)

    with pytest.raises(Timeout):
        block()

    assert seen == [signal.SIGUSR2]


def test_handlers_are_put_back(at: Callable[..., None]) -> None:
    at(signal.SIGUSR1, boom)
    before = {n: signal.getsignal(n) for n in signals.NUMBERS}
    with held():
        assert signal.getsignal(signal.SIGUSR1) != boom
    with pytest.raises(ZeroDivisionError), held():
        raise ZeroDivisionError

    assert {n: signal.getsignal(n) for n in signals.NUMBERS} == before


def test_a_handler_is_told_its_number_and_its_frame(at: Callable[..., None]) -> None:
    seen: list[tuple[int, FrameType | None]] = []
    at(signal.SIGUSR1, lambda *given: seen.append(given))
    with held():
        send(signal.SIGUSR1)

    assert seen[0][0] == signal.SIGUSR1
    assert isinstance(seen[0][1], FrameType)


def test_blocks_may_be_nested(at: Callable[..., None]) -> None:
    seen: list[str] = []
    at(signal.SIGUSR1, lambda *_: seen.append("handler"))
    with held():
        with held():
            send(signal.SIGUSR1)
        seen.append("outer block")

    assert seen == ["outer block", "handler"]


def test_signals_that_are_not_handled_in_python_keep_their_action(at: Callable[..., None]) -> None:
    for action in (signal.SIG_IGN, signal.SIG_DFL):
        at(signal.SIGUSR1, action)
        signal.signal(signal.SIGUSR1, action)
        with held():
            assert signal.getsignal(signal.SIGUSR1) == action


def test_another_thread_replaces_nothing(at: Callable[..., None]) -> None:
    at(signal.SIGUSR1, boom)
    seen: list[object] = []

    def work() -> None:
        with held():
            seen.append(signal.getsignal(signal.SIGUSR1))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()

    assert seen == [boom]


# -- a step --------------------------------------------------------------------------------------------------


class Stop:
    """Sends a signal at the nth call of a function of Python while a step runs."""

    def __init__(self, n: int, number: int) -> None:
        self.left, self.number = n, number

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        ours = "optimisers" in frame.f_code.co_filename and "<" not in frame.f_code.co_name
        if ours and event in ("call", "c_call"):  # what a generator raises as it is closed is lost
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                send(self.number)


def made() -> tuple[dict[str, Any], Any]:
    model = {"a": np.ones(5, np.float32), "b": np.ones(3)}
    return model, opt.setup(opt.AdamW(0.1, lam=0.01), model)


def seen(model: dict[str, Any], state: Any) -> list[Any]:
    """The parameters and the state, counters among it."""
    return [
        (x.tolist(), state[k].state.m.tolist(), tuple(map(float, state[k].state.weight)))
        for k, x in model.items()
    ]


GRADS = {"a": np.full(5, 0.5, np.float32), "b": np.full(3, 0.5)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=str)
@pytest.mark.parametrize("look", [False, True], ids=["raises", "looks"])
def test_a_signal_anywhere_in_a_step_finds_it_whole(number: int, look: bool, at: Callable[..., None]) -> None:
    """Tried at every fourth call that a step makes: it is stored when the handler is called, or not begun."""
    model, state = made()
    opt.update_(state, model, GRADS)
    old = seen(model, state)
    opt.update_(state, model, GRADS)
    new = seen(model, state)
    found: list[Any] = []

    def handler(*_: object) -> None:
        if look:
            found.append(seen(model, state))
        else:
            raise Timeout

    at(number, handler)
    outcomes: set[str] = set()
    n = 0
    while True:
        n += 4
        model, state = made()
        opt.update_(state, model, GRADS)
        stop = Stop(n, number)
        sys.setprofile(stop)
        try:
            opt.update_(state, model, GRADS)
        except Timeout:
            found.append(seen(model, state))
        finally:
            sys.setprofile(None)
        if stop.left > 0:
            break
        assert found[-1] in (old, new), f"torn at call {n}"
        outcomes.add("old" if found[-1] == old else "new")

    assert outcomes == {"old", "new"}
    assert n > 50


def test_a_pure_step_replaces_no_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = made()
    entered: list[None] = []
    enter = held.__enter__

    def counted(self: held) -> None:
        entered.append(None)
        enter(self)

    monkeypatch.setattr(held, "__enter__", counted)
    opt.update(state, model, GRADS)
    assert entered == []
    opt.update_(state, model, GRADS)
    assert len(entered) == 1


def test_a_handler_that_saves_an_optimizer_of_torch_finds_it_whole(
    at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    published = pytest.importorskip("optimisers.torch.published")
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = opt.TorchOptimizer([p], opt.Adam(0.1))
    p.grad = torch.ones(3)
    optimizer.step()
    saved: list[dict[str, float]] = []

    def save(*_: object) -> None:
        entry = optimizer.state_dict()["state"][0]
        saved.append({key: float(entry[key].ravel()[0]) for key in ("step", "m", "weight.0")})

    at(signal.SIGUSR1, save)
    refresh = published.Published.refresh

    def interrupted(self: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)  # arrays are new, what is shown of them is not yet
        refresh(self)

    monkeypatch.setattr(published.Published, "refresh", interrupted)
    optimizer.step()
    (entry,) = saved
    average = pytest.approx(1 - 0.9**2)  # of two gradients of 1
    assert entry == {"step": 2, "m": average, "weight.0": average}
