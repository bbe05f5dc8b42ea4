"""How many bytes of tensors are alive at once? Of those that PyTorch makes while a block runs."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class Alive(TorchDispatchMode):
    """`peak` is the most that was alive at once of what was made in the block, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.known: Any = WeakIdKeyDictionary()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(s): s for s in map(storage, tree_iter((args, kwargs))) if s is not None}
        found = function(*args, **(kwargs or {}))
        for x in tree_iter(found):
            held = storage(x)
            if held is not None and id(held) not in before and held not in self.known:
                self.known[held] = True
                self.count(held.nbytes())
                weakref.finalize(held, self.count, -held.nbytes())
        return found

    def count(self, size: int) -> None:
        """Take note of memory that was taken or, below 0, freed."""
        self.now += size
        self.peak = max(self.peak, self.now)


def storage(x: object) -> Any:
    """The memory of a dense tensor; None for anything else."""
    return x.untyped_storage() if isinstance(x, torch.Tensor) and x.layout is torch.strided else None
