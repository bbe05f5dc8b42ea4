"""NumPy in CuPy's dress: a module that refuses what CuPy refuses, for machines without a GPU.

It keeps arrays on the host, in memory of NumPy's. Like CuPy it never turns an array into one of NumPy's
unless asked by `get` or `asnumpy`, takes no array of NumPy's beside its own, gives arrays of 0 axes where
NumPy gives numbers, makes arrays on the current device, and knows no read-only arrays. Stricter than CuPy, it
takes no array of another device than the current one. What `fuse` gives to a function has the methods that
CuPy's has, and no more. That the real one compiles and runs can only be seen on a GPU.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import numpy as np

from optimisers.arrays import registry
from optimisers.ops.dispatch import OPERATIONS

SCALARS = (bool, int, float, complex, np.generic)

current: list[int] = [0]
"""The devices that were entered, the current one last."""

fusing: list[bool] = []
"""Not empty while a function is followed."""

followed: list[tuple[str, tuple[Any, ...]]] = []
"""(name of the kernel, types of the arguments) of every function that was followed."""

launched: list[str] = []
"""The name of every fused kernel that was run."""


# -- memory --------------------------------------------------------------------------------------------------


class Device:
    def __init__(self, number: int | None = None) -> None:
        self.id = current[-1] if number is None else number

    def __enter__(self) -> Self:
        current.append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        current.pop()


class Stream:
    """The stream of a device, on which nothing is captured."""

    ptr = 0

    def __init__(self, device_id: int = -1) -> None:
        self.device_id = device_id

    def is_capturing(self) -> bool:
        return False


class UnownedMemory:
    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        if device_id < 0:
            raise RuntimeError("UnownedMemory requires explicit device ID for a null pointer.")
        self.ptr, self.size, self.owner, self.device_id = ptr, size, owner, device_id


class MemoryPointer:
    def __init__(self, mem: UnownedMemory, offset: int) -> None:
        self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

    def __add__(self, offset: int) -> "MemoryPointer":
        return MemoryPointer(self.mem, self.ptr + offset - self.mem.ptr)


def at_address(pointer: MemoryPointer, shape: Any, dtype: Any, strides: Any) -> Any:
    """The array of NumPy's that lies there."""
    dtype = np.dtype(dtype)
    if not pointer.ptr or 0 in shape:
        assert 0 in shape, "a null pointer was to be read"
        return np.zeros(shape, dtype)
    about = {"data": (pointer.ptr, False), "shape": tuple(shape), "strides": strides, "version": 3}
    bytes_there = {**about, "typestr": f"|V{dtype.itemsize}"}
    return np.asarray(SimpleNamespace(__array_interface__=bytes_there, owner=pointer.mem)).view(dtype)


# -- arrays --------------------------------------------------------------------------------------------------


class Flags:
    """No array is read-only, and nobody can make one so."""

    __slots__ = ("c_contiguous", "f_contiguous", "owndata")

    def __init__(self, a: Any) -> None:
        self.c_contiguous = a.flags.c_contiguous
        self.f_contiguous = a.flags.f_contiguous
        self.owndata = a.base is None


def wrapped(a: Any, device: int | None = None) -> "ndarray":
    new = object.__new__(ndarray)
    new._a, new._device = np.asarray(a), current[-1] if device is None else device
    return new


def unwrapped(x: Any) -> Any:
    """What NumPy is given for an argument; raises TypeError for what CuPy does not take."""
    if isinstance(x, ndarray):
        if x._device != current[-1]:
            raise ValueError(f"array on device {x._device} while the current one is {current[-1]}")
        return x._a
    if isinstance(x, SCALARS):
        return x
    raise TypeError(f"Unsupported type {type(x)}")


