"""PyTorch tensors: parameters, distributed tensors, and those that a transform or the compiler looks at."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch._C import _functorch as functorch

from optimisers.arrays.layout import contiguous_strides, permutation

Tensor = torch.Tensor

NAME = "torch"

HOST_NUMBERS = True
"""Whether the numbers of a state are worked out on the host, as long as nobody follows them."""

REPLACES = False
"""Whether arrays cannot be written, so that a step in place replaces them."""

SORTS = False
"""Whether the library hands dicts on with their keys sorted."""

CAPTURABLE = True
"""Whether the numbers of a state may live on a device, for graphs that are captured."""

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types whose elements lie in one storage, as their strides say."""


# -- what an array is ----------------------------------------------------------------------------------------


def is_array_type(kind: type) -> bool:
    return issubclass(kind, Tensor)


def is_inexact(x: Tensor) -> bool:
    return x.dtype.is_complex or (x.dtype.is_floating_point and x.dtype.itemsize > 1)


def is_trainable(x: Tensor) -> bool:
    """A parameter says itself whether it wants to be trained; any other tensor of inexact numbers is."""
    return is_inexact(x) and (x.requires_grad or not isinstance(x, torch.nn.Parameter))


def is_numbers(x: Tensor) -> bool:
    return True


def is_complex(x: Tensor) -> bool:
    return x.dtype.is_complex


def is_writable(x: Tensor) -> bool:
    """Tensors in which two elements share one place (expanded ones) are not, nor those of inference mode
    outside it.
    """
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return x.numel() == 0 or not any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))


def is_traced(x: Tensor) -> bool:
    """Whether a transform of `torch.func` or the compiler looks at this tensor."""
    return (
        functorch.is_functorch_wrapped_tensor(x)
        or torch._is_functional_tensor(x)
        or isinstance(x, torch._subclasses.FakeTensor | torch._subclasses.functional_tensor.FunctionalTensor)
    )


def is_loose(x: Tensor) -> bool:
    """Whether state for this tensor is kept in tensors of its kind: it is no plain memory."""
    return (
        type(x) not in PLAIN
        or x.layout is not torch.strided
        or x.device.type == "meta"
        or x.is_conj()
        or x.is_neg()
        or is_traced(x)
    )


def may_bundle(x: Tensor) -> bool:
    """Whether state of small arrays may share a vector: only what is whole, on one device."""
    return False


def follows(xs: Sequence[Any], gradients: Sequence[Sequence[Any]], *, inplace: bool) -> bool:
    """Whether autograd, a transform or the compiler follows what becomes of these: then a step is made of
    tensors alone, each written anew. What is written in place is not followed by autograd.
    """
    if (
        not inplace
        and torch.is_grad_enabled()
        and (
            any(getattr(x, "grad_fn", None) is not None for x in xs)
            or any(getattr(g, "requires_grad", False) for gs in gradients for g in gs)
        )
    ):
        return True
    inside = functorch.maybe_current_level() is not None or torch._C._len_torch_dispatch_stack() > 0
    return inside and any(isinstance(a, Tensor) and is_traced(a) for v in (xs, *gradients) for a in v)


def unready(x: Tensor) -> str:
    """What must be done before this can be trained; empty if nothing."""
    lazy = isinstance(x, torch.nn.parameter.UninitializedTensorMixin)
    return "is not initialized yet; call the module with an input before `setup`" if lazy else ""


def size(x: Tensor) -> int:
    return x.numel()


