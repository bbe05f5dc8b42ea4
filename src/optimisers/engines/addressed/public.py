"""Addresses of a list of arrays by what their libraries promise to everybody.

NumPy hands out `__array_struct__`, PyTorch from 2.10 on DLPack's table of C functions: a compiled loop asks
them for the whole list. An older PyTorch is asked list by list, with one of its functions for each question,
which takes about as long as the step of small tensors itself.
"""

import ctypes
import dataclasses
import functools
import importlib
import operator
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol

import numpy as np

from optimisers.engines import cache
from optimisers.engines.addressed import objects
from optimisers.state.buffers import Indices


@dataclasses.dataclass(frozen=True)
class Known:
    """Tensors that fitted when they were looked at, and what would show that they are others now."""

    arrays: Sequence[Callable[[], Any]]
    """Empty until a list has come to the same place twice: most lists of gradients never come again."""
    at: Indices

    def holds(self, arrays: Sequence[Any]) -> bool:
        """Whether these are the very tensors."""
        return len(self.arrays) > 0 and all(map(operator.is_, map(operator.call, self.arrays), arrays))


class Tables(objects.Tables, Protocol):
    """Shapes and strides of a list of arrays, and what is known of those that came last."""

    device: str
    shapes: list[tuple[int, ...]]
    strides: list[tuple[int, ...]]
    flat: list[bool]
    reach: Indices
    single: Indices
    known: dict[str, Known]


# -- NumPy ---------------------------------------------------------------------------------------------------

READ = '''"""Reads the addresses of arrays from their `__array_struct__`, and counts those not as expected."""
from numba import njit

from optimisers.engines.cpu.intrinsics import peek32, peek64
from optimisers.engines.xla.c_api import call


@njit("i8(i8, i8, i8, i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], b1[::1])",
      error_model="numpy", cache=True)
def look(get_pointer, capsules, flags, contiguous, begin, shape, stride, at, fits):
    for k in range(at.size):
        found = call(get_pointer, peek64(capsules + 8 * k), 0)
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


def _function(name: str) -> int:
    """The address of a function of Python's C interface."""
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0


@functools.cache
def _reader() -> tuple[Any, int]:
    """(the compiled reader, the address of the function that opens a capsule)."""
    return cache.lasting(READ).look, _function("PyCapsule_GetPointer")


def numpy_addresses(
    form: Tables, arrays: Sequence[Any], dtype: Any, at: Indices, *, write: bool, name: str
) -> Any:
    """Which arrays fit; their addresses in `at`."""
    del name  # an array may be resized where it is: it is looked at every time
    kinds = list(map(type, arrays))
    fits = np.ones(len(arrays), bool)
    if kinds.count(np.ndarray) < len(kinds):
        fits &= [kind is np.ndarray for kind in kinds]
        if not all(issubclass(kind, np.ndarray) for kind in kinds):
            return None
    fits &= _are(list(map(attrgetter("dtype"), arrays)), dtype)
    capsules = list(map(attrgetter("__array_struct__"), arrays))
    compiled, pointer = _reader()
    flags = objects.ALIGNED | NOTSWAPPED | (objects.WRITEABLE if write else 0)
    tables = form.contiguous, form.begin, form.shape, form.stride
    held = np.fromiter(capsules, object, len(capsules))  # an array of references: where the objects are
    compiled(pointer, held.ctypes.data, flags, *tables, at, fits)
    return fits


def _are(found: list[Any], wanted: Any) -> Any:
    """Which of the values are the wanted one; True for all."""
    return True if found.count(wanted) == len(found) else np.array([value == wanted for value in found], bool)


def numpy_samples(_device: str) -> tuple[list[Any], list[tuple[int, ...]], list[tuple[int, ...]], Any]:
    """(arrays that fit and some that do not, shapes and strides wanted, element type)."""
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
    return arrays, shapes, strides, np.dtype(np.float32)


# -- PyTorch -------------------------------------------------------------------------------------------------

FUNCTIONS = """
DESCRIBE, FORGET, OUT = 0, 1, 2  # describe a tensor, forget an error; where a description goes
CALL, DROP, AS_NUMBER, FALSE = 3, 4, 5, 6  # of Python: call, drop a reference, read an int; False
OFFSET, STORAGE, BYTES = 7, 8, 9  # methods of a tensor, and of its storage
"""
"""What stands where in the table of functions."""

EXCHANGE = (
    '''"""Asks tensors where they lie by DLPack's exchange in C, and marks those not as expected."""
from numba import njit

from optimisers.engines.cpu.intrinsics import peek32, peek64
from optimisers.engines.xla.c_api import call
'''
    + FUNCTIONS
    + '''


