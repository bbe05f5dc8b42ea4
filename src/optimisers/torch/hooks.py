"""How is a parameter stepped as soon as its gradient is complete? By a hook that autograd calls then, and
which frees the gradient.
"""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from optimisers.arrays.torch import library as tensors
from optimisers.errors import BadSetting, BadState
from optimisers.graph.passes import stages
from optimisers.rule import Rule
from optimisers.rules.gradient import ClipGlobalNorm
from optimisers.settings import parts
from optimisers.state.group import Shape, program_of, started
from optimisers.step.update import update_listed
from optimisers.torch.keeping import Keeper
from optimisers.tree.path import KeyPath

if TYPE_CHECKING:
    from optimisers.state.store import Store
    from optimisers.tree.layout import Node


OF_TORCH = "_in_backward_optimizers"
"""Where torch looks for what steps a parameter in backward."""

HOOKS = "_post_accumulate_grad_hooks"
"""Where torch keeps the hooks of a parameter."""


@final
class Hooked:
    """Stands where torch looks for what steps a parameter in backward: a DistributedDataParallel, which
    averages gradients after that, finds it, and says so by what is raised here.
    """

    def remove(self) -> None:
        raise BadState(
            "a DistributedDataParallel averages gradients after they were stepped in backward, and keeps "
            "them all; take TorchOptimizer(module, rule, shard=group) with it, or step_in_backward with "
            "FSDP2"
        )

    step = remove


@final
class InBackward:
    """The hooks on the parameters of an optimiser, which step each of them in `backward`."""

    def __init__(self, keeper: Keeper, read: Callable[[], None]) -> None:
        for mine in keeper.groups:
            if mine.rule is not None and mine.group["params"]:
                refuse_needs(mine.rule, mine.group["params"][0])
        self.keeper, self.read = keeper, read
        keeper.alone = True
        self.lock = threading.RLock()
        """Gradients of several devices come in threads of their own."""
        self.handles: Any = WeakTensorKeyDictionary()
        self.alone: dict[Any, tuple[Store, Node]] = {}
        """The state of each parameter alone: the groups are those of the whole state."""
        self.seen: tuple[Any, ...] = ()
        """What these were made from."""
        self.open = False
        """Whether a parameter was stepped since the last `finish`."""
        self.done: set[Any] = set()
        self.attach()

    def attach(self) -> None:
        """Set a hook on every parameter that is trained and has none.

        Raises BadState for one that another optimiser steps in backward.
        """
        given = {p for mine in self.keeper.groups if mine.rule is not None for p in mine.group["params"]}
        new = [p for p in given if p.requires_grad and p not in self.handles]
        for p in new:
            hooks = getattr(p, HOOKS, None) or {}
            if any(isinstance(hook, InBackward) for hook in hooks.values()):
                raise BadState(
                    f"a parameter of shape {tuple(p.shape)} is stepped in backward by another optimiser; "
                    "write optimizer.in_backward.remove() of that one first"
                )
        for p in new:
            self.handles[p] = p.register_post_accumulate_grad_hook(self)
            setattr(p, OF_TORCH, [Hooked()])
            _tell(p)

    def remove(self) -> None:
        """Take the hooks out: from here on gradients stay, and `step` takes what is there."""
        for p, handle in list(self.handles.items()):
            handle.remove()
            delattr(p, OF_TORCH)
            del self.handles[p]
            _tell(p, [])

    def __call__(self, p: Any) -> None:
        """Step a parameter whose gradient is complete, and free that.

        Raises BadState for a second gradient in one step, and what the rule raises; then the parameter and
        its state are as they were, and the gradient stays.
        """
        with self.lock, torch.no_grad():
            if not self.open or p not in self.alone:
                self.begin()
            if p in self.done:
                raise BadState(
                    f"{self.keeper.names[p]!r} has a second gradient in one step, and was stepped by the "
                    "first; write optimizer.step() behind every backward. To add gradients up over several, "
                    "take Chain(AccumGrad(n), rule); a parameter that is used inside and outside of a "
                    "reentrant checkpoint takes use_reentrant=False"
                )
            self.step(p)

    def begin(self) -> None:
        """Begin a step: follow what was done to groups and state."""
        self.keeper.refuse_lent("a backward pass that steps")
        self.read()
        if self.handles:
            self.attach()
        self.open = True
        held = self.keeper.held
        if held is None:
            return
        store = held.store
        seen = store.layout, store.frozen, *store.groups
        if len(seen) == len(self.seen) and all(a is b for a, b in zip(seen, self.seen, strict=True)):
            return
        nodes = {node.leaf: node for _, node in store.layout.root.live}
        stores = [store.apart([group]) for group in store.groups]
        for narrow in stores:
            narrow.index()
        self.alone = {p: (stores[store.group_of[leaf]], nodes[leaf]) for p, leaf in held.leaf_of.items()}
        self.seen = seen

    def step(self, p: Any) -> None:
        """Step a parameter by the gradient that it has, and free that."""
        store, node = self.alone[p]
        update_listed(store, node, [p], [[p.grad]])
        p.grad = None
        self.done.add(p)

    def finish(self, *, scaled: bool) -> None:
        """End a step: parameters whose gradients did not come are covered too, as by any step.

        Raises BadState where a GradScaler has `scaled` the loss.
        """
        if scaled:
            raise BadState(
                "a GradScaler has scaled the loss, and parameters that are stepped in backward take their "
                "gradients before it can divide them; train in bfloat16 without a scaler, or write "
                "TorchOptimizer"
            )
        with self.lock:
            if not self.open:
                self.begin()
            for p in self.alone:
                if p not in self.done:
                    self.step(p)
            self.open, self.done = False, set()
            if self.keeper.held is not None:
                self.keeper.held.refresh()


def _tell(p: Any, found: list[Hooked] | None = None) -> None:
    """Let a DistributedDataParallel that is made around a parameter take its hooks out: it is refused."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with warnings.catch_warnings():  # of its other parts
            warnings.simplefilter("ignore", DeprecationWarning)
            from torch.distributed.optim import apply_optimizer_in_backward as known

        known.param_to_optim_hook_handle_map[p] = [Hooked()] if found is None else found


def refuse_needs(rule: Rule, p: Any) -> None:
    """Raise BadSetting for a rule that needs more than the gradient of one parameter, such as `p`."""
    held = [part for part in parts(rule) if isinstance(part, Rule)]
    for kind, what in (("second_order", "second gradients"), ("per_example", "gradients of single examples")):
        if any(getattr(part, kind) for part in held):
            raise BadSetting(f"{rule!r} takes {what}, which are not there in backward; {ELSE}")
    x = tensors.stand_in(tuple(p.shape), p.dtype)
    program = program_of(rule, started(rule, x, KeyPath("parameters")), Shape.of(x))
    if any(stage.totals for stage in stages(program)):
        clips = any(isinstance(part, ClipGlobalNorm) for part in held)
        raise BadSetting(
            f"{rule!r} sums over all parameters, and in backward there is one gradient at a time; "
            f"{'write ClipNorm, which clips each array by its own norm, or ' if clips else ''}{ELSE}"
        )
    if any(e.op == "loss" for e in program.given):
        raise BadSetting(f"{rule!r} asks for the loss, which is not there in backward; {ELSE}")


ELSE = "write TorchOptimizer, which steps behind backward"