def dtype_name(x: Tensor) -> str:
    return type_name(x.dtype)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of_name(dtype: Any) -> torch.dtype:
    """An element type, which may be given by its name."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def device(x: Tensor) -> str:
    """Where the elements live; for distributed tensors also how they are shared out."""
    shared_out = getattr(x, "placements", None)
    return str(x.device) if shared_out is None else f"{x.device} {shared_out} of {x.device_mesh}"


def memory(x: Tensor) -> Any:
    """(device, address, bytes per element, sorted (stride, size) of the axes): equal for a tensor and its
    transposed views.
    """
    if is_loose(x):
        return ("object", id(x))
    axes = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1)
    return str(x.device), x.data_ptr(), x.itemsize, tuple(axes)


def address(x: Tensor) -> int:
    """Where the first element lies."""
    return x.data_ptr()


def bounds(x: Tensor) -> tuple[int, int]:
    """The first address of the elements, and the first behind them; (0, 0) for what is no plain memory."""
    if is_loose(x):
        return 0, 0
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize if x.numel() else x.data_ptr()


def layout(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape, strides in bytes)."""
    return tuple(x.shape), tuple(s * x.itemsize for s in x.stride())


def shares(x: Any, others: list[Tensor]) -> bool:
    """Whether `x` may lie in the memory of one of the others."""
    if not isinstance(x, Tensor) or is_loose(x):
        return any(x is other for other in others)
    low, high = bounds(x)
    return any(a < high and low < b for a, b in map(bounds, others))


def is_contiguous(x: Tensor) -> bool:
    return x.is_contiguous()


def is_dense_memory(x: Tensor, where: str, *, write: bool) -> bool:
    """Whether kernels on a device may use the tensor where it lies, if its layout is the right one."""
    return not is_loose(x) and device(x) == where and x.data_ptr() % x.itemsize == 0