@njit("b1(i8[::1], i8, i8)", error_model="numpy", cache=True)
def denies(functions, method, tensor):
    """Whether a method of a tensor answers False."""
    answer = call(functions[CALL], method, tensor)
    if answer == 0:
        call(functions[FORGET], 0, 0)
        return False
    call(functions[DROP], answer, 0)
    return answer == functions[FALSE]


@njit("i8(i8[::1], i8, i8)", error_model="numpy", cache=True)
def number(functions, method, x):
    """The whole number that a method answers; -1 where it raises."""
    answer = call(functions[CALL], method, x)
    if answer == 0:
        call(functions[FORGET], 0, 0)
        return -1
    found = call(functions[AS_NUMBER], answer, 0)
    call(functions[DROP], answer, 0)
    return found


@njit("b1(i8[::1], i8, i8, i8)", error_model="numpy", cache=True)
def reaches(functions, tensor, reach, itemsize):
    """Whether so many elements of a tensor lie in its storage."""
    offset = number(functions, functions[OFFSET], tensor)
    storage = call(functions[CALL], functions[STORAGE], tensor)
    if storage == 0:
        call(functions[FORGET], 0, 0)
        return False
    size = number(functions, functions[BYTES], storage)
    call(functions[DROP], storage, 0)
    return offset >= 0 and (offset + reach) * itemsize <= size


@njit("void(i8[::1], i8[::1], i8, i8, i8, i8, i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], b1[::1])",
      error_model="numpy", cache=True)
def look(functions, asked, tensors, device, kind, itemsize, begin, shape, stride, reach, at, fits):
    describe, forget, out = functions[DESCRIBE], functions[FORGET], functions[OUT]
    for k in range(at.size):
        at[k] = 0
        fit = (call(describe, peek64(tensors + 8 * k), out) & 0xFFFFFFFF) == 0
        if not fit:
            call(forget, 0, 0)
        ndim = begin[k + 1] - begin[k]
        fit = fit and peek64(out + 8) == device and peek32(out + 16) == ndim and peek32(out + 20) == kind
        if fit:
            sizes, strides, some = peek64(out + 24), peek64(out + 32), True
            for d in range(ndim):
                n = shape[begin[k] + d]
                some = some and n > 0
                fit = fit and peek64(sizes + 8 * d) == n
                fit = fit and (n == 1 or peek64(strides + 8 * d) == stride[begin[k] + d])
            data = peek64(out)
            at[k] = data + peek64(out + 40)
            fit = fit and at[k] % itemsize == 0 and (data != 0 or not some)
        for method in asked:
            fit = fit and denies(functions, method, peek64(tensors + 8 * k))
        if asked.size and reach[k] > 0:
            fit = fit and reaches(functions, peek64(tensors + 8 * k), reach[k], itemsize)
        fits[k] = fit
