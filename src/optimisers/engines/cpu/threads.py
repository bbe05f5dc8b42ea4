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
from typing import Any

SERIAL_BELOW = 1 << 18
"""Elements below which waking a thread costs more than it brings."""

MOST = 16
"""Memory, not arithmetic, limits a step: more threads add nothing."""


class _Pool:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget threads that did not survive a fork."""
        self.lock = threading.Lock()
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.started = 0

    def grow(self, count: int) -> int:
        """Have this many threads, or as many as the system gives; how many there are."""
        with self.lock, contextlib.suppress(RuntimeError):
            while self.started < count:
                threading.Thread(target=self.work, args=(self.inbox,), daemon=True, name="optimisers").start()
                self.started += 1
        return min(count, self.started)

    @staticmethod
    def work(inbox: "queue.SimpleQueue[Any]") -> None:
        while True:
            function, ticket, done = inbox.get()
            if not ticket.acquire(blocking=False):
                continue
            try:
                function()
            except BaseException as error:  # noqa: BLE001 handed to the caller
                done.put(error)
            else:
                done.put(None)


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.reset)


def available() -> int:
    """How many threads a large step uses."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


def together(function: Callable[[], Any], elements: int, threads: int | None = None) -> None:
    """Run `function` on several threads at once, this one included, and return when all have; serially if
    small.
    """
    count = threads if threads is not None else available()
    count = min(count, 1 + elements // SERIAL_BELOW)
    if count <= 1:
        function()
        return
    helpers = _pool.grow(count - 1)
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    tickets = [threading.Lock() for _ in range(helpers)]
    for ticket in tickets:
        _pool.inbox.put((function, ticket, done))
    try:
        function()
    finally:  # whoever has begun may still be writing, so an interrupt waits too; who has not, need not begin
        failures = [_wait(done) for ticket in tickets if not ticket.acquire(blocking=False)]
    for failure in failures:
        if failure is not None:
            raise failure


def _wait(done: "queue.SimpleQueue[BaseException | None]") -> BaseException | None:
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            result = done.get()
        except KeyboardInterrupt as error:
            interrupted = error
        else:
            return interrupted or result
