"""The operations of rules, computed by PyTorch."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from optimisers.arrays import philox
from optimisers.arrays.factors import cholesky, factorised, places
from optimisers.arrays.norms import norm2
from optimisers.arrays.protocol import Scalar
from optimisers.arrays.torch_shards import SHARDS, spread

Tensor = torch.Tensor


def lift(x: Tensor | Scalar, other: Tensor | Scalar | None = None) -> Tensor:
    """A number as a tensor, in the type of the other argument."""
    if isinstance(x, Tensor):
        return x
    if isinstance(other, Tensor):
        return torch.as_tensor(x, dtype=other.dtype, device=other.device)
    return torch.as_tensor(x, dtype=torch.bool if isinstance(x, bool | np.bool_) else torch.float64)


def _one(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: function(lift(x))


def _two(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: function(lift(a, b), lift(b, a))


def _sqrt(x: Tensor | Scalar) -> Any:
    x = lift(x)
    if not x.requires_grad:
        return torch.sqrt(x)
    zero = x == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, x)))


def _abs2(x: Tensor | Scalar) -> Any:
    return x.real * x.real + x.imag * x.imag if isinstance(x, Tensor) and x.is_complex() else x * x


def _sign(x: Tensor | Scalar) -> Any:
    x = lift(x)
    return torch.where(torch.isnan(x), x, torch.sgn(x))


def _real(x: Tensor | Scalar) -> Any:
    return x.real if isinstance(x, complex) or (isinstance(x, Tensor) and x.is_complex()) else x


def _imag(x: Tensor | Scalar) -> Any:
    return (
        x.imag
        if isinstance(x, complex) or (isinstance(x, Tensor) and x.is_complex())
        else torch.zeros_like(lift(x))
    )


def _bits(x: Tensor | Scalar) -> Any:
    return lift(x).to(torch.float32).view(torch.int32)


def _join_bits(high: Tensor, low: Tensor) -> Any:
    return (_bits(high) + lift(low).to(torch.int32)).view(torch.float32)


def _high_bits(x: Tensor) -> Any:
    rounded = ((_bits(x) + 0x8000) & -0x10000).view(torch.float32)
    return torch.where(torch.isnan(x), math.nan, rounded)


def _low_bits(x: Tensor) -> Any:
    return torch.where(torch.isnan(x), 0.0, (_bits(x) - _bits(_high_bits(x))).to(torch.float32))


def _there_and_back(dtype: torch.dtype) -> Callable[[Any], Tensor]:
    def operation(x: Tensor | Scalar) -> Tensor:
        x = lift(x)
        return x.to(dtype).to(x.dtype if x.is_floating_point() else torch.float64)

    return operation


def _random_word(like: Tensor, seed: Any, step: Any, first: Any, last: Any, **which: int) -> Tensor:
    """Random bits for every element of an array, as whole numbers; each part of one that is distributed has
    those of its place in the whole.
    """
    part = SHARDS.part(like)
    if part is not None:
        return part.whole(_random_word_of(part.numbers(), seed, step, first, last, **which))
    at = torch.arange(like.numel(), device=like.device).reshape(like.shape)
    return _random_word_of(at, seed, step, first, last, **which)


def _random_word_of(at: Tensor, seed: Any, step: Any, first: Any, last: Any, **which: int) -> Tensor:
    """The same for elements by their number."""
    seed, step, first, last = (
        torch.as_tensor(v, device=at.device).to(torch.int64) for v in (seed, step, first, last)
    )
    element = at & philox.MASK, at >> 32
    return philox.word(element, seed, step, (first, last), int, **which)


def _reshape(x: Any, shape: Any) -> Any:
    """One that is distributed, and cut where axes are joined, comes together first."""
    try:
        return torch.reshape(x, shape)
    except RuntimeError:
        if spread(x) is None:
            raise
        return torch.reshape(_copied(x), shape)


def _copied(x: Any) -> Any:
    """A distributed tensor, all of which is on every process."""
    from torch.distributed.tensor import Replicate

    return x.redistribute(placements=[Replicate()] * len(x.placements))


def _where(condition: Tensor | bool, a: Tensor | Scalar, b: Tensor | Scalar) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    if isinstance(a, float | complex) and isinstance(b, float | complex):  # torch gives its default type
        dtype = torch.complex128 if isinstance(a, complex) or isinstance(b, complex) else torch.float64
        return torch.where(condition, *(torch.full_like(condition, v, dtype=dtype) for v in (a, b)))
    return torch.where(condition, a, b)


def _sum(x: Tensor | Scalar, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
    """Whole sums are taken in float64 at least, as the fused kernels take them."""
    x = lift(x)
    if axis is None and not keepdims:
        return torch.sum(x, dtype=torch.complex128 if x.is_complex() else torch.float64)
    return torch.sum(x, dim=axis, keepdim=keepdims)


def _extreme(reduce: Callable[..., Any], empty: float) -> Callable[..., Any]:
    def reduced(x: Tensor | Scalar, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
        x = lift(x)
        if axis is None and not keepdims and x.numel() == 0:
            return torch.full((), empty, dtype=x.dtype, device=x.device)
        part = SHARDS.part(x)
        if part is not None and (pieces := part.pieces) and not all(piece.size for piece in pieces.all):
            x = _copied(x)  # a process that has no elements knows no extreme of them
        return reduce(x, dim=() if axis is None else axis, keepdim=keepdims)

    return reduced


def product_type(dtype: torch.dtype, wanted: str, device: str) -> torch.dtype:
    """In which type products are taken of real matrices; see `Library.product_type`."""
    if not dtype.is_floating_point:
        return dtype
    if wanted != "fast":
        return getattr(torch, wanted)
    return torch.bfloat16 if dtype is torch.float32 and _fast_halves(device) else dtype


@functools.cache
def _fast_halves(device: str) -> bool:
    """Whether a device has units that multiply matrices of bfloat16."""
    where = torch.device(device.partition(" ")[0])
    return where.type == "cuda" and torch.cuda.get_device_properties(where).major >= 8


def _matmul(a: Tensor, b: Tensor, dtype: str | None = None) -> Tensor:
    if dtype is None:
        return torch.matmul(a, b)
    kind = product_type(a.dtype, dtype, str(a.device))
    return torch.matmul(a.to(kind), b.to(kind)).to(a.dtype)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "power": operator.pow,
    "negative": operator.neg,
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "equal": operator.eq,
    "not_equal": operator.ne,
    "logical_and": _two(torch.logical_and),
    "logical_or": _two(torch.logical_or),
    "logical_not": _one(torch.logical_not),
    "sqrt": _sqrt,
    "exp": _one(torch.exp),
    "expm1": _one(torch.expm1),
    "log": _one(torch.log),
    "log1p": _one(torch.log1p),
    "sin": _one(torch.sin),
    "cos": _one(torch.cos),
    "tanh": _one(torch.tanh),
    "arctan": _one(torch.arctan),
    "floor": _one(torch.floor),
    "ceil": _one(torch.ceil),
    "sign": _sign,
    "abs": _one(torch.abs),
    "abs2": _abs2,
    "real": _real,
    "imag": _imag,
    "conj": _one(lambda x: torch.conj(x).resolve_conj()),
    "isfinite": _one(torch.isfinite),
    "isnan": _one(torch.isnan),
    "maximum": _two(torch.maximum),
    "minimum": _two(torch.minimum),
    "where": _where,
    "join_bits": _join_bits,
    "high_bits": _high_bits,
    "low_bits": _low_bits,
    "to_float16": _there_and_back(torch.float16),
    "to_bfloat16": _there_and_back(torch.bfloat16),
    "to_float32": _there_and_back(torch.float32),
    "random_word": _random_word,
    "sum": _sum,
    "max": _extreme(torch.amax, -math.inf),
    "min": _extreme(torch.amin, math.inf),
    "matmul": _matmul,
    "transpose": lambda x: x.transpose(-1, -2),
    "reshape": _reshape,
    "call": lambda function, *args: function(*args),
}


def _wide(x: Any) -> Tensor:
    """What LAPACK takes: no halves, and no whole numbers."""
    x = lift(x)
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x if x.is_floating_point() or x.is_complex() else x.double()


NO_ANSWER: type[Exception] = vars(torch.linalg)["LinAlgError"]
"""What PyTorch raises for a matrix that it cannot factorise."""


def _factorised(factors: Callable[..., Any], vector: int = -1) -> Callable[..., Any]:
    run = factorised(OPERATIONS, factors, torch.stack, vector, NO_ANSWER)
    return lambda a: run(_wide(a))


def _lower(a: Tensor) -> Tensor:
    """What raises nothing: of a matrix that is not positive definite it is left where the method stopped."""
    return torch.linalg.cholesky_ex(a).L


def _solve_triangular(a: Tensor, b: Tensor, *, upper: bool = True, transposed: bool = False) -> Tensor:
    """From the right, x^T a^T = b^T: so LAPACK has the rows of PyTorch as the columns that it takes."""
    a, b = _wide(a), _wide(b)
    a, upper = (a, upper) if transposed else (a.mT, not upper)
    return torch.linalg.solve_triangular(a, b.mT, upper=upper, left=False).mT


def _argsort(x: Tensor, axis: int = -1) -> Tensor:
    x = _wide(x)
    return torch.argsort(x, dim=axis, stable=True).to(x.dtype)


def _take(x: Tensor, index: Any, axis: int = -1) -> Tensor:
    index = torch.as_tensor(index, device=x.device)
    beside, wide, at = places(x, index, axis)
    inside = index.clamp(0, x.shape[at] - 1).to(torch.int64).reshape(beside)
    return torch.gather(x, at, inside.expand(wide))


OPERATIONS.update(
    {
        "eigh": _factorised(torch.linalg.eigh, 0),
        "qr": _factorised(torch.linalg.qr),
        "svd": _factorised(lambda a: torch.linalg.svd(a, full_matrices=False), 1),
        "cholesky": lambda a: cholesky(OPERATIONS, _lower, torch.stack)(_wide(a)),
        "solve_triangular": _solve_triangular,
        "item": lambda found, index: found[index],
        "triu": lambda a, k=0: torch.triu(a, k),
        "diagonal": lambda a: torch.diagonal(a, dim1=-2, dim2=-1),
        "argsort": _argsort,
        "take": _take,
        "zeros": lambda like, shape, dtype: like.new_zeros(shape, dtype=dtype),
        "eye": lambda like, n, dtype: torch.eye(n, dtype=dtype, device=like.device),
    }
)
OPERATIONS["norm2"] = norm2(OPERATIONS, lambda x: torch.finfo(x.dtype).tiny, torch.Tensor.detach)
