"""How do elements lie in memory? Asked of shapes and strides alone, whatever the library."""

Axes = tuple[int, ...]


def contiguous_strides(shape: Axes) -> Axes:
    """The strides, in elements, of an array whose last axis is the fastest."""
    out: list[int] = []
    step = 1
    for n in reversed(shape):
        out.append(step)
        step *= max(n, 1)
    return tuple(reversed(out))


def is_contiguous(shape: Axes, strides: Axes, itemsize: int) -> bool:
    """Whether the last axis is the fastest and nothing lies between the elements; strides in bytes."""
    flat = zip(shape, strides, contiguous_strides(shape), strict=True)
    return 0 in shape or all(n == 1 or s == itemsize * t for n, s, t in flat)


def permutation(shape: Axes, strides: Axes, other_shape: Axes, other_strides: Axes) -> Axes | None:
    """The order of the axes of one view that gives another of the same memory; None if they are equal."""
    if shape == other_shape and strides == other_strides:
        return None
    left = list(range(len(shape)))
    found: list[int] = []
    for stride, n in zip(other_strides, other_shape, strict=True):
        axis = next(a for a in left if shape[a] == n and (n == 1 or strides[a] == stride))
        left.remove(axis)
        found.append(axis)
    return tuple(found)


def dense_like(shape: Axes, strides: Axes) -> Axes:
    """The strides, in elements, of a dense array whose axes lie in the same order as those of another."""
    order = sorted(range(len(shape)), key=lambda a: -abs(strides[a]))
    dense = contiguous_strides(tuple(shape[a] for a in order))
    return tuple(dense[order.index(a)] for a in range(len(shape)))


def overlaps_itself(shape: Axes, strides: Axes) -> bool:
    """Whether two elements share one place, as in a broadcast view."""
    return 0 not in shape and any(s == 0 and n > 1 for s, n in zip(strides, shape, strict=True))


def axes_in_memory(shape: Axes, strides: Axes) -> tuple[tuple[int, int], ...]:
    """The sorted (stride, size) of the axes: equal for transposed views of one memory."""
    return tuple(sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1))
