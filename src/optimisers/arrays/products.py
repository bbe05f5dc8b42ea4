"""How are stacks of matrices multiplied? By the library's own product, or by its operations."""

from collections.abc import Callable
from typing import Any

from optimisers.arrays.protocol import Library


def product(
    library: Library, a: Any, b: Any, target: Any, c: Any, alpha: Any, beta: Any, spare: Callable[[], Any]
) -> Any:
    """See `Stacks.product`, for every library."""
    if library.stacks.product is not None:
        return library.stacks.product(a, b, target, c, alpha, beta, spare)
    found = library.operations["matmul"](a, b)
    found = found if isinstance(alpha, float | int) and alpha == 1 else found * alpha
    if c is None:
        return found
    return found + (c if isinstance(beta, float | int) and beta == 1 else c * beta)
