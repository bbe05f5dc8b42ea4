"""How is a model trained without keeping its gradients? Each parameter is stepped in the backward pass."""

# pyright: reportPrivateImportUsage=false

from typing import Any

import torch

from optimisers.torch.hooks import Hooked
from optimisers.torch.optimizer import TorchOptimizer

__all__ = ["step_in_backward"]


def step_in_backward(params: Any, rule: Any, *, engine: str | None = None, **settings: Any) -> TorchOptimizer:
    """An optimiser that steps each parameter in `backward`, as soon as its gradient is complete, and frees
    the gradient: all gradients are never there at once.

    Arguments and what comes back are those of `TorchOptimizer`, and so are the numbers. The loop stays as it
    is: `loss.backward()` steps, and `optimizer.step()` behind it ends the step, in which parameters without a
    gradient are covered too. Settings that are changed count from the next backward pass on. Rules for
    matrices are stepped one matrix at a time. `optimizer.in_backward.remove()` takes the hooks out.

    One backward pass is one step. To add gradients up over several take `Chain(AccumGrad(n), rule)`. Call
    `fully_shard` before this. A DistributedDataParallel, which keeps all gradients, is refused.

    Raises BadSetting for a rule that needs more than one gradient at a time: totals over the model, such as
    the norm of all gradients, the loss, second gradients, or gradients of single examples. `backward` raises
    BadState for a second gradient before `optimizer.step()`, and what the rule raises: parameters whose
    gradients came before that are stepped then, and others are not.
    """
    if isinstance(params, torch.nn.parallel.DistributedDataParallel):
        Hooked().remove()
    optimizer = TorchOptimizer(params, rule, engine=engine, **settings)
    optimizer.hook_into_backward()
    return optimizer