def same_array(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same elements in the same order."""
    return memory(a) == memory(b) and a.shape == b.shape and axes_between(a, b) is None


def axes_between(first: Tensor, other: Tensor) -> tuple[int, ...] | None:
    """The permutation with `first.permute(p)` laid out like `other`, for two views of one memory; None if
    equal.
    """
    if first is other:
        return None
    return permutation(tuple(first.shape), first.stride(), tuple(other.shape), other.stride())


def permuted(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.permute(axes)


# -- making tensors ------------------------------------------------------------------------------------------


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type in which the maths is done: that of the parameter, but float32 at least."""
    return {torch.complex32: torch.complex64}.get(dtype, torch.float32 if dtype.itemsize < 4 else dtype)


def promoted(dtype: torch.dtype, others: list[str]) -> torch.dtype:
    """The type to which this one and floating point types of these names promote, real or complex as it
    is.
    """
    wide = dtype
    for name in others:
        if name.startswith(("float", "complex")):
            wide = torch.promote_types(wide, getattr(torch, name))
    return wide if dtype.is_complex else wide.to_real()


def real_of(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real()


def full_like(x: Tensor, value: Any, *, real: bool = False, dtype: Any = None) -> Tensor:
    """One number in the shape of `x`: for plain tensors it is kept once, as an expanded tensor."""
    dtype = arithmetic(x.dtype) if dtype is None else of_name(dtype)
    dtype = real_of(dtype) if real else dtype
    if is_loose(x):
        return torch.full_like(x.detach(), value, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=x.device).expand(x.shape)


def widened(x: Tensor) -> Tensor:
    """A copy in the type of the arithmetic, laid out like `x`."""
    return copied(x, arithmetic(x.dtype))


def stand_in(shape: tuple[int, ...], dtype: Any) -> Tensor:
    """A tensor of this shape and type that takes no memory, to be looked at only."""
    return torch.empty(shape, dtype=dtype, device="meta")


def scalar_array(value: object) -> Tensor | None:
    """Nothing but a tensor is one."""
    return None


def any_set(x: Tensor) -> bool:
    """Whether some element is not zero."""
    if x.device.type == "meta":
        return False
    expanded = x.numel() > 0 and all(s == 0 for s in x.stride())
    return bool((x[(0,) * x.ndim] != 0) if expanded else x.any())


def zeros(n: int, dtype: Any, device: str) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(n, dtype=dtype, device=device)


def empty(n: int, dtype: Any, device: str) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(n, dtype=dtype, device=device)


def seen(x: Tensor, *, read_only: bool) -> Tensor:
    """A view for somebody to look at and to write into; a copy, if other states share it."""
    return x.clone() if read_only else x


def view(buffer: Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A tensor of this shape inside a flat buffer; offset and strides in elements."""
    return buffer.as_strided(shape, strides, offset)


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """The strides, in elements, of a dense tensor with the axes of `x` in the same order."""
    if is_loose(x) or x.is_contiguous():
        return contiguous_strides(tuple(x.shape))
    return tuple(torch.empty_like(x, device="meta", memory_format=torch.preserve_format).stride())


def copied(x: Tensor, dtype: Any) -> Tensor:
    """A copy in this type."""
    return (x if is_traced(x) else x.detach()).to(of_name(dtype), copy=True)


def duplicate(x: Any) -> Any:
    """A copy of a tensor; anything else as it is."""
    if isinstance(x, Tensor) and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return x.clone()  # it may outlive this mode
    return x.clone() if isinstance(x, Tensor) else x


def fresh(shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None, device: str) -> Tensor:
    """A tensor not yet written, with these dense strides (in elements); None for contiguous ones."""
    if strides is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def laid_out(x: Any, dtype: Any, strides: tuple[int, ...] | None, device: str) -> Tensor:
    """A copy of `x` in this type with these dense strides (in elements); None for contiguous ones."""
    if not isinstance(x, Tensor):
        return torch.as_tensor(x, dtype=dtype, device=device)
    return fresh(tuple(x.shape), dtype, strides, device).copy_(x.detach())


def dense(x: Tensor) -> Tensor:
    """The tensor with every element there; sparse ones are summed over equal indices."""
    return x.to_dense() if x.layout is not torch.strided else x


def has_rows(x: Any) -> bool:
    """Whether a gradient holds some rows only."""
    return isinstance(x, Tensor) and x.layout is torch.sparse_coo and x.sparse_dim() == 1


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers of the rows, their values) of a sparse tensor; equal ones summed."""
    x = x.detach().coalesce()
    return x.indices()[0], x.values()


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """A copy of some rows."""
    return x.detach().index_select(0, rows)


def put_rows(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write some rows."""
    with torch.no_grad():
        x.index_copy_(0, rows, values)


def assign(target: Tensor, value: Any) -> None:
    """Write `value` into `target`, rounding once to its type."""
    with torch.no_grad():
        target.copy_(value) if isinstance(value, Tensor) else target.fill_(value)


def flattened(arrays: list[Tensor]) -> Tensor:
    """All elements in one new vector, in the type to which those of the tensors promote."""
    return torch.cat([x.reshape(-1) for x in arrays])


def pieces(flat: Tensor, runs: list[tuple[slice, int, tuple[int, ...], Any]], *, copy: bool) -> list[Tensor]:
    """The tensors of runs (place, count, shape, type) of a vector; views where they can be and no copy is
    wanted.
    """
    out: list[Tensor] = []
    own = flat.dtype
    if copy and any(own == dtype for dtype in {run[3] for run in runs}):
        flat = flat.clone()  # at one stroke; the tensors are views of the copy
    for place, count, shape, dtype in runs:
        part = flat[place]
        if dtype != own:
            part = (part.real if own.is_complex and not dtype.is_complex else part).to(dtype)
        out.extend(part.reshape(count, *shape).unbind())
    return out


def stored(x: Tensor, value: Any, *, inplace: bool) -> Tensor:
    """`value` rounded to the type of `x`: in `x` itself where that may be written, else in a new tensor of
    its kind.
    """
    if inplace and is_writable(x):
        assign(x, value)
        return x
    new = torch.empty_like(x.detach())
    assign(new, value)
    return like(x, new)


def rounded(old: Tensor, value: Any) -> Tensor:
    """A tensor of the type and shape of an old one that holds `value`; autograd may follow it."""
    if isinstance(value, Tensor):
        return value.to(old.dtype).expand(old.shape)
    return torch.full_like(old.detach(), value)


def like(x: Tensor, new: Tensor) -> Tensor:
    """`new`, a parameter if `x` is, and wanting a gradient if it does."""
    if isinstance(x, torch.nn.Parameter):
        return torch.nn.Parameter(new, x.requires_grad)
    return new.requires_grad_() if x.requires_grad and x.is_leaf else new


def gradient_of(x: Tensor) -> Tensor | None:
    """The gradient that a tensor keeps."""
    return x.grad


def value_and_grad(function: Callable[[Any], Any], arrays: Any, has_aux: bool) -> Any:
    """(what a function of a list or dict of tensors gives, its gradients); with `has_aux` it gives (value,
    aux).
    """
    others: list[Any] = []

    def of(given: Any) -> Any:
        value, aux = function(given) if has_aux else (function(given), None)
        flat, form = pytree.tree_flatten(aux)
        others[:] = [form, [None if isinstance(v, Tensor) else (v,) for v in flat]]
        return value, [v for v in flat if isinstance(v, Tensor)]

    grads, (value, tensors) = torch.func.grad_and_value(of, has_aux=True)(arrays)
    form, flat = others
    found = iter(tensors)
    aux = pytree.tree_unflatten([next(found) if v is None else v[0] for v in flat], form)
    return ((value, aux) if has_aux else value), grads


def is_part(x: Tensor) -> bool:
    """Whether this is one part of a larger tensor; distributed ones are whole to those who ask."""
    return False


def across(op: str, value: Any, x: Tensor) -> Any:
    """A reduction of a whole tensor; distributed ones reduce over their parts themselves."""
    return value


def touched(arrays: Sequence[Tensor]) -> None:
    """Tell autograd that these were written, so that it notices if it had saved what stood there."""
    torch.autograd.graph.increment_version(arrays)


def cast(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) else x


def number(value: Any, dtype: Any) -> Any:
    """A number of the host beside tensors of a type: torch rounds it to theirs."""
    return complex(value) if dtype.is_complex else float(value)


def to_host(x: Any) -> Any:
    """The value of a 0-d tensor, whole if it is distributed; numbers as they are."""
    return getattr(x, "full_tensor", lambda: x)().item() if isinstance(x, Tensor) else x


def to_numpy(x: Tensor) -> Any:
    """The elements as an array of NumPy, for somebody to look at; of a distributed tensor those here."""
    x = getattr(x, "to_local", lambda: x)().detach().cpu().resolve_conj().resolve_neg()
    return (x.float() if x.dtype is torch.bfloat16 else x).numpy()


def broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    """`x` in this shape; raises ValueError if it does not broadcast."""
    try:
        return torch.broadcast_to(torch.as_tensor(x), shape)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


# -- tables of numbers ---------------------------------------------------------------------------------------


def is_fixed(x: Any) -> bool:
    """Whether a number may be read once and for all: nobody follows what becomes of it."""
    return not isinstance(x, Tensor) or not (x.requires_grad or is_traced(x))


def table(rows: Any) -> Tensor:
    """A table of numbers in float64."""
    if isinstance(rows, np.ndarray):
        return torch.tensor(rows)
    return torch.stack([torch.stack([torch.as_tensor(v).to(torch.float64) for v in row]) for row in rows])


def constant(values: Any, beside: Tensor) -> Any:
    """A vector of the host beside a table of numbers."""
    return torch.as_tensor(values, dtype=beside.dtype, device=beside.device)


def on_device(numbers: Any, device: str) -> Tensor:
    """Numbers as a tensor of float64 on a device."""
    where = device.partition(" ")[0]  # behind a distributed one stands how it is shared out
    if isinstance(numbers, Tensor):
        return numbers.to(where)
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float64, device=where)


def moved(x: Any, device: str) -> Tensor:
    """A number in float32 on a device; nobody waits for it."""
    return x.to(device, torch.float32, non_blocking=True)


def capturing(device: str) -> bool:
    """Whether what is launched on a device now is noted in a graph, to be replayed."""
    return device.startswith("cuda") and torch.cuda.is_current_stream_capturing()


def stream(device: str) -> int | None:
    """The handle of the stream on which arrays of a device are computed; None for that of PyTorch."""
    return None


def ticked(clock: Any, skipped: Any) -> Any:
    """A clock after an update, the same tensor; as it was where `skipped` is not 0."""
    with torch.no_grad():
        return clock.add_(1 if skipped is None else (skipped.reshape(()) == 0))


def stacked(values: Sequence[Tensor]) -> Tensor:
    """A vector of these 0-d tensors."""
    return torch.stack([_lift(v) for v in values])


def joined(vectors: list[Tensor]) -> Tensor:
    """One vector after the other."""
    return torch.cat(vectors)


def columns(values: Sequence[Any], rows: int) -> Tensor:
    """A table of these columns, each a value for every row or one for all."""
    return torch.stack([torch.as_tensor(v).to(torch.float64).expand(rows) for v in values], 1)


def placed(x: Tensor, index: Any, values: Any) -> Tensor:
    """A new tensor with values written at an index."""
    x = x.clone()
    x[index] = torch.as_tensor(values, dtype=x.dtype, device=x.device)
    return x


# -- the words -----------------------------------------------------------------------------------------------


def _lift(x: Any, other: Any = None) -> Tensor:
    """A number as a tensor, in the type of the other argument."""
    if isinstance(x, Tensor):
        return x
    if isinstance(other, Tensor):
        return torch.as_tensor(x, dtype=other.dtype, device=other.device)
    return torch.as_tensor(x, dtype=torch.bool if isinstance(x, bool | np.bool_) else torch.float64)


def _one(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: function(_lift(x))


def _two(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: function(_lift(a, b), _lift(b, a))


def _sqrt(x: Any) -> Any:
    x = _lift(x)
    if not x.requires_grad:
        return torch.sqrt(x)
    zero = x == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, x)))


def _abs2(x: Any) -> Any:
    return x.real * x.real + x.imag * x.imag if isinstance(x, Tensor) and x.is_complex() else x * x


def _sign(x: Any) -> Any:
    x = _lift(x)
    return torch.where(torch.isnan(x), x, torch.sgn(x))


def _real(x: Any) -> Any:
    return x.real if isinstance(x, complex) or (isinstance(x, Tensor) and x.is_complex()) else x


def _imag(x: Any) -> Any:
    return (
        x.imag
        if isinstance(x, complex) or (isinstance(x, Tensor) and x.is_complex())
        else torch.zeros_like(_lift(x))
    )


def _bits(x: Any) -> Any:
    return _lift(x).to(torch.float32).view(torch.int32)


def _join_bits(high: Any, low: Any) -> Any:
    return (_bits(high) + _lift(low).to(torch.int32)).view(torch.float32)


def _high_bits(x: Any) -> Any:
    rounded = ((_bits(x) + 0x8000) & -0x10000).view(torch.float32)
    return torch.where(torch.isnan(x), math.nan, rounded)


def _low_bits(x: Any) -> Any:
    return torch.where(torch.isnan(x), 0.0, (_bits(x) - _bits(_high_bits(x))).to(torch.float32))


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    return torch.where(condition, a, b)


def _sum(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """Whole sums are taken in float64 at least, as the fused kernels take them."""
    x = _lift(x)
    if axis is None and not keepdims:
        return torch.sum(x, dtype=torch.complex128 if x.is_complex() else torch.float64)
    return torch.sum(x, dim=axis, keepdim=keepdims)


def _extreme(reduce: Callable[..., Any], empty: float) -> Callable[..., Any]:
    def word(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        x = _lift(x)
        if axis is None and not keepdims and x.numel() == 0:
            return torch.full((), empty, dtype=x.dtype, device=x.device)
        return reduce(x, dim=() if axis is None else axis, keepdim=keepdims)

    return word


WORDS: dict[str, Callable[..., Any]] = {
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
    "sum": _sum,
    "max": _extreme(torch.amax, -math.inf),
    "min": _extreme(torch.amin, math.inf),
    "matmul": torch.matmul,
    "transpose": lambda x: x.transpose(-1, -2),
    "reshape": torch.reshape,
    "call": lambda function, *args: function(*args),
}
