"""PyTorch tensors: parameters, distributed tensors, and those that a transform or the compiler looks at."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, final

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch._C import _functorch as functorch

from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.pages import on_large_pages
from optimisers.arrays.parts import Derivatives, Graphs, Memory, Scalars, Sparse, Stacks, Strides
from optimisers.arrays.protocol import HostArray, Library, Run, Scalar, Shape
from optimisers.arrays.torch_operations import OPERATIONS, lift, product_type
from optimisers.arrays.torch_shards import SHARDS, beside, spread

Tensor = torch.Tensor

TRACED = (torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor)

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types whose elements lie in one storage, as their strides say."""


def of_name(dtype: Any) -> torch.dtype:
    """An element type, which may be given by its name."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@functools.cache
def _name(dtype: torch.dtype) -> str:
    """The name of an element type, which PyTorch puts together anew each time."""
    return str(dtype).removeprefix("torch.")


def of_host(x: HostArray) -> Tensor:
    """An array of NumPy as a tensor, on its memory where that may be written; also of types of ml_dtypes."""
    x = x if x.flags.writeable else x.copy()
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def value_and_grad(function: Callable[[Any], Any], arrays: object, has_aux: bool) -> Any:
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


def hessian_product(
    function: Callable[[list[Tensor]], Tensor], arrays: list[Tensor], along: list[Tensor]
) -> list[Tensor]:
    """The second derivative of a function of tensors, times vectors: the gradient of its slope along them."""

    def slope(given: list[Tensor]) -> Tensor:
        grads = torch.func.grad(function)(given)
        return torch.stack([(g * z).sum() for g, z in zip(grads, along, strict=True)]).sum()

    return torch.func.grad(slope)(arrays)


def is_traced(x: object) -> bool:
    """Whether a transform or the compiler looks at a tensor."""
    return isinstance(x, Tensor) and (
        functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x) or isinstance(x, TRACED)
    )


def every(condition: Any, new: Callable[[], Any], old: Callable[[], Any]) -> Any:
    """One of two sides; both where a transform or the compiler looks at the condition."""
    if not is_traced(condition):
        return new() if condition else old()
    sides = zip(new(), old(), strict=True)
    return tuple(torch.where(condition, lift(v), lift(was)) for v, was in sides)


@final
class TorchScalars(Scalars):
    """Scalars in tensors."""

    def is_fixed(self, x: object) -> bool:
        return not isinstance(x, Tensor) or not (x.requires_grad or is_traced(x))

    def table(self, rows: Any) -> Tensor:
        if isinstance(rows, np.ndarray):
            return torch.tensor(rows)
        return torch.stack([torch.stack([torch.as_tensor(v).to(torch.float64) for v in row]) for row in rows])

    def constant(self, values: object, beside: Tensor) -> Any:
        return torch.as_tensor(values, dtype=beside.dtype, device=beside.device)

    def joined(self, vectors: list[Tensor]) -> Tensor:
        return torch.cat(vectors)

    def columns(self, values: Sequence[Any], rows: int) -> Tensor:
        return torch.stack([torch.as_tensor(v).to(torch.float64).expand(rows) for v in values], 1)

    def placed(self, x: Tensor, index: Any, values: Any) -> Tensor:
        x = x.clone()
        x[index] = torch.as_tensor(values, dtype=x.dtype, device=x.device)
        return x

    def counted(self, clocks: object) -> Any:
        return torch.as_tensor(clocks, dtype=torch.float64)

    def counts(self, counts: Tensor) -> HostArray:
        return np.atleast_1d(counts.detach().cpu().numpy())

    def number(self, value: Scalar, dtype: torch.dtype) -> Any:
        return complex(value) if dtype.is_complex else float(cast("float", value))

    def on_device(self, numbers: object, device: str) -> Tensor:
        where = device.partition(" ")[0]  # behind a distributed one stands how it is shared out
        if isinstance(numbers, Tensor):
            return numbers.to(where)
        with torch.inference_mode(False):
            return torch.tensor(numbers, dtype=torch.float64, device=where)

    def moved(self, x: Tensor, device: str) -> Tensor:
        return x.to(device, torch.float32, non_blocking=True)

    def advanced_clocks(self, clock: Any, skipped: object, covered: Any) -> Any:
        with torch.no_grad():
            one = 1 if skipped is None else (skipped.reshape(()) == 0)
            return clock.add_(one if covered is None else one * covered)


def is_opaque(x: Tensor) -> bool:
    """Whether a tensor is no plain memory."""
    return (
        type(x) not in PLAIN
        or x.layout is not torch.strided
        or x.device.type == "meta"
        or x.is_conj()
        or x.is_neg()
        or is_traced(x)
    )


def device_of(x: Tensor) -> str:
    """Where a tensor is, and how it is shared out."""
    shared_out = getattr(x, "placements", None)
    return str(x.device) if shared_out is None else f"{x.device} {shared_out} of {x.device_mesh}"


@final
class TorchMemory(Memory[Tensor, torch.dtype]):
    """Where elements of tensors lie."""

    def address(self, x: Tensor) -> int:
        return x.data_ptr()

    def layout(self, x: Tensor) -> tuple[Shape, Strides]:
        return tuple(x.shape), tuple(s * x.itemsize for s in x.stride())

    def is_dense(self, x: Tensor, where: str, *, write: bool) -> bool:
        return not is_opaque(x) and device_of(x) == where and x.data_ptr() % x.itemsize == 0

    def dense_strides(self, x: Tensor) -> tuple[int, ...]:
        if is_opaque(x) or x.is_contiguous():
            return contiguous_strides(tuple(x.shape))
        return tuple(torch.empty_like(x, device="meta", memory_format=torch.preserve_format).stride())

    def zeros(self, n: int, dtype: torch.dtype, device: str) -> Tensor:
        """A vector of zeros, which is state that lives long: a large one is on large pages."""
        with torch.inference_mode(False), torch.no_grad():
            new = torch.empty(n, dtype=dtype, device=device)
            if device == "cpu" and type(new) is Tensor:
                on_large_pages(new.data_ptr(), new.nbytes)
            return new.zero_()

    def empty(self, n: int, dtype: torch.dtype, device: str) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(n, dtype=dtype, device=device)

    def view(self, buffer: Tensor, offset: int, shape: Shape, strides: Strides) -> Tensor:
        return buffer.as_strided(shape, strides, offset)

    def fresh(self, shape: Shape, dtype: torch.dtype, strides: Strides | None, device: str) -> Tensor:
        if strides is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def touched(self, arrays: Sequence[Tensor]) -> None:
        torch.autograd.graph.increment_version(arrays)


def product(
    a: Tensor,
    b: Tensor,
    target: Tensor | None,
    c: Tensor | None,
    alpha: Any,
    beta: Any,
    spare: Callable[[], Tensor | None],
) -> Tensor:
    if a.ndim != 3 or isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        found = torch.matmul(a, b, out=target)
        if isinstance(alpha, Tensor) or alpha != 1:
            found = torch.mul(found, alpha, out=target)
        return found if c is None else torch.add(found, c * beta, out=target)
    if c is not None:
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha, out=target)
    found = torch.bmm(a, b, out=target)
    return found if alpha == 1 else torch.mul(found, alpha, out=target)


@final
class TorchStacks(Stacks[Tensor, torch.dtype]):
    """Stacks in PyTorch."""

    into: Mapping[str, Callable[..., Any]] = {
        "add": torch.add,
        "subtract": torch.sub,
        "multiply": torch.mul,
        "divide": torch.div,
        "negative": torch.neg,
    }
    product = staticmethod(product)

    def stack(self, arrays: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(arrays))

    def product_type(self, dtype: torch.dtype, wanted: str, device: str) -> torch.dtype:
        return product_type(dtype, wanted, device)


@final
class TorchGraphs(Graphs):
    """CUDA graphs."""

    capturable = True

    def capturing(self, device: str) -> bool:
        return device.startswith("cuda") and torch.cuda.is_current_stream_capturing()


@final
class TorchSparse(Sparse[Tensor]):
    """Gradients of embeddings, in COO format."""

    def dense(self, x: Tensor) -> Tensor:
        return x.to_dense() if x.layout is not torch.strided else x

    def has_rows(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.layout is torch.sparse_coo and x.sparse_dim() == 1

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().coalesce()
        return x.indices()[0], x.values()

    def taken(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.detach().index_select(0, rows)

    def put_rows(self, x: Tensor, rows: Tensor, values: Tensor) -> None:
        with torch.no_grad():
            x.index_copy_(0, rows, values)


@final
class TorchLibrary(Library[Tensor, torch.dtype]):
    """PyTorch."""

    name = "torch"
    operations = OPERATIONS | {"every": every}
    memory = TorchMemory()
    stacks = TorchStacks()
    graphs = TorchGraphs()
    derivatives = Derivatives(operator.attrgetter("grad"), hessian_product, value_and_grad)
    scalars = TorchScalars()
    sparse = TorchSparse()
    shards = SHARDS

    # -- what an array is -----------------------------------------------------------------------------------

    def is_array_type(self, kind: type) -> bool:
        return issubclass(kind, Tensor)

    def is_trainable(self, x: Tensor) -> bool:
        """A parameter says itself whether it wants to be trained."""
        return x.requires_grad or not isinstance(x, torch.nn.Parameter)

    def type_name(self, dtype: torch.dtype) -> str:
        return _name(dtype)

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, name)

    def is_writable(self, x: Tensor) -> bool:
        if x.is_inference() and not torch.is_inference_mode_enabled():
            return False
        return x.numel() == 0 or not any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))

    def is_traced(self, x: object) -> bool:
        return is_traced(x)

    def traces(self, xs: Sequence[object], gradients: Sequence[Sequence[object]], *, inplace: bool) -> bool:
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
        return inside and any(
            isinstance(a, Tensor) and self.is_traced(a) for v in (xs, *gradients) for a in v
        )

    def is_opaque(self, x: Tensor) -> bool:
        return is_opaque(x)

    def device(self, x: Tensor) -> str:
        return device_of(x)

    def unready(self, x: Tensor) -> str:
        lazy = isinstance(x, torch.nn.parameter.UninitializedTensorMixin)
        return "is not initialized yet; call the module with an input before `setup`" if lazy else ""

    # -- making arrays --------------------------------------------------------------------------------------

    def full_like(self, x: Tensor, value: Scalar, dtype: torch.dtype | str) -> Tensor:
        """One number in the shape of `x`: for plain tensors it is kept once, as an expanded tensor."""
        kind = of_name(dtype)
        if self.is_opaque(x):
            return torch.full_like(x.detach(), value, dtype=kind)
        return torch.full((), value, dtype=kind, device=x.device).expand(x.shape)

    def copied(self, x: Tensor, dtype: torch.dtype | str) -> Tensor:
        return (x if self.is_traced(x) else x.detach()).to(of_name(dtype), copy=True)

    def cast(self, x: Tensor | Scalar, dtype: torch.dtype) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) else x

    def broadcast(self, x: Tensor | Scalar, shape: Shape) -> Tensor:
        try:
            return torch.broadcast_to(torch.as_tensor(x), shape)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def permuted(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x.permute(axes)

    def flattened(self, arrays: list[Tensor]) -> Tensor:
        return torch.cat([x.reshape(-1) for x in arrays])

    def pieces(self, flat: Tensor, runs: list[Run], *, copy: bool) -> list[Tensor]:
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

    def assign(self, target: Tensor, value: Tensor | Scalar) -> None:
        with torch.no_grad():
            target.copy_(beside(target, value)) if isinstance(value, Tensor) else target.fill_(value)

    def assign_many(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(targets), list(map(beside, targets, values)))

    def to_numpy(self, x: Tensor) -> HostArray:
        x = getattr(x, "to_local", lambda: x)().detach().cpu().resolve_conj().resolve_neg()
        return (x.float() if x.dtype is torch.bfloat16 else x).numpy()

    def to_host(self, x: Tensor | Scalar) -> Any:
        return getattr(x, "full_tensor", lambda: x)().item() if isinstance(x, Tensor) else x

    def stand_in(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def any_set(self, x: Tensor) -> bool:
        if x.device.type == "meta":
            return False
        expanded = x.numel() > 0 and all(s == 0 for s in x.stride())
        return bool((x[(0,) * x.ndim] != 0) if expanded else x.any())

    def seen(self, x: Tensor, *, read_only: bool) -> Tensor:
        return x.clone() if read_only else x

    def duplicate(self, x: Tensor | Scalar) -> Any:
        if isinstance(x, Tensor) and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return x.clone()  # it may outlive this mode
        return x.clone() if isinstance(x, Tensor) else x

    def rounded(self, old: Tensor, value: Tensor | HostArray | Scalar) -> Tensor:
        if isinstance(value, np.ndarray):
            value = of_host(value).to(old.device)
        if not isinstance(value, Tensor):
            return torch.full_like(old.detach(), value)
        part = None if spread(value) is not None else self.shards.part(old)
        return (value if part is None else part.whole(part.cut(value))).to(old.dtype).expand(old.shape)

    def like(self, x: Tensor, new: Tensor) -> Tensor:
        if isinstance(x, torch.nn.Parameter):
            return torch.nn.Parameter(new, x.requires_grad)
        return new.requires_grad_() if x.requires_grad and x.is_leaf else new

    def stored(self, x: Tensor, value: Tensor | Scalar, *, inplace: bool) -> Tensor:
        if inplace and self.is_writable(x):
            self.assign(x, value)
            return x
        new = torch.empty_like(x.detach())
        self.assign(new, value)
        return self.like(x, new)

    # -- scalars --------------------------------------------------------------------------------------------

    def stacked(self, values: Sequence[Tensor | Scalar]) -> Tensor:
        return torch.stack([lift(v) for v in values])


library = TorchLibrary()
