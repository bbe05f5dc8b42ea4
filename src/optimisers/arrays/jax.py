"""Arrays of JAX: they cannot be written, and inside a transform nobody knows their values."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimisers.arrays import numpy as host
from optimisers.arrays.layout import contiguous_strides
from optimisers.errors import BadSetting

Array = jax.Array

NAME = "jax"

HOST_NUMBERS = False
"""Whether the numbers of a state are worked out on the host, as long as nobody follows them."""

REPLACES = True
"""Whether arrays cannot be written, so that a step in place replaces them."""

SORTS = True
"""Whether the library hands dicts on with their keys sorted."""

CAPTURABLE = False
"""Whether the numbers of a state may live on a device, for graphs that are captured."""


# -- what an array is ----------------------------------------------------------------------------------------


def is_array_type(kind: type) -> bool:
    return issubclass(kind, jax.Array | jax.ShapeDtypeStruct) or kind.__name__.endswith("Tracer")


def is_inexact(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact) and jnp.dtype(x.dtype).itemsize > 1


is_trainable = is_inexact


def is_numbers(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jnp.bool_)


def is_complex(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def is_writable(x: Array) -> bool:
    return False


def is_loose(x: Array) -> bool:
    """No address of theirs can be written."""
    return True


def is_traced(x: Any) -> bool:
    """Whether a transform looks at this array."""
    return isinstance(x, Tracer)


def may_bundle(x: Array) -> bool:
    """Whether state of small arrays may share a vector: only what is whole, on one device; of what is traced,
    nobody knows.
    """
    return is_traced(x) or isinstance(x, jax.ShapeDtypeStruct) or len(x.devices()) == 1


def follows(xs: Sequence[Any], gradients: Sequence[Sequence[Any]], *, inplace: bool) -> bool:
    """A step is always made of arrays alone."""
    return True


def unready(x: Array) -> str:
    """What must be done before this can be trained; empty if nothing."""
    return ""


def size(x: Array) -> int:
    return math.prod(x.shape)


def dtype_name(x: Array) -> str:
    return type_name(x.dtype)


def type_name(dtype: Any) -> str:
    return jnp.dtype(dtype).name


def device(x: Array) -> str:
    """Whether it is one; arrays that are shared out over several are stepped apart from others."""
    return "one device" if may_bundle(x) else "several devices"


def memory(x: Array) -> Any:
    """Who the array is: views of one memory there are none."""
    return id(x)


def bounds(x: Array) -> tuple[int, int]:
    """No address is known."""
    return 0, 0


def layout(x: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides in bytes), were it memory."""
    return tuple(x.shape), contiguous_strides(tuple(x.shape))


def shares(x: Any, others: list[Array]) -> bool:
    return False


def same_array(a: Array, b: Array) -> bool:
    """Whether two arrays may be taken for one: those that hold the same. In a transform nobody can see it,
    and what `setup` saw counts.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return is_traced(a) or is_traced(b) or bool(jnp.array_equal(a, b, equal_nan=is_inexact(a)))


def axes_between(first: Array, other: Array) -> tuple[int, ...] | None:
    return None


def permuted(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.transpose(x, axes)


# -- making arrays -------------------------------------------------------------------------------------------


def arithmetic(dtype: Any) -> Any:
    """The type in which the maths is done: that of the parameter, but float32 at least."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def promoted(dtype: Any, others: list[str]) -> Any:
    """The type to which this one and floating point types of these names promote, real or complex as it is;
    float32 stays where 64 bits are switched off.
    """
    wide = jnp.dtype(dtype)
    for name in others:
        if name.startswith(("float", "complex")):
            wide = jnp.promote_types(wide, jax.dtypes.canonicalize_dtype(name))
    return wide if jnp.issubdtype(dtype, jnp.complexfloating) else real_of(wide)


def real_of(dtype: Any) -> Any:
    return jnp.dtype({"complex64": "float32", "complex128": "float64"}.get(type_name(dtype), dtype))


def full_like(x: Array, value: Any, *, real: bool = False, dtype: Any = None) -> Array:
    """An array like `x`, on its devices, shared out as it is."""
    dtype = arithmetic(x.dtype) if dtype is None else _allowed(dtype)
    dtype = real_of(dtype) if real else dtype
    if isinstance(x, jax.ShapeDtypeStruct):
        return stand_in(x.shape, dtype)
    return jnp.full_like(x, value, dtype=dtype)