'''
)
"""A `DLTensor` has data, device (type and number), axes, element type (code, bits, lanes), shape, strides,
and an offset in bytes.
"""

TENSOR_WORDS = 6


@functools.cache
def _exchange() -> Any:
    """PyTorch's table of C functions for exchange, as words; None where it has none that we know."""
    torch: Any = importlib.import_module("torch")
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    opener = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    opened = opener(_function("PyCapsule_GetPointer"))(capsule, b"dlpack_exchange_api")
    table = (ctypes.c_int64 * 7).from_address(opened or 0)
    known = table[0] & 0xFFFFFFFF == 1 and table[5] != 0  # the major version; a tensor described in place
    return table if known else None


@dataclasses.dataclass(frozen=True)
class Asker:
    """The exchange for a device."""

    look: Callable[..., None]
    functions: Indices
    described: Indices
    device: int
    """DLPack's type and number of the device, as one word."""


@functools.cache
def _asker(device: str) -> Asker | None:
    """What asks tensors on a device by the exchange; None where there is none."""
    if (table := _exchange()) is None:
        return None
    torch: Any = importlib.import_module("torch")
    out = np.zeros(TENSOR_WORDS, np.int64)
    sample = torch.empty(1, device=device)
    describe = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(table[5])
    if describe(sample, out.ctypes.data) != 0:
        return None
    of = torch.Tensor
    methods = map(id, (False, of.storage_offset, of.untyped_storage, torch.UntypedStorage.nbytes))
    python = map(_function, ("PyObject_CallOneArg", "Py_DecRef", "PyLong_AsLongLong"))
    found = [table[5], _function("PyErr_Clear"), out.ctypes.data, *python, *methods]
    functions = np.array(found, np.int64)
    return Asker(cache.lasting(EXCHANGE).look, functions, out, int(out[1]))


@functools.cache
def _kind(dtype: Any) -> int:
    """DLPack's code, bits and lanes of an element type of PyTorch."""
    code = 5 if dtype.is_complex else 2 if dtype.is_floating_point else 0
    if str(dtype) == "torch.bfloat16":
        code = 4
    return code | 8 * dtype.itemsize << 8 | 1 << 16


def _exchanged(
    form: Tables, arrays: Sequence[Any], dtype: Any, at: Indices, asker: Asker, asked: Sequence[Any]
) -> Any:
    """Which tensors lie as expected, and answer no to what they are `asked`; if to anything, their storages
    are long enough.
    """
    held = np.fromiter(arrays, object, len(arrays))
    fits, methods = np.empty(len(held), bool), np.array(list(map(id, asked)), np.int64)
    where = asker.functions, methods, held.ctypes.data, asker.device, _kind(dtype), dtype.itemsize
    asker.look(*where, form.begin, form.shape, form.stride, form.reach, at, fits)
    return fits


def _attributes(form: Tables, arrays: Sequence[Any], dtype: Any, at: Indices, asked: Sequence[Any]) -> Any:
    """The same, asked by one function of PyTorch after another; None to ask each tensor."""
    torch: Any = importlib.import_module("torch")
    of = torch.Tensor
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if any(map(wrapped, arrays)) or any(map(torch._is_functional_tensor, arrays)):
        return None  # inside a transform or a compiler, where a tensor stands for another
    at[:] = list(map(of.data_ptr, arrays))
    shapes = list(map(of.size, arrays))
    fits = np.ones(len(arrays), bool)
    if shapes != form.shapes:
        fits &= [found == wanted for found, wanted in zip(shapes, form.shapes, strict=True)]
    laid = np.array(form.flat, bool) & np.array(list(map(of.is_contiguous, arrays)), bool)
    for k in np.flatnonzero(fits & ~laid).tolist():
        axes = zip(form.shapes[k], arrays[k].stride(), form.strides[k], strict=True)
        fits[k] = all(n == 1 or found == wanted for n, found, wanted in axes)
    fits &= _are(list(map(attrgetter("dtype"), arrays)), dtype)
    fits &= _are(list(map(attrgetter("device"), arrays)), torch.device(form.device))
    fits &= (at % dtype.itemsize == 0) & ((at != 0) | (form.reach == 0))
    for method in asked:
        fits &= _are(list(map(method, arrays)), wanted=False)
    if asked:
        first = np.fromiter(map(of.storage_offset, arrays), np.int64, len(arrays))
        storages = map(of.untyped_storage, arrays)
        bytes_ = np.fromiter(map(torch.UntypedStorage.nbytes, storages), np.int64, len(arrays))
        fits &= ((first + form.reach) * dtype.itemsize <= bytes_) | (form.reach == 0)
    return fits


def torch_addresses(
    form: Tables, arrays: Sequence[Any], dtype: Any, at: Indices, *, write: bool, name: str
) -> Any:
    """Which tensors fit; their addresses in `at`. Of objects that lie where they lay no more is asked than
    how they are laid out: real numbers that became a negated view are the imaginary parts of a conjugate, of
    which one alone is dense.
    """
    torch: Any = importlib.import_module("torch")
    of = torch.Tensor
    if not {of, torch.nn.Parameter}.issuperset(map(type, arrays)):
        return None
    asker = _asker(form.device)
    look = _attributes if asker is None else functools.partial(_exchanged, asker=asker)
    asked = [of.is_neg, *([of.is_conj] if dtype.is_complex else ()), *([of.is_inference] if write else ())]
    known = form.known.get(name)  # what was made under inference_mode may be read
    if known is not None and known.holds(arrays):
        fits = look(form, arrays, dtype, at, asked=asked if dtype.is_complex else ())
        if fits is None:
            return None
        if np.array_equal(known.at, at):
            for k in form.single.tolist():
                fits[k] &= not arrays[k].is_neg()
            return fits
    fits = look(form, arrays, dtype, at, asked=asked)
    if fits is not None:
        again = known is not None and fits.all() and np.array_equal(known.at, at)
        form.known[name] = Known(list(map(weakref.ref, arrays)) if again else [], at.copy())
    return fits


def torch_samples(device: str) -> tuple[list[Any], list[tuple[int, ...]], list[tuple[int, ...]], Any]:
    """(tensors that fit and some that do not, shapes and strides wanted, element type)."""
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
    return arrays, shapes, strides, torch.float32


BULK: dict[str, Callable[..., Any]] = {"numpy": numpy_addresses, "torch": torch_addresses}
SAMPLES: dict[str, Callable[[str], tuple[list[Any], list[tuple[int, ...]], list[tuple[int, ...]], Any]]] = {
    "numpy": numpy_samples,
    "torch": torch_samples,
}
