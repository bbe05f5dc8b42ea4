"""What is the rate where a schedule of ours stands under a scheduler of torch? Their product."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import gc
from typing import Any, final

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from optimisers.errors import BadSetting
from optimisers.schedules import Scaled

ABSOLUTE = ("max_lr", "swa_lr")
"""Keys that stand in a group before a scheduler starts which sets rates of its own."""


@final
class Governed(Scaled):
    """A schedule times the factor that a scheduler of torch has set."""


def scaled(schedule: Any, factor: float) -> Governed:
    """A schedule with a factor in place of the one that a scheduler may have set."""
    return Governed(schedule.schedule if isinstance(schedule, Governed) else schedule, factor)


def marks(step: object) -> bool:
    """Whether this is how a scheduler of torch, when it is made, replaces the `step` of its optimiser."""
    return hasattr(step, "_wrapped_by_lr_sched")


def scheduler_of(group: dict[str, Any]) -> object | None:
    """A scheduler that sets this group though it has not said so when it was made: ReduceLROnPlateau, or one
    of another package. Looked for only where a rate was written over a schedule.
    """
    for found in gc.get_objects():
        kind = type(found)
        foreign = kind.__name__.endswith(("LR", "Scheduler")) and not issubclass(kind, LRScheduler)
        if foreign or issubclass(kind, ReduceLROnPlateau):
            groups = getattr(getattr(found, "optimizer", None), "param_groups", ())
            if any(each is group for each in groups):
                return found
    return None


def refuse_absolute(group: dict[str, Any], shown: float, schedule: object) -> None:
    """Raise BadSetting for a scheduler that does not scale the rate of a group: it has written one
    already.
    """
    if group["initial_lr"] != 1.0 or group["lr"] != shown or any(key in group for key in ABSOLUTE):
        raise BadSetting(
            f"this scheduler sets rates of its own, and the rate of a group follows {schedule!r}; write a "
            "number as eta, or take a scheduler that scales, such as LambdaLR"
        )
