"""Who saves the last few checkpoints of a run where a trainer has the loop? A callback for Lightning, and one
for the Trainer of Transformers.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from optimisers.checkpoint.folder import Checkpoints
from optimisers.errors import BadState
from optimisers.torch.optimizer import TorchOptimizer

__all__ = ["lightning_callback", "trainer_callback"]

More = Callable[[], Mapping[str, object]]
"""What else is to be saved, asked for at every checkpoint."""


def lightning_callback(checkpoints: Checkpoints, more: More | None = None) -> Any:
    """A callback for Lightning that saves the module and its TorchOptimizer as `checkpoints` says, by the
    number of steps, and goes on from the newest whole file when `fit` begins.

    `lightning.Trainer(callbacks=[opt.lightning_callback(opt.Checkpoints("run", every=1000))])`. With them go
    schedulers, Lightning's own place in its loops, and the generator of random numbers of torch on the CPU.
    As with checkpoints of Lightning itself, a run goes on to the bit from the end of an epoch; in the middle
    of one, data loaders that have no state of their own begin again. `more()` gives what else is saved;
    `resumed`, of the callback, is what was found, as `Checkpoints.resume` gives it.

    Raises BadState, at the start, for other optimisers than one TorchOptimizer.
    """
    import lightning

    class Keeping(lightning.Callback):
        resumed: Any = None
        kept = 0
        """The step after which was saved last: several batches may make one step."""

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            found = checkpoints.resume(_only(trainer.optimizers), pl_module)
            self.resumed, self.kept = found, found.step
            if found.step:
                _restore(found.more, _schedulers(trainer))
                trainer.fit_loop.load_state_dict(found.more.pop("loops"))

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            step = trainer.global_step
            if step % checkpoints.every == 0 and step != self.kept:
                self.kept = step
                kept = _kept(_schedulers(trainer), more) | {"loops": trainer.fit_loop.state_dict()}
                checkpoints.save(step, _only(trainer.optimizers), pl_module, **kept)

    return Keeping()


def trainer_callback(checkpoints: Checkpoints, more: More | None = None) -> Any:
    """A callback for the Trainer of Transformers that saves the model and its TorchOptimizer as `checkpoints`
    says, and goes on from the newest whole file when `train` begins.

    `transformers.Trainer(..., callbacks=[opt.trainer_callback(opt.Checkpoints("run", every=1000))])`. With
    them go the scheduler, `global_step`, so that the run ends at its `max_steps`, and the generator of random
    numbers of torch on the CPU. The place in the data cannot be set from a callback: the Trainer reads them
    from the beginning again. `more()` gives what else is saved; `resumed`, of the callback, is what was
    found, as `Checkpoints.resume` gives it.

    Raises BadState, at the start, for another optimiser than a TorchOptimizer.
    """
    import transformers

    class Keeping(transformers.TrainerCallback):
        resumed: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            found = checkpoints.resume(_only([given["optimizer"]]), given["model"])
            self.resumed = found
            if found.step:
                _restore(found.more, [given["lr_scheduler"]])
                state.global_step = found.step

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            kept = _kept([given["lr_scheduler"]], more) if state.global_step % checkpoints.every == 0 else {}
            checkpoints.after(state.global_step, _only([given["optimizer"]]), given["model"], **kept)

    return Keeping()


def _only(optimizers: list[Any]) -> TorchOptimizer:
    """The one optimiser of a trainer, without what was put around it."""
    found = [getattr(each, "optimizer", each) for each in optimizers]
    if len(found) != 1 or not isinstance(found[0], TorchOptimizer):
        has = ", ".join(type(each).__name__ for each in found) or "none"
        raise BadState(f"the optimisers of the trainer are {has}; its checkpoints take one TorchOptimizer")
    return found[0]


def _schedulers(trainer: Any) -> list[Any]:
    """The schedulers of a trainer of Lightning."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _kept(schedulers: list[Any], more: More | None) -> dict[str, Any]:
    """What is saved beside model and state."""
    states = [_numbers(scheduler.state_dict()) for scheduler in schedulers]
    return {"schedulers": states, "torch_rng": torch.get_rng_state(), **(more() if more else {})}


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a scheduler without its milestones, which are what it was made with."""
    return {key: value for key, value in state.items() if not isinstance(value, Counter)}


def _restore(more: dict[str, Any], schedulers: list[Any]) -> None:
    """Give schedulers and the generator of torch what was saved of them."""
    states = more.pop("schedulers")
    if len(states) != len(schedulers):
        raise BadState(f"the checkpoint has {len(states)} schedulers, and the trainer {len(schedulers)}")
    for scheduler, state in zip(schedulers, states, strict=True):
        scheduler.load_state_dict(state)
    torch.set_rng_state(torch.from_numpy(more.pop("torch_rng")))
