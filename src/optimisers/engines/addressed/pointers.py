"""Where do a thousand arrays lie, laid out as expected? Asked anew at every step, in microseconds.

Addresses are never kept unseen: arrays are replaced, resized and freed behind one's back. Asking one array in
Python costs microseconds, as much as stepping it. There are two roads: a compiled function reads the objects
of the arrays (`objects`), with the versions it was tested with; the public road asks a whole list at once,
with one function of the library for each question, and a step of small arrays takes about half as long again.
Where that finds something odd, Python asks each array.
"""

import ctypes
import dataclasses
import functools
import importlib
import operator
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from optimisers.arrays import registry
from optimisers.engines import cache
from optimisers.engines.addressed import objects
from optimisers.state.buffers import Indices


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


@dataclasses.dataclass(frozen=True)
class Known:
    """Tensors that fitted when they were looked at, and what would show that they are others now."""

    ids: list[int]
    arrays: Sequence[Callable[[], Any]] = ()
    """What follows is empty until the same list has come twice."""
    at: list[int] | None = None
    table: Any = None
    fits: Any = None


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

        self.flats = np.array(contiguous, bool)
        places = list(zip(shapes, strides, strict=True))
        reach = [1 + sum((n - 1) * t for n, t in zip(*place, strict=True)) for place in places]
        self.reach = np.array([0 if 0 in s else r for s, r in zip(shapes, reach, strict=True)], np.int64)
        """How many elements of memory each array spans."""
        self.known: dict[str, Known] = {}
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
            [library.address(a) if fit else 0 for a, fit in zip(arrays, fits, strict=True)], np.int64
        )
        return at, np.flatnonzero(~np.array(fits, bool))

    def fits(self, i: int, a: Any, dtype: Any, *, write: bool) -> bool:
        library = registry.named(self.library)
        if registry.library_of(type(a)) is not library or not library.is_dense_memory(
            a, self.device, write=write
        ):
            return False
        if self.library == "torch" and (a.is_inference() or lacks_memory(a)):
            return False
        shape, strides = library.layout(a)
        wanted = tuple(s * dtype.itemsize for s in self.strides[i])
        return (
            a.dtype == dtype
            and shape == self.shapes[i]
            and (strides == wanted or (self.flat[i] and library.is_contiguous(a)))
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
        if lasting:
            _roads[library, device] = found
    return found


def choose(library: str, device: str, taken: Road) -> None:
    """Take this road from now on: for tests and timings of another than the one that was found."""
    _roads[library, device] = taken


def _chosen(library: str, device: str) -> tuple[Road, bool]:
    """(the road, whether it is the same at the next step)."""
    bulk = BULK[library]
    if (reason := objects.refusal(library)) is not None:
        return Road(None, bulk, reason), True
    form, arrays, dtype = SAMPLES[library](device)
    if is_fake(arrays[0]):
        return Road(None, bulk, "a mode of PyTorch makes other tensors now"), False
    look = LOOKS[library](device)
    if look is None or not agrees(look, form, arrays, dtype):
        return Road(None, bulk, "objects of another layout were found"), True
    return Road(look, bulk, ""), True


# -- NumPy ---------------------------------------------------------------------------------------------------

READ = '''"""Reads the addresses of arrays from their `__array_struct__`, and counts those not as expected."""
from numba import njit

from optimisers.engines.cpu.intrinsics import peek32, peek64
from optimisers.engines.xla.c_api import call


@njit("i8(i8, i8[::1], i8, i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], b1[::1])",
      error_model="numpy", cache=True)
def look(get_pointer, capsules, flags, contiguous, begin, shape, stride, at, fits):
    for k in range(at.size):
        found = call(get_pointer, capsules[k], 0)
        ndim, itemsize, has = peek32(found + 4), peek32(found + 12), peek32(found + 16)
        fit = ndim == begin[k + 1] - begin[k] and (has & flags) == flags
        if fit:
            laid = contiguous[k] == 1 and (has & 1) == 1
            for d in range(ndim):
                fit = fit and peek64(peek64(found + 24) + 8 * d) == shape[begin[k] + d]
                step = itemsize * stride[begin[k] + d]
                fit = fit and (laid or peek64(peek64(found + 32) + 8 * d) == step)
        at[k] = peek64(found + 40)
        fits[k] = fits[k] and fit
    return 0
'''
"""NumPy's array interface in C: a `PyArrayInterface` has axes, element size, flags, shape, strides, data."""

NOTSWAPPED = 0x200


@functools.cache
def _reader() -> tuple[Any, int]:
    """(the compiled reader, the address of the function that opens a capsule)."""
    pointer = ctypes.cast(ctypes.pythonapi.PyCapsule_GetPointer, ctypes.c_void_p).value
    return cache.lasting(READ).look, pointer or 0


def numpy_addresses(
    form: Form, arrays: Sequence[Any], dtype: Any, at: Indices, *, write: bool, name: str
) -> Any:
    """Which arrays fit; their addresses in `at`."""
    del name  # an array may be resized where it is: it is looked at every time
    kinds = list(map(type, arrays))
    fits = np.ones(len(arrays), bool)
    if kinds.count(np.ndarray) < len(kinds):
        fits &= [kind is np.ndarray for kind in kinds]
        if not all(issubclass(kind, np.ndarray) for kind in kinds):
            return None
    dtypes = list(map(attrgetter("dtype"), arrays))
    if dtypes.count(dtype) < len(dtypes):
        fits &= [found == dtype for found in dtypes]
    capsules = list(map(attrgetter("__array_struct__"), arrays))
    compiled, pointer = _reader()
    flags = objects.ALIGNED | NOTSWAPPED | (objects.WRITEABLE if write else 0)
    ids = np.fromiter(map(id, capsules), np.int64, len(capsules))
    compiled(pointer, ids, flags, form.contiguous, form.begin, form.shape, form.stride, at, fits)
    return fits


def numpy_samples(device: str) -> tuple[Form, list[Any], Any]:
    """Arrays that fit and some that do not."""
    arrays = [
        np.zeros((2, 3), np.float32),
        np.zeros((3, 2), np.float32).T,
        np.zeros((2, 3)),
        np.zeros((4, 3), np.float32)[::2],
        np.zeros((3, 3), np.float32),
        np.zeros((), np.float32),
        np.zeros((1, 3), np.float32),
    ]
    arrays[4].flags.writeable = False
    shapes = [(2, 3)] * 5 + [(), (1, 3)]
    strides = [(3, 1)] * 5 + [(), (3, 1)]
    return Form("numpy", device, shapes, strides, [True] * 7), arrays, np.dtype(np.float32)


# -- PyTorch -------------------------------------------------------------------------------------------------


def torch_addresses(
    form: Form, arrays: Sequence[Any], dtype: Any, at: Indices, *, write: bool, name: str
) -> Any:
    """Which tensors fit; their addresses in `at`."""
    del write  # no plain tensor is read-only
    torch: Any = importlib.import_module("torch")
    of, count = torch.Tensor, len(arrays)
    known = form.known.get(name)
    places = list(map(of.data_ptr, arrays))
    if (
        known is not None
        and known.at == places
        and all(map(operator.is_, map(operator.call, known.arrays), arrays))
        and list(map(of.size, arrays)) == form.shapes
        and False not in list(map(of.is_contiguous, arrays))
        and list(map(attrgetter("dtype"), arrays)).count(dtype) == count
    ):
        at[:] = known.table
        return known.fits
    at[:] = places
    ids = list(map(id, arrays))
    again = known is not None and known.ids == ids
    kinds = list(map(type, arrays))
    if kinds.count(of) + kinds.count(torch.nn.Parameter) < count or _is_watched(torch, arrays):
        return None
    fits = _layouts_fit(torch, form, arrays)
    fits &= _are(list(map(attrgetter("dtype"), arrays)), dtype)
    fits &= _are(list(map(attrgetter("device"), arrays)), torch.device(form.device))
    fits &= _are(list(map(of.is_neg, arrays)), wanted=False)
    fits &= _are(list(map(of.is_inference, arrays)), wanted=False)
    if dtype.is_complex:
        fits &= _are(list(map(of.is_conj, arrays)), wanted=False)
    first = np.fromiter(map(of.storage_offset, arrays), np.int64, count)
    bytes_ = np.fromiter(map(torch.UntypedStorage.nbytes, map(of.untyped_storage, arrays)), np.int64, count)
    fits &= at % dtype.itemsize == 0
    fits &= ((first + form.reach) * dtype.itemsize <= bytes_) | (form.reach == 0)
    whole = again and bool(fits.all()) and bool(form.flats.all())
    if whole:
        form.known[name] = Known(ids, list(map(weakref.ref, arrays)), places, at.copy(), fits)
    else:
        form.known[name] = Known(ids)
    return fits


def _are(found: list[Any], wanted: Any) -> Any:
    """Which of the values are the wanted one; True for all."""
    return True if found.count(wanted) == len(found) else np.array([value == wanted for value in found], bool)


def _is_watched(torch: Any, arrays: Sequence[Any]) -> bool:
    """Whether a tensor stands for another, inside a transform or a compiler."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(map(wrapped, arrays)) or any(map(torch._is_functional_tensor, arrays))


def _layouts_fit(torch: Any, form: Form, arrays: Sequence[Any]) -> Any:
    """Which tensors have the shape and the strides of the form."""
    shapes = list(map(attrgetter("shape"), arrays))
    fits = np.ones(len(arrays), bool)
    if shapes != form.shapes:
        fits &= [found == wanted for found, wanted in zip(shapes, form.shapes, strict=True)]
    laid = form.flats & np.array(list(map(torch.Tensor.is_contiguous, arrays)), bool)
    for k in np.flatnonzero(fits & ~laid).tolist():
        axes = zip(form.shapes[k], arrays[k].stride(), form.strides[k], strict=True)
        fits[k] = all(n == 1 or found == wanted for n, found, wanted in axes)
    return fits


def torch_samples(device: str) -> tuple[Form, list[Any], Any]:
    """Tensors that fit and some that do not."""
    import torch

    zeros = functools.partial(torch.zeros, device=device)
    deep = zeros(1, 2, 1, 3, 1, 2, 2)
    arrays = [
        zeros(2, 3),
        torch.nn.Parameter(zeros(2, 3)),
        zeros(3, 2).T,
        zeros(2, 3, dtype=torch.float64),
        zeros(4, 3)[::2],
        zeros(4, 3)[1:3],
        zeros(3, 3),
        zeros(()),
        zeros(5)[3],
        deep,
        zeros(2, 3, dtype=torch.complex64).imag,
        zeros(2, 3).to_sparse(),
        *(torch.zeros(2, 3, device=other) for other in ("cpu", "meta") if other != device),
    ]
    shapes = [(2, 3)] * 7 + [(), (), tuple(deep.shape)] + [(2, 3)] * (len(arrays) - 10)
    strides = [(3, 1)] * 7 + [(), (), deep.stride()] + [(3, 1)] * (len(arrays) - 10)
    return Form("torch", device, shapes, strides, [True] * len(arrays)), arrays, torch.float32


def lacks_memory(x: Any) -> bool:
    """Whether a plain tensor reaches beyond its storage, which was freed or shrunk behind it."""
    if getattr(x, "untyped_storage", None) is None or registry.library(x).is_loose(x) or not x.numel():
        return False
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return (x.storage_offset() + last + 1) * x.itemsize > x.untyped_storage().nbytes()


def is_fake(x: Any) -> bool:
    """Whether a mode of PyTorch gave something without memory where a plain tensor was asked for."""
    return hasattr(x, "untyped_storage") and registry.library(x).is_loose(x)


BULK: dict[str, Callable[..., Any]] = {"numpy": numpy_addresses, "torch": torch_addresses}
SAMPLES: dict[str, Callable[[str], tuple[Form, list[Any], Any]]] = {
    "numpy": numpy_samples,
    "torch": torch_samples,
}
