"""What libraries share whose functions have the names and signatures of NumPy's: NumPy itself, and CuPy."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from optimisers.arrays import philox
from optimisers.arrays.factors import cholesky, factorised, places, solved
from optimisers.arrays.norms import norm2
from optimisers.arrays.parts import Memory, Stacks, Strides
from optimisers.arrays.protocol import HostArray, Library, Run, Scalar, Shape

Dtype = np.dtype[Any]
Axis = int | tuple[int, ...] | None


class NumpyLikeMemory(Memory[HostArray, Dtype], Protocol):
    """What is asked of shapes and strides alone."""

    def layout(self, x: HostArray) -> tuple[Shape, Strides]:
        return x.shape, x.strides


class NumpyLikeStacks(Stacks[HostArray, Dtype], Protocol):
    """What both multiply."""

    def product_type(self, dtype: Dtype, wanted: str, device: str) -> Dtype:
        return product_type(dtype, wanted)


class NumpyLike(Library[HostArray, Dtype], Protocol):
    """What is asked of shapes, strides and types alone. CuPy declares no types: its arrays pass for NumPy's
    here.
    """

    def type_name(self, dtype: Dtype) -> str:
        return _name(dtype)

    def dtype(self, name: str) -> Dtype:
        return np.dtype(name)

    def permuted(self, x: HostArray, axes: tuple[int, ...]) -> HostArray:
        return x.transpose(axes)

    def pieces(self, flat: HostArray, runs: list[Run], *, copy: bool) -> list[HostArray]:
        out: list[HostArray] = []
        if copy and any(flat.dtype == dtype for dtype in {run[3] for run in runs}):
            flat = flat.copy()  # at one stroke; the arrays are views of the copy
        own = flat.dtype
        for place, count, shape, dtype in runs:
            part = flat[place]
            if dtype is not own and dtype != own:
                part = np.real(part) if flat.dtype.kind == "c" and np.dtype(dtype).kind != "c" else part
                part = part.astype(dtype)
            if count == 1:
                out.append(part.reshape(shape))
            elif shape:
                out.extend(part.reshape(count, *shape))
            else:
                out.extend(part[i : i + 1].reshape(()) for i in range(count))
        return out


def product_type(dtype: Dtype, wanted: str) -> Dtype:
    """In which type products are taken: bfloat16 NumPy and CuPy do not multiply."""
    return np.dtype(wanted) if wanted in ("float32", "float64") and dtype.kind == "f" else dtype


def _matmul(xp: ModuleType, a: HostArray, b: HostArray, dtype: str | None = None) -> Any:
    if dtype is None:
        return xp.matmul(a, b)
    kind = product_type(a.dtype, dtype)
    return xp.matmul(a.astype(kind, copy=False), b.astype(kind, copy=False)).astype(a.dtype, copy=False)


def _abs2(xp: ModuleType, x: HostArray | Scalar) -> Any:
    if not xp.iscomplexobj(x):
        return x * x
    re, im = xp.real(x), xp.imag(x)
    return re * re + im * im


def _bits(xp: ModuleType, x: HostArray | Scalar) -> Any:
    return xp.asarray(x, np.float32).view(np.int32)


def _join_bits(xp: ModuleType, high: HostArray, low: HostArray) -> Any:
    return (_bits(xp, high) + xp.asarray(low).astype(np.int32)).view(np.float32)


def _high_bits(xp: ModuleType, x: HostArray | Scalar) -> Any:
    rounded = ((_bits(xp, x) + np.int32(0x8000)) & np.int32(-0x10000)).view(np.float32)
    return xp.where(xp.isnan(x), np.float32(np.nan), rounded)


def _low_bits(xp: ModuleType, x: HostArray | Scalar) -> Any:
    low = (_bits(xp, x) - _bits(xp, _high_bits(xp, x))).astype(np.float32)
    return xp.where(xp.isnan(x), np.float32(0), low)


def _to_bfloat16(xp: Any, x: HostArray) -> Any:
    """By the bits: NumPy knows the type only where another package brings it."""
    x = xp.asarray(x)
    x = x if x.dtype.kind == "f" else x.astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    near = ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)
    return xp.where(xp.isnan(x), x, near.astype(x.dtype))


def _there_and_back(dtype: Any, xp: ModuleType, x: HostArray) -> Any:
    x = xp.asarray(x)
    return x.astype(dtype).astype(x.dtype if x.dtype.kind == "f" else np.float64)


def _random_word(xp: Any, like: HostArray, seed: Any, step: Any, first: Any, last: Any, **which: int) -> Any:
    """Random bits for every element of an array, as whole numbers."""
    at = xp.arange(like.size, dtype=np.uint64)
    low, high = (at & np.uint64(philox.MASK)).astype(np.uint32), (at >> np.uint64(32)).astype(np.uint32)
    given = (xp.asarray(v).reshape(1).astype(np.uint32) for v in (seed, step, first, last))
    seed, step, first, last = given
    found = philox.word((low, high), seed, step, (first, last), np.uint32, **which)
    return found.reshape(like.shape)


def _sum(xp: ModuleType, x: HostArray, axis: Axis = None, keepdims: bool = False) -> Any:
    """Whole sums are taken in float64 at least, as the fused kernels take them."""
    if axis is None and not keepdims:
        x = xp.asanyarray(x)
        kind = np.result_type(x.dtype if x.dtype.kind in "fc" else np.float64, np.float64)
        return xp.sum(x, dtype=kind)
    return xp.sum(x, axis=axis, keepdims=keepdims)


def _extreme(xp: ModuleType, name: str, empty: float) -> Callable[..., Any]:
    reduce = getattr(xp, name)

    def reduced(x: HostArray | Scalar, axis: Axis = None, keepdims: bool = False) -> Any:
        if axis is None and not keepdims and xp.size(x) == 0:
            return xp.asanyarray(x).dtype.type(empty)
        return reduce(x, axis=axis, keepdims=keepdims)

    return reduced


def _wide(xp: Any, x: Any) -> Any:
    """What LAPACK takes: no halves, and no whole numbers."""
    x = xp.asarray(x)
    if x.dtype.kind in "fc" and x.dtype.itemsize >= 4:
        return x
    return x.astype(np.result_type(x.dtype, np.float32) if x.dtype.kind in "fV" else np.float64)


def _eigh(xp: Any, a: HostArray) -> Any:
    return tuple(xp.linalg.eigh(a))


def _svd(xp: Any, a: HostArray) -> Any:
    return tuple(xp.linalg.svd(a, full_matrices=False))


def _solve_triangular(
    xp: Any, a: HostArray, b: HostArray, *, upper: bool = True, transposed: bool = False
) -> Any:
    with np.errstate(all="ignore"):
        return solved(xp, _wide(xp, a), _wide(xp, b), upper=upper, transposed=transposed)


def _argsort(xp: Any, x: HostArray, axis: int = -1) -> Any:
    x = _wide(xp, x)
    return xp.argsort(x, axis=axis, kind="stable").astype(x.dtype)


def _take(xp: Any, x: HostArray, index: HostArray, axis: int = -1) -> Any:
    x, index = xp.asarray(x), xp.asarray(index)
    beside, wide, at = places(x, index, axis)
    inside = xp.clip(index, 0, x.shape[at] - 1).astype(np.int64).reshape(beside)
    return xp.take_along_axis(x, xp.broadcast_to(inside, wide), at)


def _matrices(xp: Any, found: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The operations on matrices, with those on elements."""
    error = np.linalg.LinAlgError

    def of(factors: Callable[..., Any], vector: int = -1) -> Callable[..., Any]:
        run = factorised(found, functools.partial(factors, xp), xp.stack, vector, error)
        return lambda a: run(_wide(xp, a))

    whole = cholesky(found, xp.linalg.cholesky, xp.stack, error)
    return {
        "eigh": of(_eigh, 0),
        "qr": of(lambda xp, a: tuple(xp.linalg.qr(a))),
        "svd": of(_svd, 1),
        "cholesky": lambda a: whole(_wide(xp, a)),
        "solve_triangular": functools.partial(_solve_triangular, xp),
        "item": lambda found, index: found[index],
        "triu": lambda a, k=0: xp.triu(a, k),
        "diagonal": lambda a: xp.diagonal(a, axis1=-2, axis2=-1),
        "argsort": functools.partial(_argsort, xp),
        "take": functools.partial(_take, xp),
        "every": lambda condition, new, old: new() if condition else old(),
        "zeros": lambda _, shape, dtype: xp.zeros(shape, dtype),
        "eye": lambda _, n, dtype: xp.eye(n, dtype=dtype),
    }


