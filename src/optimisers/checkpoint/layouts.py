"""What are parameters of one framework called in another, and how do their axes stand there?

Layers of Flax keep (in, out) and, for convolutions, space before channels, (height, width, in, out); PyTorch
keeps (out, in) and (out, in, height, width).
"""

from optimisers.checkpoint.fit import Renamed

KERNEL = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}
"""Axes -> the order in which a kernel of Flax has them in PyTorch."""

WEIGHT = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
"""Axes -> the order in which a weight of PyTorch has them in Flax."""


def from_flax(name: str, shape: tuple[int, ...]) -> Renamed:
    """What a parameter of a model of Flax, by its name in a checkpoint, is called in a module of PyTorch, and
    how its axes stand there: `opt.load(file, state, module, names=opt.from_flax)`.

    `kernel` of dense layers and convolutions, `scale` of norms and `embedding` are `weight`; `mean` and `var`
    of norms are `running_mean` and `running_var`; all else keeps its name. Kernels of transposed
    convolutions, and of attention with heads in an axis of their own, are laid out otherwise: give a function
    of your own, which asks this one for the rest.
    """
    head, _, last = name.rpartition(".")
    if last == "kernel" and len(shape) in KERNEL:
        return _joined(head, "weight"), KERNEL[len(shape)]
    there = {"scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}
    return _joined(head, there.get(last, last))


def from_torch(name: str, shape: tuple[int, ...]) -> list[Renamed]:
    """The same of a parameter of a module of PyTorch in a model of Flax: the names that it may have there, of
    which the first that is there counts.
    """
    head, _, last = name.rpartition(".")
    if last == "weight" and len(shape) in WEIGHT:
        return [(_joined(head, "kernel"), WEIGHT[len(shape)]), _joined(head, "embedding")]
    there = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
    return [_joined(head, there.get(last, last))]


def _joined(head: str, last: str) -> str:
    return f"{head}.{last}" if head else last
