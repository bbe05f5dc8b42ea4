"""Several gradients for one step."""

from typing import Any, NamedTuple

from optimisers.arrays.protocol import Array
from optimisers.ops import floor, maximum, when, where, zeros_like
from optimisers.ops.steps import clock
from optimisers.rule import Rule, at_least_one


class AccumState(NamedTuple):
    sum: Any
    """The sum of the gradients since the last step."""
    taken: int
    """How many they are."""


class AccumGrad(Rule):
    """Passes on the mean of n gradients at every n-th update; in between there is no step, and later rules do
    not run.

    `Chain(AccumGrad(4), Adam())` steps as Adam does on a batch four times as large. The updates that cover an
    array are counted, whether it has a gradient there or not, so all arrays step together; a gradient that is
    missing counts as zero in the mean. An array that has none at the n-th update itself takes no step there:
    what it has gathered goes into its next step, whose mean is then over all that it holds, if they are more
    than n.
    """

    n: int

    def check(self) -> None:
        at_least_one(self, "n")

    def init(self, x: Array) -> AccumState:
        return AccumState(zeros_like(x), 0)

    def apply(self, state: AccumState, x: Array, dx: Array) -> Any:
        gathered = where(state.taken == 0, 0, state.sum) + dx
        taken = state.taken + 1
        windows = (clock(dx, state.taken) + 1) / self.n
        full = floor(windows) == windows
        mean = gathered / maximum(taken, self.n)
        return AccumState(gathered, where(full, 0, taken)), when(full, mean)