def operations(xp: Any) -> dict[str, Callable[..., Any]]:
    """The operations, computed by the functions of `xp`."""
    found: dict[str, Callable[..., Any]] = {
        "add": xp.add,
        "subtract": xp.subtract,
        "multiply": xp.multiply,
        "divide": xp.divide,
        "power": xp.power,
        "negative": xp.negative,
        "less": xp.less,
        "less_equal": xp.less_equal,
        "greater": xp.greater,
        "greater_equal": xp.greater_equal,
        "equal": xp.equal,
        "not_equal": xp.not_equal,
        "logical_and": xp.logical_and,
        "logical_or": xp.logical_or,
        "logical_not": xp.logical_not,
        "sqrt": xp.sqrt,
        "exp": xp.exp,
        "expm1": xp.expm1,
        "log": xp.log,
        "log1p": xp.log1p,
        "sin": xp.sin,
        "cos": xp.cos,
        "tanh": xp.tanh,
        "arctan": xp.arctan,
        "floor": xp.floor,
        "ceil": xp.ceil,
        "sign": xp.sign,
        "abs": xp.abs,
        "abs2": functools.partial(_abs2, xp),
        "real": xp.real,
        "imag": xp.imag,
        "conj": xp.conj,
        "isfinite": xp.isfinite,
        "isnan": xp.isnan,
        "maximum": xp.maximum,
        "minimum": xp.minimum,
        "where": xp.where,
        "join_bits": functools.partial(_join_bits, xp),
        "high_bits": functools.partial(_high_bits, xp),
        "low_bits": functools.partial(_low_bits, xp),
        "to_float16": functools.partial(_there_and_back, np.float16, xp),
        "to_bfloat16": functools.partial(_to_bfloat16, xp),
        "to_float32": functools.partial(_there_and_back, np.float32, xp),
        "random_word": functools.partial(_random_word, xp),
        "sum": functools.partial(_sum, xp),
        "max": _extreme(xp, "max", -np.inf),
        "min": _extreme(xp, "min", np.inf),
        "matmul": functools.partial(_matmul, xp),
        "transpose": lambda x: xp.swapaxes(x, -1, -2),
        "reshape": xp.reshape,
        "call": lambda function, *args: function(*args),
    }
    found |= _matrices(xp, found)
    return found | {"norm2": norm2(found, _least)}


def _least(x: HostArray) -> float:
    """The least normal number of the type of the arithmetic."""
    return float(np.finfo(np.result_type(x.dtype, np.float32)).tiny)


@functools.cache
def _name(dtype: Dtype) -> str:
    """The name of an element type, which NumPy puts together anew each time."""
    return dtype.name if dtype.isnative else f"byte-swapped {dtype.name}"
