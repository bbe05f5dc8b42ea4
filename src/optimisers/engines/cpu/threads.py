"""Threads that share out the chunks of one kernel call.

The kernels take their next span of chunks from an atomic counter and hold no lock of Python's. So one
compiled kernel serves alone, on these threads, and on those of another runtime; a busy core delays a step by
one span at most, not by a barrier for each tensor; and there is no thread library to be upset by fork. A
forked child starts threads of its own.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable

from optimisers.engines.cpu.limits import get_num_threads as available
from optimisers.engines.signals import held

SERIAL_BELOW = 1 << 18
"""Elements below which waking a thread costs more than it brings."""


class _Shared:
    """A function that several threads run at once, and who of the helpers does."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.closed = False
        """Whether helpers who come now need not begin."""
        self.begun: list[None] = []
        self.ended: list[BaseException | None] = []
        self.token: queue.SimpleQueue[None] = queue.SimpleQueue()

    def help(self) -> None:
        """Run the function, in a helper, unless it is closed. Says that it has begun before it looks, so that
        whoever closes it either sees that or is seen.
        """
        self.begun.append(None)
        error: BaseException | None = None
        try:
            if not self.closed:
                self.function()
        except BaseException as raised:  # noqa: BLE001 handed to the caller
            error = raised
        self.ended.append(error)
        self.token.put(None)

    def settle(self) -> None:
        """Wait until no helper runs the function any more; what is raised meanwhile is raised afterwards.

        May be called again where it was left: all that counts is in the lists.
        """
        raised: BaseException | None = None
        while not self.closed or len(self.ended) < len(self.begun):
            try:
                self.closed = True
                while len(self.ended) < len(self.begun):
                    self.token.get()
            except BaseException as error:  # noqa: BLE001 it is raised below
                raised = error
        if raised is not None:
            raise raised


class _Pool:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget threads that did not survive a fork, and who held the lock then."""
        self.lock = threading.RLock()  # a finaliser that steps may come while this thread holds it
        self.inbox: queue.SimpleQueue[_Shared] = queue.SimpleQueue()
        self.started = 0

    def grow(self, count: int) -> int:
        """Have this many threads, or as many as the system gives; how many there are."""
        if self.started < count:
            with self.lock, contextlib.suppress(RuntimeError):
                while self.started < count:
                    threading.Thread(
                        target=self.work, args=(self.inbox,), daemon=True, name="optimisers"
                    ).start()
                    self.started += 1
        return min(count, self.started)

    @staticmethod
    def work(inbox: "queue.SimpleQueue[_Shared]") -> None:
        while True:
            inbox.get().help()


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.reset)


def together(function: Callable[[], object], elements: int, threads: int | None = None) -> None:
    """Run `function` on several threads at once, this one included, and return when all have; serially if
    small.

    Returns or raises only when no thread runs it any more, whatever a handler of a signal raises: what it
    writes may be freed by then.
    """
    count = 1 + elements // SERIAL_BELOW
    if count > 1:
        count = min(count, available() if threads is None else threads)
    if count <= 1:
        function()
        return
    shared = _Shared(function)
    with held():
        try:
            for _ in range(_pool.grow(count - 1)):
                _pool.inbox.put(shared)
            function()
        finally:
            shared.settle()
    for failure in shared.ended:
        if failure is not None:
            raise failure
