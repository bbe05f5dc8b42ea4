"""Arrays of JAX: they cannot be written, and inside a transform their values are unknown."""

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optimisers.arrays import philox
from optimisers.arrays.factors import cholesky, factorised, places
from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.norms import norm2
from optimisers.arrays.parts import Derivatives, Scalars, Shards, Stacks
from optimisers.arrays.protocol import HostArray, Library, Run, Scalar, Shape
from optimisers.errors import BadSetting

Array = jax.Array
Dtype = np.dtype[Any]


def _allowed(dtype: Dtype | str) -> Dtype:
    """An element type by its name; raises BadSetting for one that is switched off."""
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise BadSetting(
            f"{jnp.dtype(dtype).name} was asked for, and 64 bits are switched off in JAX; write "
            'jax.config.update("jax_enable_x64", True)'
        )
    return jnp.dtype(dtype)


def varying(x: Array | Scalar) -> frozenset[Any]:
    """The axes of a `shard_map` along which an array is known to vary."""
    kind = jax.typeof(x)
    found: Any = getattr(getattr(kind, "manual_axis_type", None), "varying", None)
    return getattr(kind, "vma", frozenset[Any]()) if found is None else found  # its name before JAX 0.10


# -- operations --------------------------------------------------------------------------------------------


def _sqrt(x: Array | Scalar) -> Any:
    """The root, whose derivatives at 0 are 0: of any order, and by any transform."""
    zero = jnp.equal(x, 0)
    return jnp.where(zero, x, jnp.sqrt(jnp.where(zero, 1, x)))


def _abs2(x: Array | Scalar) -> Any:
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def _bits(x: Array | Scalar) -> Any:
    return jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)


def _float(x: Array | Scalar) -> Any:
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def _join_bits(high: Array, low: Array) -> Any:
    return _float(_bits(high) + jnp.asarray(low).astype(jnp.int32))


def _high_bits(x: Array | Scalar) -> Any:
    return jnp.where(jnp.isnan(x), jnp.nan, _float((_bits(x) + 0x8000) & -0x10000))


def _low_bits(x: Array | Scalar) -> Any:
    return jnp.where(jnp.isnan(x), 0.0, (_bits(x) - _bits(_high_bits(x))).astype(jnp.float32))


def _to_float32(x: Array) -> Any:
    """In an operation that XLA may not leave out, as it does a cast there and back."""
    x = _real_number(x)
    return jax.lax.reduce_precision(x, 8, 23) if x.dtype == jnp.float64 else x


def _to_bfloat16(x: Array) -> Any:
    return jax.lax.reduce_precision(_to_float32(x), 8, 7)


def _to_float16(x: Array) -> Any:
    """Of numbers below the normal ones, which are multiples of 2**-24, the operation makes 0."""
    x = _to_float32(x)
    small = jnp.round(x * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(x) < 2.0**-14, small, jax.lax.reduce_precision(x, 5, 10))


def _real_number(x: Array | Scalar) -> Any:
    x = jnp.asarray(x)
    return x if x.dtype in (jnp.float32, jnp.float64) else x.astype(float)


def _random_word(
    like: Array | jax.ShapeDtypeStruct, seed: Any, step: Any, first: Any, last: Any, **which: int
) -> Array:
    """Random bits for every element of an array, as whole numbers."""
    shape = like.shape or (1,)
    low = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(contiguous_strides(shape)):
        low += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
    seed, step, first, last = (jnp.asarray(v).astype(jnp.uint32) for v in (seed, step, first, last))
    found = philox.word((low, jnp.zeros((), jnp.uint32)), seed, step, (first, last), np.uint32, **which)
    return found.reshape(like.shape)


