"""How do type checkers see a hyper-parameter? As a number where it is read, and as more where it is given."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsFloat

Given = float | SupportsFloat | Callable[[Any], Any]
"""What a hyper-parameter may be given as: a number, a 0-d array of any library, or a schedule, a function of
the clock.
"""


class Setting:
    """How type checkers see a hyper-parameter: given as a number or a schedule, read as a number.

    A field of your own, `eta: float = 0.1`, takes both too, but a checker then knows of numbers alone;
    `eta: Setting = setting(0.1)` tells it of schedules.
    """

    if TYPE_CHECKING:

        def __get__(self, rule: object, of: object = None) -> float: ...

        def __set__(self, rule: object, given: Given) -> None: ...


class Pair:
    """Two hyper-parameters in a tuple, in the same way."""

    if TYPE_CHECKING:

        def __get__(self, rule: object, of: object = None) -> tuple[float, float]: ...

        def __set__(self, rule: object, given: tuple[Given, Given]) -> None: ...


def setting(default: float | tuple[float, float]) -> Any:
    """The default of a field that is annotated with `Setting` or `Pair`, as it is."""
    return default
