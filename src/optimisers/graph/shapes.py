"""Which shape has the value of an operation? That which follows from the shapes of what it is given."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optimisers.arrays.protocol import Shape
from optimisers.ops.dispatch import OPERATIONS

Options = Mapping[str, Any]


def shape_of(op: str, options: Options, args: Sequence[Shape]) -> Any:
    """The shape of what an operation gives for arguments of these shapes, those of numbers being (); None
    where only the array library knows, or refuses. Of several results it is a tuple of shapes.
    """
    if op in _SHAPES:
        return _SHAPES[op](options, *args)
    family = OPERATIONS[op].family if op in OPERATIONS else ""
    if family == "reduce":
        return _reduced(args[0], **options)
    return broadcast(args) if family == "elementwise" or op == "identity" else None


def exchanged(shape: Shape) -> Shape | None:
    """The shape with its last two axes exchanged."""
    if len(shape) < 2:
        return None
    *outer, rows, columns = shape
    return (*outer, columns, rows)


def broadcast(shapes: Sequence[Shape]) -> Shape | None:
    """The shape of an operation element by element; None if the shapes do not fit."""
    out: list[int] = []
    for k in range(1, max(len(s) for s in shapes) + 1):
        sizes = {s[-k] for s in shapes if len(s) >= k} - {1}
        if len(sizes) > 1:
            return None
        out.append(sizes.pop() if sizes else 1)
    return tuple(reversed(out))


def _multiplied(_: Options, a: Shape, b: Shape) -> Shape | None:
    """The shape of a product of matrices; None where the operands are no two matrices that fit."""
    if min(len(a), len(b)) < 2 or a[-1] != b[-2]:
        return None
    outer = broadcast([a[:-2], b[:-2]]) if len(a) + len(b) > 4 else ()
    return None if outer is None else (*outer, a[-2], b[-1])


def _reshaped(options: Options, a: Shape) -> Shape | None:
    wanted = options["shape"]
    shape = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    size, known = math.prod(a), math.prod(n for n in shape if n >= 0)
    if -1 in shape and known:
        shape = tuple(size // known if n < 0 else n for n in shape)
    return shape if math.prod(shape) == size and min(shape, default=0) >= 0 else None


def _reduced(shape: Shape, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Shape | None:
    """The shape of a reduction along axes; None where they are not there."""
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    if not all(-len(shape) <= a < len(shape) for a in axes):
        return None
    gone = {a % len(shape) for a in axes}
    return tuple(1 if i in gone else n for i, n in enumerate(shape) if keepdims or i not in gone)


def _square(_: Options, a: Shape) -> Shape | None:
    return a if len(a) >= 2 and a[-1] == a[-2] else None


def _eigh(options: Options, a: Shape) -> Any:
    return None if _square(options, a) is None else (a[:-1], a)


def _thin(a: Shape) -> tuple[Shape, Shape]:
    """The shapes of two factors of a matrix, as thin as they can be."""
    least = min(a[-2:])
    return (*a[:-1], least), (*a[:-2], least, a[-1])


def _qr(_: Options, a: Shape) -> Any:
    return _thin(a) if len(a) >= 2 else None


def _svd(_: Options, a: Shape) -> Any:
    if len(a) < 2:
        return None
    left, right = _thin(a)
    return left, left[:-2] + left[-1:], right


def _solved(options: Options, a: Shape, b: Shape) -> Shape | None:
    return None if _square(options, a) is None else _multiplied(options, a, b)


def _taken(options: Options, x: Shape, index: Shape) -> Shape | None:
    axis = options.get("axis", -1)
    if not -len(x) <= axis < len(x) or len(index) < 1 or axis % len(x) < len(index) - 1:
        return None
    at = axis % len(x)
    return (*x[:at], index[-1], *x[at + 1 :])


_SHAPES: dict[str, Callable[..., Any]] = {
    "transpose": lambda _, a: exchanged(a),
    "matmul": _multiplied,
    "reshape": _reshaped,
    "eigh": _eigh,
    "qr": _qr,
    "svd": _svd,
    "cholesky": _square,
    "solve_triangular": _solved,
    "item": lambda options, a: a[options["index"]],
    "triu": lambda _, a: a if len(a) >= 2 else None,
    "diagonal": lambda _, a: (*a[:-2], min(a[-2:])) if len(a) >= 2 else None,
    "argsort": lambda options, a: a if -len(a) <= options.get("axis", -1) < len(a) else None,
    "take": _taken,
    "every": lambda _, __, *sides: sides[len(sides) // 2 :],
    "zeros": lambda options: options["shape"],
    "eye": lambda options: (options["n"], options["n"]),
}

TAKES = {
    "transpose": "two axes and more",
    "reshape": "a shape of as many elements",
    "eigh": "square matrices",
    "qr": "two axes and more",
    "svd": "two axes and more",
    "cholesky": "square matrices",
    "solve_triangular": "square matrices, and others of two axes and as many rows",
    "triu": "two axes and more",
    "diagonal": "two axes and more",
    "argsort": "an axis that is there",
    "take": "an axis that is there, and places along one axis",
}
"""What an operation takes, for messages."""


OPERANDS = {"matmul": 2, "solve_triangular": 2, "take": 2}
"""How many arrays an operation of the array library takes; 1 unless it stands here."""

SAID = {"reshape": ("shape",), "triu": ("k",), "argsort": ("axis",), "take": ("axis",)}
"""What may stand after them."""

RESULTS = {"eigh": ("real", "same"), "qr": ("same", "same"), "svd": ("same", "real", "same")}
"""The types of several results."""


def elements(shape: Any) -> int:
    """How many elements an array has, or several results of an operation."""
    return sum(map(elements, shape)) if shape and isinstance(shape[0], tuple) else math.prod(shape)