def _allowed(dtype: Any) -> Any:
    """An element type by its name; raises BadSetting for one that is switched off."""
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise BadSetting(
            f"{jnp.dtype(dtype).name} was asked for, and 64 bits are switched off in JAX; write "
            'jax.config.update("jax_enable_x64", True)'
        )
    return jnp.dtype(dtype)


def widened(x: Array) -> Array:
    """A copy in the type of the arithmetic."""
    return copied(x, arithmetic(x.dtype))


def stand_in(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of this shape and type that takes no memory, to be looked at only."""
    return jax.ShapeDtypeStruct(shape, dtype)


def scalar_array(value: object) -> Array | None:
    """A Python or NumPy number is no array."""
    return None


def any_set(x: Array) -> bool:
    return True


def seen(x: Array, *, read_only: bool) -> Array:
    return x


def dense_strides(x: Array) -> tuple[int, ...]:
    return contiguous_strides(tuple(x.shape))


def copied(x: Array, dtype: Any) -> Array:
    """A copy in this type, in a buffer of its own, so that both may be given away."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return stand_in(x.shape, _allowed(dtype))
    return jnp.array(x, _allowed(dtype), copy=True)


def duplicate(x: Any) -> Any:
    """What cannot be written needs no copy."""
    return x


def dense(x: Array) -> Array:
    return x


def flattened(arrays: list[Array]) -> Array:
    """All elements in one vector, in the type to which those of the arrays promote."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
        return stand_in((sum(map(size, arrays)),), jnp.result_type(*(x.dtype for x in arrays)))
    return jnp.concatenate([jnp.ravel(x) for x in arrays]) if arrays else jnp.zeros(0, bool)


def pieces(flat: Array, runs: list[tuple[slice, int, tuple[int, ...], Any]], *, copy: bool) -> list[Array]:
    """The arrays of runs (place, count, shape, type) of a vector."""
    out: list[Array] = []
    for place, count, shape, dtype in runs:
        part = flat[place]
        if is_complex(part) and not jnp.issubdtype(dtype, jnp.complexfloating):
            part = jnp.real(part)
        part = part.astype(dtype).reshape(count, *shape)
        out.extend(part[i] for i in range(count))
    return out


def rounded(old: Array, value: Any) -> Array:
    """An array of the type and shape of an old one that holds `value`."""
    return jnp.broadcast_to(jnp.asarray(value).astype(old.dtype), old.shape)


def like(x: Array, new: Array) -> Array:
    return new


def varying(x: Any) -> frozenset[Any]:
    """The axes of a `shard_map` along which an array is known to vary."""
    kind = jax.typeof(x)
    found: Any = getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    return getattr(kind, "vma", frozenset[Any]()) if found is None else found  # its name before JAX 0.10


def is_part(x: Array) -> bool:
    """Whether this is one device's part of a larger array."""
    return bool(varying(x))


def across(op: str, value: Any, x: Array) -> Any:
    """A reduction over all parts of an array that a `shard_map` has shared out: over the axes along which it
    is known to vary.
    """
    axes = tuple(varying(x))
    return {"sum": jax.lax.psum, "max": jax.lax.pmax, "min": jax.lax.pmin}[op](value, axes) if axes else value


def touched(arrays: Sequence[Array]) -> None:
    """Nothing was written."""


def has_rows(x: Any) -> bool:
    """No array of JAX holds some rows only."""
    return False


def cast(x: Any, dtype: Any) -> Any:
    return jnp.asarray(x).astype(dtype)


def number(value: Any, dtype: Any) -> Any:
    """A number of the host beside arrays of a type, rounded to theirs."""
    return jnp.asarray(value, dtype)


def to_host(x: Any) -> Any:
    """The value of a 0-d array; numbers as they are."""
    return x


def to_numpy(x: Array) -> Any:
    """The elements as an array of NumPy, for somebody to look at."""
    return np.asarray(x)


def broadcast(x: Any, shape: tuple[int, ...]) -> Array:
    """`x` in this shape; raises ValueError if it does not broadcast."""
    return jnp.broadcast_to(x, shape)


# -- tables of numbers ---------------------------------------------------------------------------------------


def is_fixed(x: Any) -> bool:
    """Whether a number may be read once and for all: nobody follows what becomes of it."""
    return not is_traced(x)


def table(rows: Any) -> Array:
    """A table of numbers in float32, or float64 where 64 bits are switched on; never of a weak type."""
    kind = jax.dtypes.canonicalize_dtype(np.float64)
    if isinstance(rows, np.ndarray):
        return jnp.asarray(rows, kind)
    return (
        jnp.stack([jnp.stack([jnp.asarray(v, kind) for v in row]) for row in rows])
        if rows[0]
        else jnp.zeros((len(rows), 0), kind)
    )


def constant(values: Any, beside: Array) -> Any:
    """A vector of the host beside a table of numbers."""
    return jnp.asarray(values, beside.dtype)


def on_device(numbers: Any, device: str) -> Any:
    """Numbers as they are: JAX places them where they are needed."""
    return numbers


capturing = host.capturing
stream = host.stream
ticked = host.ticked


def stacked(values: Sequence[Array]) -> Array:
    """A vector of these 0-d arrays."""
    return jnp.stack([jnp.asarray(v) for v in values])


def joined(vectors: list[Array]) -> Array:
    """One vector after the other."""
    return jnp.concatenate(vectors)


def columns(values: Sequence[Any], rows: int) -> Array:
    """A table of these columns, each a value for every row or one for all."""
    kind = jax.dtypes.canonicalize_dtype(np.float64)
    return jnp.stack([jnp.broadcast_to(jnp.asarray(v, kind), (rows,)) for v in values], 1)


def placed(x: Array, index: Any, values: Any) -> Array:
    """A new array with values written at an index."""
    return x.at[index].set(jnp.asarray(values, x.dtype))


# -- the words -----------------------------------------------------------------------------------------------


@jax.custom_jvp
def _sqrt(x: Any) -> Any:
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    root = jnp.sqrt(x)
    return root, jnp.where(root == 0, 0, dx / (2 * jnp.where(root == 0, 1, root)))


def _abs2(x: Any) -> Any:
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def _bits(x: Any) -> Any:
    return jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)


