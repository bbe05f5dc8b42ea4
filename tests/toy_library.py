"""An array library from outside, in one file: arrays that are none of NumPy, and what they answer."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, final

import numpy as np

import optimisers as opt
from optimisers.arrays.numpylike import operations
from optimisers.arrays.protocol import Library, Run, Scalar, Shape
from optimisers.arrays.registry import Plug
from optimisers.engines import interpret
from optimisers.engines.task import Step
from optimisers.state.group import Group

Host = np.ndarray[Any, np.dtype[Any]]


class Toy:
    """An array whose elements lie in `held`, which nobody but this file touches."""

    __array_ufunc__ = None
    __hash__ = object.__hash__

    def __init__(self, held: Any) -> None:
        self.held: Host = np.array(held)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("an array of toys is no array of NumPy")

    @property
    def shape(self) -> Shape:
        return self.held.shape

    @property
    def ndim(self) -> int:
        return self.held.ndim

    @property
    def dtype(self) -> Any:
        return self.held.dtype

    def __neg__(self) -> "Toy":
        return Toy(-self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __float__(self) -> float:
        return float(self.held)

    def __repr__(self) -> str:
        return f"Toy({self.held.tolist()})"


def _bare(x: Any) -> Any:
    return x.held if isinstance(x, Toy) else x


def _operator(function: Callable[..., Any], *, turned: bool) -> Any:
    def method(self: Toy, other: Any) -> Toy:
        a, b = (_bare(other), self.held) if turned else (self.held, _bare(other))
        return Toy(function(a, b))

    return method


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "lt", "le", "gt", "ge", "and", "or"):
    _function = getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    setattr(Toy, f"__{_name}__", _operator(_function, turned=False))
    setattr(Toy, f"__r{_name}__", _operator(_function, turned=True))


def _of_toys(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of NumPy's on toys; on numbers alone it stays one on numbers."""

    def run(*args: Any, **options: Any) -> Any:
        found = function(*map(_bare, args), **options)
        return Toy(found) if any(isinstance(a, Toy) for a in args) else found

    return run


OPERATIONS = {name: _of_toys(function) for name, function in operations(np).items()}
OPERATIONS["call"] = lambda function, *args: function(*args)


@final
class ToyLibrary(Library[Toy, np.dtype[Any]]):
    """What arrays of toys answer: the functions that have no default, and what is said of writing."""

    name = "toys"
    operations = OPERATIONS

    def is_array_type(self, kind: type) -> bool:
        return issubclass(kind, Toy)

    def type_name(self, dtype: np.dtype[Any]) -> str:
        return dtype.name

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(name)

    def full_like(self, x: Toy, value: Scalar, dtype: Any) -> Toy:
        return Toy(np.full(x.shape, value, dtype))

    def copied(self, x: Toy, dtype: Any) -> Toy:
        return Toy(x.held.astype(dtype))

    def cast(self, x: Toy | Scalar, dtype: np.dtype[Any]) -> Any:
        return Toy(np.asarray(_bare(x)).astype(dtype))

    def broadcast(self, x: Toy | Scalar, shape: Shape) -> Toy:
        return Toy(np.broadcast_to(_bare(x), shape))

    def permuted(self, x: Toy, axes: tuple[int, ...]) -> Toy:
        return Toy(x.held.transpose(axes))

    def flattened(self, arrays: list[Toy]) -> Toy:
        return Toy(np.concatenate([x.held.ravel() for x in arrays]))

    def pieces(self, flat: Toy, runs: list[Run], *, copy: bool) -> list[Toy]:
        out: list[Toy] = []
        for place, count, shape, dtype in runs:
            out += [Toy(part) for part in flat.held[place].astype(dtype).reshape(count, *shape)]
        return out

    def to_numpy(self, x: Toy) -> Host:
        return x.held

    def to_host(self, x: Toy | Scalar) -> Any:
        return x.held[()] if isinstance(x, Toy) else x

    def rounded(self, old: Toy, value: Toy | Scalar) -> Toy:
        return Toy(np.broadcast_to(_bare(value), old.shape).astype(old.dtype))

    def assign(self, target: Toy, value: Toy | Scalar) -> None:
        np.copyto(target.held, _bare(value), casting="unsafe")

    def number(self, value: Scalar, dtype: np.dtype[Any]) -> Any:
        return dtype.type(value)

    def stand_in(self, shape: Shape, dtype: np.dtype[Any]) -> Toy:
        return Toy(np.zeros(shape, dtype))


def _refusal(group: Group) -> str:
    return "" if group.kind.dtype == np.float32 else f"toys of {group.kind.dtype}"


def _begin(step: Step) -> None:
    began.append(step.leaves)
    interpret.ENGINE.begin(step)


began: list[int] = []
"""How many leaves each step of the engine of toys had."""

ENGINE = dataclasses.replace(interpret.ENGINE, name="toybox", refusal=_refusal, begin=_begin)
"""An engine from outside: the interpreter, for toys of float32 alone."""

BACKEND = opt.Backend("toys", (__name__,), ToyLibrary(), engines=(Plug("toybox", ENGINE),))