class ndarray:  # noqa: N801 its name in CuPy
    """An array; its elements are those of `_a`."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None) -> None:
        if memptr is None:
            self._a, self._device = np.empty(shape, dtype), current[-1]
        else:
            self._a = at_address(memptr, shape, dtype, strides)
            self._device = memptr.device_id
        self._pointer = memptr

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        assert method == "__call__"
        assert not options
        return wrapped(ufunc(*map(unwrapped, inputs)))

    @property
    def data(self) -> MemoryPointer:
        pointer = getattr(self, "_pointer", None)
        if pointer is not None:
            return pointer
        ptr = self._a.__array_interface__["data"][0]
        return MemoryPointer(UnownedMemory(ptr, self._a.nbytes, self._a, self._device), 0)

    device = property(lambda self: Device(self._device))
    dtype = property(lambda self: self._a.dtype)
    shape = property(lambda self: self._a.shape)
    strides = property(lambda self: self._a.strides)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    itemsize = property(lambda self: self._a.itemsize)
    nbytes = property(lambda self: self._a.nbytes)
    flags = property(lambda self: Flags(self._a))
    T = property(lambda self: self.transpose())
    real = property(lambda self: self._same(self._a.real))
    imag = property(lambda self: self._same(self._a.imag))

    def _same(self, a: Any) -> "ndarray":
        return wrapped(a, self._device)

    def get(self) -> Any:
        return self._a.copy()

    def item(self) -> Any:
        return self._a.item()

    def transpose(self, *axes: Any) -> "ndarray":
        return self._same(self._a.transpose(*axes))

    def reshape(self, *shape: Any) -> "ndarray":
        return self._same(self._a.reshape(*shape))

    def ravel(self) -> "ndarray":
        return wrapped(unwrapped(self).ravel())

    def view(self, dtype: Any) -> "ndarray":
        return self._same(self._a.view(dtype))

    def astype(self, dtype: Any, *, copy: bool = True) -> "ndarray":
        a = unwrapped(self)
        return self if not copy and a.dtype == dtype else wrapped(a.astype(dtype))

    def copy(self) -> "ndarray":
        return wrapped(self._a.copy())

    def any(self) -> "ndarray":
        return wrapped(unwrapped(self).any())

    def all(self) -> "ndarray":
        return wrapped(unwrapped(self).all())

    def __getitem__(self, index: Any) -> "ndarray":
        return self._same(self._a[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._a[index] = unwrapped(value)

    def __iter__(self) -> Iterator["ndarray"]:
        return (self[i] for i in range(len(self._a)))

    def __len__(self) -> int:
        return len(self._a)

    def __bool__(self) -> bool:
        return bool(self._a)

    def __float__(self) -> float:
        return float(self._a)

    def __repr__(self) -> str:
        return repr(self._a)

    def __deepcopy__(self, memo: Any) -> "ndarray":
        with self.device:
            return self.copy()

    def __reduce__(self) -> Any:
        return array, (self.get(),)


OPERATORS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "divide",
    "pow": "power",
    "and": "bitwise_and",
    "xor": "bitwise_xor",
    "rshift": "right_shift",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "eq": "equal",
    "ne": "not_equal",
}
"""Operators -> the functions that say them."""


def give_operators(kind: type) -> None:
    """Give a class the operators, said with the functions of this module."""
    for name, operation in OPERATORS.items():
        function = FUNCTIONS[operation]
        setattr(kind, f"__{name}__", function)
        setattr(kind, f"__r{name}__", lambda a, b, f=function: f(b, a))
    kind.__neg__ = FUNCTIONS["negative"]
    kind.__matmul__ = matmul


# -- what a function is given while it is fused --------------------------------------------------------------


class Var:
    """Stands for an array or a number: no shape, no parts, only types and operators."""

    __slots__ = ("_store", "_value", "dtype", "ndim")
    __hash__ = None
    __array_ufunc__ = None

    def __init__(self, value: Any, ndim: int, store: Any = None) -> None:
        self._value, self.ndim, self._store = value, ndim, store
        self.dtype = value.dtype

    def astype(self, dtype: Any) -> "Var":
        if self.dtype.kind == "c" and np.dtype(dtype).kind != "c":
            raise TypeError("no cast from complex to real numbers")
        return Var(self._value.astype(dtype), self.ndim)

    def copy(self) -> "Var":
        return Var(self._value.copy(), self.ndim)

    def __setitem__(self, place: Any, value: Any) -> None:
        if place is not Ellipsis:
            raise ValueError("The fusion supports `[...]` or `[:]`.")
        if self._store is None:
            raise TypeError("return arrays must be of ArrayType")
        value = fused_operand(value)._value
        if not np.can_cast(value.dtype, self.dtype, "same_kind"):
            raise TypeError(f"Cannot cast {value.dtype} to {self.dtype}")
        self._store[...] = value  # at once: who reads it later reads the new one
        self._value = self._store

    def __bool__(self) -> bool:
        raise TypeError("Can't cast to bool")


def fused_operand(x: Any) -> Var:
    if isinstance(x, Var):
        return x
    if isinstance(x, bool | int | float | complex) and not isinstance(x, np.generic):
        raise TypeError("a number of Python's takes the least type that holds it; give its type")
    if isinstance(x, np.generic):
        return Var(np.asarray(x), -1)
    raise TypeError(f"Unsupported type {type(x)}")


class Fusion:
    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        self.seen: set[Any] = set()

    def __call__(self, *args: Any) -> Any:
        for a in args:
            if not isinstance(a, ndarray | np.generic):
                raise TypeError(f"Invalid argument type for {self.name!r}: {type(a)}")
        if not any(isinstance(a, ndarray) for a in args):
            return self.function(*args)
        values = [unwrapped(a) for a in args]
        key = tuple((a.dtype.char, a.ndim) if isinstance(a, ndarray) else a.dtype.char for a in args)
        if any(v.dtype.name == "bfloat16" for v in values):
            raise TypeError("bfloat16 is not fused")
        if key not in self.seen:
            followed.append((self.name, key))
            self.seen.add(key)
        launched.append(self.name)
        fusing.append(True)
        try:
            result = self.function(
                *(
                    Var(v, v.ndim, v) if isinstance(a, ndarray) else Var(np.asarray(v), -1)
                    for a, v in zip(args, values, strict=True)
                )
            )
        finally:
            fusing.pop()
        if result is None:
            return None
        shape = np.broadcast_shapes(*(a.shape for a in args if isinstance(a, ndarray)))
        return tuple(wrapped(np.broadcast_to(r._value, shape).copy()) for r in result)


def fuse(*, kernel_name: str) -> Callable[[Callable[..., Any]], Fusion]:
    return lambda function: Fusion(function, kernel_name)


# -- functions -----------------------------------------------------------------------------------------------


def elementwise(name: str) -> Callable[..., Any]:
    function = getattr(np, name)

    def run(*args: Any) -> Any:
        if fusing:
            given = [fused_operand(a) for a in args]
            return Var(np.asarray(function(*(v._value for v in given))), max(v.ndim for v in given))
        return wrapped(function(*map(unwrapped, args)))

    return run


def where(condition: Any, x: Any, y: Any) -> Any:
    if condition.dtype != bool and fusing:
        raise TypeError("Invalid type cast in 'cupy_where'")
    condition.astype("?", copy=False) if not fusing else None
    return elementwise("where")(condition, x, y)


def of_array(name: str) -> Callable[..., Any]:
    """A function that takes an array of CuPy's first, and options that are numbers."""
    function = getattr(np, name)

    def run(a: Any, *args: Any, **options: Any) -> Any:
        assert not fusing
        if not isinstance(a, ndarray):
            raise TypeError(f"Unsupported type {type(a)}")
        return wrapped(function(unwrapped(a), *args, **options))

    return run