def _float(x: Any) -> Any:
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def _join_bits(high: Any, low: Any) -> Any:
    return _float(_bits(high) + jnp.asarray(low).astype(jnp.int32))


def _high_bits(x: Any) -> Any:
    return jnp.where(jnp.isnan(x), jnp.nan, _float((_bits(x) + 0x8000) & -0x10000))


def _low_bits(x: Any) -> Any:
    return jnp.where(jnp.isnan(x), 0.0, (_bits(x) - _bits(_high_bits(x))).astype(jnp.float32))


def _extreme(reduce: Callable[..., Any], empty: float) -> Callable[..., Any]:
    def word(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        if axis is None and not keepdims and jnp.size(x) == 0:
            return jnp.asarray(empty, jnp.asarray(x).dtype)
        return reduce(x, axis=axis, keepdims=keepdims)

    return word


def _sign(x: Any) -> Any:
    return jnp.where(jnp.isnan(x), x, jnp.sign(x))


WORDS: dict[str, Callable[..., Any]] = {
    "add": jnp.add,
    "subtract": jnp.subtract,
    "multiply": jnp.multiply,
    "divide": jnp.divide,
    "power": jnp.power,
    "negative": jnp.negative,
    "less": jnp.less,
    "less_equal": jnp.less_equal,
    "greater": jnp.greater,
    "greater_equal": jnp.greater_equal,
    "equal": jnp.equal,
    "not_equal": jnp.not_equal,
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_not": jnp.logical_not,
    "sqrt": _sqrt,
    "exp": jnp.exp,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tanh": jnp.tanh,
    "arctan": jnp.arctan,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "sign": _sign,
    "abs": jnp.abs,
    "abs2": _abs2,
    "real": jnp.real,
    "imag": jnp.imag,
    "conj": jnp.conj,
    "isfinite": jnp.isfinite,
    "isnan": jnp.isnan,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "where": jnp.where,
    "join_bits": _join_bits,
    "high_bits": _high_bits,
    "low_bits": _low_bits,
    "sum": jnp.sum,
    "max": _extreme(jnp.max, -math.inf),
    "min": _extreme(jnp.min, math.inf),
    "matmul": jnp.matmul,
    "transpose": lambda x: jnp.swapaxes(x, -1, -2),
    "reshape": jnp.reshape,
    "call": lambda function, *args: function(*args),
}
