"""How is something done as a whole, whatever signal comes? Handlers written in Python wait until it is done.

Python runs them in the main thread, between two of its instructions; the signal itself may come to any
thread. So the mask of one thread does not hold them back. While a `held` block runs in the main thread, every
such handler is replaced by one that takes note; afterwards each is put back, then called as often as its
signal came. Signals without a handler in Python keep their action: they end the process, and no half step is
left to see.
"""

import importlib
import importlib.util
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], object]

FAST = "_signal"
"""Where the functions of `signal` are without the names that it gives to numbers: 3 microseconds a block
instead of 60.
"""

_calls = importlib.import_module(FAST if importlib.util.find_spec(FAST) else "signal")
_handler_of: Callable[[int], Handler | int | None] = _calls.getsignal
_set_handler: Callable[[int, Handler], Handler | int | None] = _calls.signal

NUMBERS = tuple(sorted(int(s) for s in signal.valid_signals()))


class held:  # noqa: N801 read as a keyword: `with held():`
    """Holds back handlers of signals while its block runs; in other threads than the main one, which run no
    handlers, it does nothing.
    """

    __slots__ = ("before", "came")

    def __enter__(self) -> None:
        self.before: list[tuple[int, Handler]] = []
        self.came: list[tuple[int, FrameType | None]] = []
        if threading.current_thread() is not threading.main_thread():
            return
        found = zip(NUMBERS, map(_handler_of, NUMBERS), strict=True)
        self.before = [(n, h) for n, h in found if callable(h)]
        try:
            for number, _ in self.before:
                _set_handler(number, self.note)
        except ValueError:  # the main thread of another interpreter
            self.before = []
        except BaseException:  # raised by a handler that had not been replaced yet
            self.put_back()
            raise

    def note(self, number: int, frame: FrameType | None) -> None:
        self.came.append((number, frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.put_back()
        finally:
            if self.came:
                self.deliver()

    def put_back(self) -> None:
        """Every handler as it was; one that runs and raises meanwhile, since it is back before others, is
        heard when all are.
        """
        try:
            for number, handler in self.before:
                _set_handler(number, handler)
        except BaseException:
            self.put_back()
            raise

    def deliver(self) -> None:
        """Call the handlers of the signals that came; if one raises, the others are called before that is
        heard.
        """
        number, frame = self.came.pop(0)
        try:
            dict(self.before)[number](number, frame)
        finally:
            if self.came:
                self.deliver()