def array(a: Any, dtype: Any = None) -> ndarray:
    return wrapped(np.array(a._a if isinstance(a, ndarray) else a, dtype))


def asarray(a: Any, dtype: Any = None) -> ndarray:
    if isinstance(a, ndarray) and (dtype is None or a.dtype == dtype):
        return a
    return array(a, dtype)


def copyto(dst: ndarray, src: Any, casting: str = "same_kind") -> None:
    if isinstance(src, np.ndarray) and src.size != 1:
        raise ValueError("non-scalar numpy.ndarray cannot be used for copyto")
    np.copyto(unwrapped(dst), src._a if isinstance(src, ndarray) else src, casting=casting)


def concatenate(arrays: Any, axis: int = 0) -> ndarray:
    return wrapped(np.concatenate([unwrapped(a) for a in arrays], axis))


def take_along_axis(a: ndarray, indices: ndarray, axis: int) -> ndarray:
    return wrapped(np.take_along_axis(unwrapped(a), unwrapped(indices), axis))


def full(shape: Any, value: Any, dtype: Any = None) -> ndarray:
    return wrapped(np.full(shape, value, dtype))


def made(name: str) -> Callable[..., ndarray]:
    function = getattr(np, name)
    return lambda shape, dtype=float: wrapped(function(shape, dtype))