def _extreme(reduce: Callable[..., Any], empty: float) -> Callable[..., Any]:
    def reduced(x: Array | Scalar, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Any:
        if axis is None and not keepdims and jnp.size(x) == 0:
            return jnp.asarray(empty, jnp.asarray(x).dtype)
        return reduce(x, axis=axis, keepdims=keepdims)

    return reduced


def _sign(x: Array | Scalar) -> Any:
    return jnp.where(jnp.isnan(x), x, jnp.sign(x))


def product_type(dtype: Dtype, wanted: str) -> Dtype:
    """In which type products are taken of real matrices; see `Library.product_type`."""
    if dtype.kind == "c":
        return dtype
    if wanted != "fast":
        return jnp.dtype(wanted)
    return jnp.dtype("bfloat16") if dtype == np.float32 and jax.default_backend() != "cpu" else dtype


def _matmul(a: Array, b: Array, dtype: str | None = None) -> Array:
    if dtype is None:
        return jnp.matmul(a, b)
    kind = product_type(a.dtype, dtype)
    return jnp.matmul(a.astype(kind), b.astype(kind)).astype(a.dtype)


OPERATIONS: dict[str, Callable[..., Any]] = {
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
    "to_float16": _to_float16,
    "to_bfloat16": _to_bfloat16,
    "to_float32": _to_float32,
    "random_word": _random_word,
    "sum": jnp.sum,
    "max": _extreme(jnp.max, -math.inf),
    "min": _extreme(jnp.min, math.inf),
    "matmul": _matmul,
    "transpose": lambda x: jnp.swapaxes(x, -1, -2),
    "reshape": jnp.reshape,
    "call": lambda function, *args: function(*args),
}


def _wide(x: Any) -> Array:
    """What factorisations take: no halves, and no whole numbers."""
    x = jnp.asarray(x)
    if x.dtype in (jnp.float16, jnp.bfloat16):
        return x.astype(jnp.float32)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(float)


def _factorised(factors: Callable[..., Any], vector: int = -1) -> Callable[..., Any]:
    run = factorised(OPERATIONS, factors, jnp.stack, vector)
    return lambda a: run(_wide(a))


def _cholesky(a: Array) -> Array:
    return jnp.linalg.cholesky(a, symmetrize_input=False)


def _solve_triangular(a: Array, b: Array, *, upper: bool = True, transposed: bool = False) -> Array:
    a, b = _wide(a), _wide(b)
    outer = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = jnp.broadcast_to(a, (*outer, *a.shape[-2:])), jnp.broadcast_to(b, (*outer, *b.shape[-2:]))
    return jax.lax.linalg.triangular_solve(a, b, left_side=True, lower=not upper, transpose_a=transposed)


def _argsort(x: Array, axis: int = -1) -> Array:
    x = _wide(x)
    return jnp.argsort(x, axis=axis, stable=True).astype(x.dtype)


def _take(x: Array, index: Any, axis: int = -1) -> Array:
    index = jnp.asarray(index)
    beside, wide, at = places(x, index, axis)
    inside = jnp.clip(index, 0, x.shape[at] - 1).astype(jnp.int32).reshape(beside)
    return jnp.take_along_axis(x, jnp.broadcast_to(inside, wide), at)


def _every(condition: Any, new: Callable[[], Any], old: Callable[[], Any]) -> Any:
    if not isinstance(condition, Tracer):
        return new() if condition else old()
    olds = tuple(map(jnp.asarray, old()))

    def computed() -> Any:
        return tuple(jnp.asarray(v).astype(was.dtype) for v, was in zip(new(), olds, strict=True))

    return jax.lax.cond(condition, computed, lambda: olds)


def _made(like: Array, shape: Shape, dtype: Any, make: Callable[[], Array]) -> Any:
    """A new array, or what stands for it beside what stands for one."""
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, dtype)
    return make()


OPERATIONS.update(
    {
        "eigh": _factorised(lambda a: jnp.linalg.eigh(a, symmetrize_input=False), 0),
        "qr": _factorised(jnp.linalg.qr),
        "svd": _factorised(lambda a: jnp.linalg.svd(a, full_matrices=False), 1),
        "cholesky": lambda a: cholesky(OPERATIONS, _cholesky, jnp.stack)(_wide(a)),
        "solve_triangular": _solve_triangular,
        "item": lambda found, index: found[index],
        "triu": lambda a, k=0: jnp.triu(a, k),
        "diagonal": lambda a: jnp.diagonal(a, axis1=-2, axis2=-1),
        "argsort": _argsort,
        "take": _take,
        "every": _every,
        "zeros": lambda like, shape, dtype: _made(like, shape, dtype, lambda: jnp.zeros(shape, dtype)),
        "eye": lambda like, n, dtype: _made(like, (n, n), dtype, lambda: jnp.eye(n, dtype=dtype)),
    }
)
OPERATIONS["norm2"] = norm2(OPERATIONS, lambda x: float(jnp.finfo(x.dtype).tiny), jax.lax.stop_gradient)


