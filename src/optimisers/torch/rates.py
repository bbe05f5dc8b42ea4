"""What is the rate where a schedule of ours stands under a scheduler of torch? Their product."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import gc
from typing import Any, final

from torch.optim.lr_scheduler import ReduceLROnPlateau

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


def has_scheduler(group: dict[str, Any]) -> bool:
    """Whether a scheduler of torch sets this group. All note their first rate in it, but ReduceLROnPlateau,
    which leaves no trace: it is looked for among all objects. Numbers do not depend on that.
    """
    plateaus = (each for each in gc.get_objects() if issubclass(type(each), ReduceLROnPlateau))
    return "initial_lr" in group or any(
        mine is group for each in plateaus for mine in each.optimizer.param_groups
    )


def of_its_own(scheduler: str, schedule: object) -> str:
    """Why a scheduler that does not scale is refused over a schedule."""
    return (
        f"{scheduler} sets rates of its own, and the rate of a group follows {schedule!r}; write a number as "
        "eta, or take a scheduler that scales, such as LambdaLR"
    )