def matmul(a: ndarray, b: ndarray) -> ndarray:
    return wrapped(np.matmul(unwrapped(a), unwrapped(b)))


def part(name: str) -> Callable[..., Any]:
    def run(x: Any) -> Any:
        if fusing:
            x = fused_operand(x)
            return Var(getattr(x._value, name), x.ndim)
        return getattr(x if isinstance(x, ndarray) else array(x), name)

    return run


def factors(name: str) -> Callable[..., Any]:
    """A function of numpy.linalg: an array, or a tuple of several."""
    function = getattr(np.linalg, name)

    def run(a: ndarray, **options: Any) -> Any:
        found = function(unwrapped(a), **options)
        return tuple(map(wrapped, found)) if isinstance(found, tuple) else wrapped(found)

    return run


WHOLE = ("matmul", "reshape", "where", "real", "imag", "sum", "max", "min", "transpose", "call")
WHOLE += ("triu", "diagonal", "argsort", "take", "zeros", "eye")
"""Words that are no function of single elements alone."""

BITWISE = ("bitwise_and", "bitwise_xor", "right_shift")

ELEMENTWISE = sorted({n for n in OPERATIONS if n not in WHOLE and hasattr(np, n)} | set(BITWISE))

FUNCTIONS: dict[str, Any] = {
    **{name: elementwise(name) for name in ELEMENTWISE},
    **{
        name: of_array(name)
        for name in ("sum", "max", "min", "swapaxes", "reshape", "empty_like", "broadcast_to")
    },
    **{name: of_array(name) for name in ("triu", "diagonal", "argsort", "clip")},
    **{name: made(name) for name in ("zeros", "ones", "empty")},
    **{name: part(name) for name in ("real", "imag")},
    "iscomplexobj": lambda x: x.dtype.kind == "c",
    "size": lambda x: x.size,
    "asanyarray": asarray,
    "arange": lambda n, dtype: wrapped(np.arange(n, dtype=dtype)),
    "asnumpy": lambda a: a.get(),
    "where": where,
    "array": array,
    "asarray": asarray,
    "copyto": copyto,
    "concatenate": concatenate,
    "stack": lambda arrays: wrapped(np.stack([unwrapped(a) for a in arrays])),
    "take_along_axis": take_along_axis,
    "eye": lambda n, dtype=float: wrapped(np.eye(n, dtype=dtype)),
    "linalg": SimpleNamespace(**{name: factors(name) for name in ("eigh", "qr", "svd", "cholesky")}),
    "full": full,
    "matmul": matmul,
    "fuse": fuse,
    "ndarray": ndarray,
    "cuda": SimpleNamespace(
        Device=Device,
        MemoryPointer=MemoryPointer,
        UnownedMemory=UnownedMemory,
        get_current_stream=Stream,
    ),
}

for kind in (ndarray, Var):
    give_operators(kind)
ndarray.__module__ = "cupy"
ndarray.__qualname__ = ndarray.__name__ = "ndarray"
ndarray.__hash__ = None


def module() -> ModuleType:
    """The module, to be put in CuPy's place."""
    made = ModuleType("cupy", "NumPy in CuPy's dress.")
    vars(made).update(FUNCTIONS)
    return made


def forget() -> None:
    """Empty the lists of what was fused."""
    followed.clear()
    launched.clear()


OURS = ("optimisers.arrays.cupy", "optimisers.engines.cupy")
"""Our modules that hold on to the CuPy that was there when they were imported."""


def _unload() -> None:
    for name in ("cupy", *OURS):
        sys.modules.pop(name, None)
    for name in OURS:
        package, _, short = name.rpartition(".")
        vars(sys.modules[package]).pop(short, None)
    registry.forget()


@contextlib.contextmanager
def in_place() -> Iterator[ModuleType]:
    """The stand-in in CuPy's place, and our modules made anew for it."""
    real = sys.modules.get("cupy")
    _unload()
    sys.modules["cupy"] = made = module()
    try:
        yield made
    finally:
        _unload()
        if real is not None:
            sys.modules["cupy"] = real