def hessian_product(
    function: Callable[[list[Array]], Array], arrays: list[Array], along: list[Array]
) -> list[Array]:
    """The second derivative of a function of arrays, times vectors: forward over reverse."""
    return jax.jvp(jax.grad(function), (arrays,), (along,))[1]


@final
class JaxScalars(Scalars):
    """Scalars in arrays of JAX."""

    def is_fixed(self, x: object) -> bool:
        return not isinstance(x, Tracer)

    def table(self, rows: Any) -> Array:
        kind = jax.dtypes.canonicalize_dtype(np.float64)
        if isinstance(rows, np.ndarray):
            return jnp.add(rows.astype(kind), jnp.zeros((), kind))  # in a mesh it lies as results do
        return (
            jnp.stack([jnp.stack([jnp.asarray(v, kind) for v in row]) for row in rows])
            if rows[0]
            else jnp.zeros((len(rows), 0), kind)
        )

    def constant(self, values: object, beside: Array) -> Any:
        return jnp.asarray(values, beside.dtype)

    def beside(self, value: Array, arrays: Sequence[Array]) -> Array:
        if any(isinstance(x, Tracer) or not isinstance(x, jax.Array) for x in (value, *arrays)):
            return value
        found = {x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None for x in arrays}
        mesh = found.pop() if len(found) == 1 else None
        if mesh is None:
            return value
        # A step gives such a number back with an axis each: another spelling would be compiled once more.
        explicit = AxisType.Explicit in mesh.axis_types
        spec = PartitionSpec(*[None] * np.ndim(value)) if explicit else PartitionSpec()
        return jax.device_put(value, NamedSharding(mesh, spec))

    def mapped(self, function: Callable[[Any], Any], counts: Array) -> Array:
        return jax.vmap(function)(counts.astype(jnp.int32)).astype(counts.dtype)

    def joined(self, vectors: list[Array]) -> Array:
        return jnp.concatenate(vectors)

    def columns(self, values: Sequence[Any], rows: int) -> Array:
        kind = jax.dtypes.canonicalize_dtype(np.float64)
        return jnp.stack([jnp.broadcast_to(jnp.asarray(v, kind), (rows,)) for v in values], 1)

    def placed(self, x: Array, index: object, values: object) -> Array:
        return x.at[index].set(jnp.asarray(values, x.dtype))

    def counted(self, clocks: object) -> Any:
        return jnp.add(jnp.asarray(clocks).astype(jnp.int32), jnp.int32(0))

    def number(self, value: Scalar, dtype: Dtype) -> Any:
        return jnp.asarray(value, dtype)


@final
class JaxStacks(Stacks[Array, Dtype]):
    """Stacks in JAX."""

    def stack(self, arrays: Sequence[Array]) -> Array:
        return jnp.stack(list(arrays))

    def product_type(self, dtype: Dtype, wanted: str, device: str) -> Dtype:
        return product_type(dtype, wanted)


@final
class JaxShards(Shards[Array]):
    """Arrays on several devices, and inside of `shard_map`."""

    def is_spread(self, x: Array) -> bool:
        """Whether an array, as far as it can be seen, is on several devices."""
        return isinstance(x, jax.Array) and not isinstance(x, Tracer) and len(x.devices()) > 1

    def is_cut(self, x: Array) -> bool:
        """Whether an array, as far as it can be seen, is cut into parts that lie on several devices."""
        if not isinstance(x, Tracer):
            return isinstance(x, jax.Array) and not x.sharding.is_fully_replicated
        spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
        return any(axes is not None for axes in spec)

    def is_part(self, x: Array) -> bool:
        return bool(varying(x))

    def across(self, op: str, value: Array, x: Array) -> Array:
        axes = tuple(varying(x))
        if not axes:
            return value
        if op == "norm2":
            top = jax.lax.pmax(jax.lax.stop_gradient(value), axes)
            scale = jnp.where((top > 0) & (top < math.inf), top, 1)
            return scale * _sqrt(jax.lax.psum((value / scale) ** 2, axes))
        return {"sum": jax.lax.psum, "max": jax.lax.pmax, "min": jax.lax.pmin}[op](value, axes)


