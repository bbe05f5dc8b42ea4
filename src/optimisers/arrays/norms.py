"""How long is an array? Said once for all libraries, with the operations that they have anyway."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optimisers.arrays.protocol import Array, Scalar

Axis = int | tuple[int, ...] | None


def norm2(
    operations: Mapping[str, Callable[..., Any]],
    least: Callable[[Any], float],
    still: Callable[[Any], Any] = lambda x: x,
) -> Callable[..., Any]:
    """The operation `norm2` of a library: squares are taken of elements over the largest one, so that none
    overflows and not all vanish. `least` gives the least normal number of an array's type, `still` a value
    that is not differentiated: the scale cancels.
    """

    def reduced(x: Array | Scalar, axis: Axis = None, keepdims: bool = False) -> Any:
        maximum, minimum, where = operations["maximum"], operations["minimum"], operations["where"]
        scale: Any = 1
        if 0 not in np.shape(x):
            # Of all elements it is one number, which a distributed array takes as it is.
            wide = keepdims or axis is not None
            top = still(operations["max"](operations["abs"](x), axis=axis, keepdims=wide))
            edge = 4 * least(top)  # a compiler may multiply by 1 / scale, which must be a number too
            scale = where((top > 0) & (top < math.inf), minimum(maximum(top, edge), 1 / edge), 1)
        squares = operations["sum"](operations["abs2"](x / scale), axis=axis, keepdims=keepdims)
        if np.shape(scale) != np.shape(squares) and np.shape(scale):
            scale = operations["reshape"](scale, np.shape(squares))
        return operations["sqrt"](squares) * scale

    return reduced
