"""Where do a thousand arrays lie, laid out as expected? Asked anew at every step, in microseconds.

Addresses are never kept unseen: arrays are replaced, resized and freed behind one's back. Asking one array in
Python costs microseconds, as much as stepping it. There are two roads: a compiled function reads the objects
of the arrays (`objects`), with the versions it was tested with; the public road asks a whole list at once
(`public`), and a step of small arrays takes a quarter to a half as long again. Where that finds
something odd, Python asks each array.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.layout import is_contiguous
from optimisers.engines.addressed import objects, public
from optimisers.state.buffers import Indices

LOG = logging.getLogger("optimisers")


@dataclasses.dataclass(frozen=True)
class Road:
    """How addresses of the arrays of a library are found."""

    look: objects.Look | None
    """The compiled look at objects; None on the public road."""
    bulk: Callable[..., Any]
    reason: str
    """Why it is the public road; empty if it is not."""

    def __str__(self) -> str:
        return f"asked of the arrays ({self.reason})" if self.reason else "read from their objects"


class Form:
    """Shapes and strides of a list of arrays of one library, as tables for the compiled look."""

    def __init__(
        self,
        library: str,
        device: str,
        shapes: list[tuple[int, ...]],
        strides: list[tuple[int, ...]],
        contiguous: list[bool],
    ) -> None:
        self.library, self.device = library, device
        self.shapes, self.strides, self.flat = shapes, strides, contiguous
        self.contiguous = np.array(contiguous, np.int64)
        self.begin = np.concatenate([[0], np.cumsum([len(s) for s in shapes])]).astype(np.int64)
        self.shape = np.array([n for s in shapes for n in s], np.int64)
        self.stride = np.array([n for s in strides for n in s], np.int64)

        places = list(zip(shapes, strides, strict=True))
        reach = [1 + sum((n - 1) * t for n, t in zip(*place, strict=True)) for place in places]
        self.reach = np.array([0 if 0 in s else r for s, r in zip(shapes, reach, strict=True)], np.int64)
        """How many elements of memory each array spans."""
        self.single = np.flatnonzero(self.reach == 1)
        """Those of one element."""
        self.known: dict[str, public.Known] = {}
        """What was looked at last on the public road, by name."""

    def addresses(
        self,
        arrays: Sequence[Any],
        dtype: Any,
        at: Indices,
        misfit: Indices,
        *,
        write: bool,
        name: str = "",
    ) -> tuple[Indices, Indices]:
        """(the address of each array, the numbers of those that are not as expected: their address means
        nothing). `name` tells the lists of a step apart: less is asked of one that came before.
        """
        taken = road(self.library, self.device)
        if taken is not None and type(arrays) in (list, tuple):
            if taken.look is not None:
                count = taken.look(self, objects.first_item(arrays), dtype, at, misfit, write=write)
                return at, misfit[:count]
            try:
                if (fits := taken.bulk(self, arrays, dtype, at, write=write, name=name)) is not None:
                    return at, np.flatnonzero(~fits)
            except (AttributeError, RuntimeError, TypeError, NotImplementedError):
                pass  # something that is no plain array: each is asked
        return self.asked(arrays, dtype, write=write)

    def asked(self, arrays: Sequence[Any], dtype: Any, *, write: bool) -> tuple[Indices, Indices]:
        """The same, asking every array in Python."""
        library = registry.named(self.library)
        fits = [self.fits(i, a, dtype, write=write) for i, a in enumerate(arrays)]
        at = np.array(
            [library.memory.address(a) if fit else 0 for a, fit in zip(arrays, fits, strict=True)], np.int64
        )
        return at, np.flatnonzero(~np.array(fits, bool))

    def fits(self, i: int, a: Any, dtype: Any, *, write: bool) -> bool:
        library = registry.named(self.library)
        if registry.library_of(type(a)) is not library or not library.memory.is_dense(
            a, self.device, write=write
        ):
            return False
        if self.library == "torch" and (a.is_inference() or lacks_memory(a)):
            return False
        shape, strides = library.memory.layout(a)
        wanted = tuple(s * dtype.itemsize for s in self.strides[i])
        return (
            a.dtype == dtype
            and shape == self.shapes[i]
            and (strides == wanted or (self.flat[i] and is_contiguous(shape, strides, dtype.itemsize)))
        )


def agrees(look: objects.Look, form: Form, arrays: list[Any], dtype: Any) -> bool:
    """Whether a compiled look says of some arrays what Python says."""
    for given in (arrays, tuple(arrays)):
        at, misfit = np.empty(len(given), np.int64), np.empty(len(given), np.int64)
        misfits = misfit[: look(form, objects.first_item(given), dtype, at, misfit, write=True)]
        expected_at, expected = form.asked(given, dtype, write=True)
        fitting = np.setdiff1d(np.arange(len(given)), expected)
        if not np.array_equal(misfits, expected) or not np.array_equal(at[fitting], expected_at[fitting]):
            return False
    return True


LOOKS: dict[str, Callable[[str], objects.Look | None]] = {
    "numpy": objects.numpy_look,
    "torch": objects.torch_look,
}
"""What makes the compiled look at the arrays of each library that kernels serve."""


_roads: dict[tuple[str, str], Road] = {}


def road(library: str, device: str) -> Road | None:
    """How addresses of a library's arrays on a device are found; None where each must be asked."""
    found = _roads.get((library, device))
    if found is None and library in LOOKS:
        found, lasting = _chosen(library, device)
        # Whoever upgrades is told once; all else is for the log.
        level = logging.WARNING if found.reason == objects.untested(library) else logging.INFO
        LOG.log(level, "addresses of arrays of %s on %s are %s", library, device, found)
        if lasting:
            _roads[library, device] = found
    return found


def choose(library: str, device: str, taken: Road) -> None:
    """Take this road from now on: for tests and timings of another than the one that was found."""
    _roads[library, device] = taken


def _chosen(library: str, device: str) -> tuple[Road, bool]:
    """(the road, whether it is the same at the next step)."""
    bulk = public.BULK[library]
    if (reason := objects.refusal(library)) is not None:
        return Road(None, bulk, reason), True
    arrays, shapes, strides, dtype = public.SAMPLES[library](device)
    form = Form(library, device, shapes, strides, [True] * len(arrays))
    if is_fake(arrays[0]):
        return Road(None, bulk, "a mode of PyTorch makes other tensors now"), False
    look = LOOKS[library](device)
    if look is None or not agrees(look, form, arrays, dtype):
        return Road(None, bulk, "objects of another layout were found"), True
    return Road(look, bulk, ""), True


def lacks_memory(x: Any) -> bool:
    """Whether a plain tensor reaches beyond its storage, which was freed or shrunk behind it."""
    if getattr(x, "untyped_storage", None) is None or registry.library(x).is_opaque(x) or not x.numel():
        return False
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return (x.storage_offset() + last + 1) * x.itemsize > x.untyped_storage().nbytes()


def is_fake(x: Any) -> bool:
    """Whether a mode of PyTorch gave something without memory where a plain tensor was asked for."""
    return hasattr(x, "untyped_storage") and registry.library(x).is_opaque(x)