@final
class JaxLibrary(Library[Array, Dtype]):
    """JAX."""

    name = "jax"
    immutable = True
    operations = OPERATIONS
    derivatives = Derivatives(hessian_product=hessian_product)
    stacks = JaxStacks()
    scalars = JaxScalars()
    shards = JaxShards()

    # -- what an array is -----------------------------------------------------------------------------------

    def is_array_type(self, kind: type) -> bool:
        return issubclass(kind, jax.Array | jax.ShapeDtypeStruct) or kind.__name__.endswith("Tracer")

    def type_name(self, dtype: Dtype) -> str:
        return dtype.name if hasattr(dtype, "name") else jnp.dtype(dtype).name

    def dtype(self, name: str) -> Dtype:
        return jnp.dtype(jax.dtypes.canonicalize_dtype(name))

    def is_traced(self, x: object) -> bool:
        return isinstance(x, Tracer)

    def traces(self, xs: Sequence[object], gradients: Sequence[Sequence[object]], *, inplace: bool) -> bool:
        return True

    def device(self, x: Array) -> str:
        """A name for all of them: where an array lies is no part of a state, which may be moved."""
        return "any device"

    def holds_same(self, a: Array, b: Array) -> bool:
        """In a transform it cannot be seen, and what `setup` saw counts."""
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return (
            self.is_traced(a)
            or self.is_traced(b)
            or bool(jnp.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.inexact)))
        )

    # -- making arrays --------------------------------------------------------------------------------------

    def full_like(self, x: Array, value: Scalar, dtype: Dtype | str) -> Array:
        """An array like `x`, on its devices, shared out as it is."""
        kind = _allowed(dtype)
        if isinstance(x, jax.ShapeDtypeStruct):
            return self.stand_in(x.shape, kind)
        return jnp.full_like(x, value, dtype=kind)

    def copied(self, x: Array, dtype: Dtype | str) -> Array:
        """A copy in this type, in a buffer of its own, so that both may be given away."""
        if isinstance(x, jax.ShapeDtypeStruct):
            return self.stand_in(x.shape, _allowed(dtype))
        return jnp.array(x, _allowed(dtype), copy=True)

    def cast(self, x: Array | Scalar, dtype: Dtype) -> Any:
        return jnp.asarray(x).astype(dtype)

    def broadcast(self, x: Array | Scalar, shape: Shape) -> Array:
        return jnp.broadcast_to(x, shape)

    def permuted(self, x: Array, axes: tuple[int, ...]) -> Array:
        return jnp.transpose(x, axes)

    def flattened(self, arrays: list[Array]) -> Array:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
            return self.stand_in((sum(x.size for x in arrays),), jnp.result_type(*(x.dtype for x in arrays)))
        return jnp.concatenate([jnp.ravel(x) for x in arrays]) if arrays else jnp.zeros(0, bool)

    def pieces(self, flat: Array, runs: list[Run], *, copy: bool) -> list[Array]:
        out: list[Array] = []
        for place, count, shape, dtype in runs:
            part = flat[place]
            if jnp.iscomplexobj(part) and not jnp.issubdtype(dtype, jnp.complexfloating):
                part = jnp.real(part)
            part = part.astype(dtype).reshape(count, *shape)
            out.extend(part[i] for i in range(count))
        return out

    def to_numpy(self, x: Array) -> HostArray:
        return np.asarray(x)

    def stand_in(self, shape: Shape, dtype: Dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def rounded(self, old: Array, value: Array | HostArray | Scalar) -> Array:
        if isinstance(value, np.ndarray):
            own = value.astype(old.dtype)  # a copy: what is put on a CPU may be the memory itself
            return (
                jax.device_put(own, old.sharding) if getattr(old, "_committed", False) else jnp.asarray(own)
            )
        return jnp.broadcast_to(jnp.asarray(value).astype(old.dtype), old.shape)

    # -- scalars --------------------------------------------------------------------------------------------

    def stacked(self, values: Sequence[Array | Scalar]) -> Array:
        return jnp.stack([jnp.asarray(v) for v in values])


library = JaxLibrary()
