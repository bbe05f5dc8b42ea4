"""Threads that share one kernel: no thread runs it any more when its caller goes on."""

# pyright: reportPrivateUsage=false

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from optimisers.engines.cpu import threads

ELEMENTS = 4 * threads.SERIAL_BELOW


class Timeout(Exception):
    """What a handler raises."""


class Slow:
    """A function that helpers run longer than its caller."""

    def __init__(self) -> None:
        self.running, self.runs = 0, 0
        self.lock, self.caller = threading.Lock(), threading.get_ident()
        self.helped = threading.Event()

    def __call__(self) -> None:
        with self.lock:
            self.running += 1
            self.runs += 1
        if threading.get_ident() == self.caller:
            self.helped.wait(5)
        else:
            self.helped.set()
            time.sleep(0.2)
        with self.lock:
            self.running -= 1


@pytest.fixture
def boom() -> Iterator[int]:
    """A signal whose handler raises Timeout."""
    if not hasattr(signal, "SIGUSR1"):
        pytest.skip("this system has no signals for users")

    def handler(*_: object) -> None:
        raise Timeout

    before = signal.signal(signal.SIGUSR1, handler)
    yield signal.SIGUSR1
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_raises_while_helpers_run_is_heard_when_they_have_ended(boom: int) -> None:
    slow = Slow()
    timer = threading.Thread(
        target=lambda: (slow.helped.wait(5), time.sleep(0.05), os.kill(os.getpid(), boom))
    )
    timer.start()
    with pytest.raises(Timeout):
        threads.together(slow, ELEMENTS, 3)
    timer.join()

    assert slow.runs >= 2
    assert slow.running == 0


def test_a_handler_that_raises_at_any_call_leaves_nobody_running(boom: int) -> None:
    """Without the hold of signals too: what waits goes on waiting."""
    for n in range(1, 60):
        slow, left = Slow(), [n]

        def stop(frame: FrameType, *_: object, left: list[int] = left) -> None:
            if "threads.py" in frame.f_code.co_filename and "optimisers" in frame.f_code.co_filename:
                left[0] -= 1
                if left[0] == 0:
                    sys.setprofile(None)
                    os.kill(os.getpid(), boom)

        slow.helped.set()
        sys.setprofile(stop)
        try:
            threads.together(slow, ELEMENTS, 2)
        except Timeout:
            pass
        finally:
            sys.setprofile(None)

        assert slow.running == 0, n
        if left[0] > 0:
            return
    pytest.fail("a call of so few functions should end")


def test_an_exception_from_outside_waits_too() -> None:
    """As `PyThreadState_SetAsyncExc` raises it in any thread, where no signals are held back."""
    shared = threads._Shared(Slow())
    helper = threading.Thread(target=shared.help)
    helper.start()
    shared.function.helped.wait(5)  # type: ignore[attr-defined]
    token, tries = shared.token, [0]

    class Token:
        put = token.put

        @staticmethod
        def get() -> None:
            tries[0] += 1
            if tries[0] == 1:
                raise Timeout
            token.get()

    shared.token = Token()  # type: ignore[assignment]
    with pytest.raises(Timeout):
        shared.settle()

    assert shared.function.running == 0  # type: ignore[attr-defined]
    helper.join()


def test_what_helpers_and_caller_raise_is_heard() -> None:
    caller = threading.get_ident()

    def fails(mine: bool) -> Callable[[], None]:
        begun = threading.Event()

        def function() -> None:
            here = threading.get_ident() == caller
            if not here:
                begun.set()
            else:
                begun.wait(5)
            if here is mine:
                raise ZeroDivisionError

        return function

    for mine in (False, True):
        with pytest.raises(ZeroDivisionError):
            threads.together(fails(mine), ELEMENTS, 2)


def test_a_helper_that_comes_late_does_not_begin() -> None:
    slow = Slow()
    shared = threads._Shared(slow)
    shared.settle()
    shared.help()

    assert slow.runs == 0


def test_a_step_inside_the_pool_s_lock_does_not_wait_for_itself() -> None:
    """As a finaliser does, which may run whenever memory is asked for."""
    slow = Slow()
    slow.helped.set()
    done = threading.Event()

    def inside() -> None:
        with threads._pool.lock:
            slow.caller = threading.get_ident()
            threads.together(slow, 100 * threads.SERIAL_BELOW, threads._pool.started + 2)
            done.set()

    threading.Thread(target=inside, daemon=True).start()
    assert done.wait(20)


FORK = """
import os, sys, threading, time
import numpy as np
import optimisers as opt
from optimisers.engines import cache, jit

def compiling():
    with cache.lock():
        held.set()
        time.sleep(0.5)

def step(rule):
    x = np.ones(4, np.float32)
    state, x = opt.update_(opt.setup(rule, x), x, x.copy())
    return float(x[0])

step(opt.Descent(0.5))
held = threading.Event()
threading.Thread(target=compiling).start()
held.wait()
child = os.fork()
if child == 0:
    os._exit(0 if step(opt.Momentum(0.25)) == 0.75 else 1)
started = time.monotonic()
while time.monotonic() < started + 60:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(child, 9)
sys.exit("the child hangs")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_while_a_thread_compiles_takes_a_step() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORK], timeout=120, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr
