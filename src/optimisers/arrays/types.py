"""What does an element type hold? Said of its name, as NumPy or ml_dtypes calls it, whatever the library."""

import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from optimisers.arrays.protocol import D, Library


class Numbers(NamedTuple):
    """What an element is."""

    kind: str
    """bool, int, uint, float, bfloat or complex; empty for what is no number."""
    bits: int


@functools.cache
def numbers_of(name: str) -> Numbers:
    """What the elements of a type are."""
    found = re.fullmatch(r"(?:byte-swapped )?(bool|u?int|b?float|complex)(\d*)\w*", name)
    return Numbers(found[1], int(found[2] or 8)) if found else Numbers("", 0)


def is_inexact(name: str) -> bool:
    """Whether the elements are floating point or complex numbers of at least two bytes."""
    kind, bits = numbers_of(name)
    return kind in ("float", "bfloat", "complex") and bits >= 16


def is_number(name: str) -> bool:
    """Whether the elements are numbers or truth values at all."""
    return numbers_of(name).kind != ""


def is_complex(name: str) -> bool:
    """Whether the elements are complex numbers."""
    return numbers_of(name).kind == "complex"


def bytes_of(name: str) -> int:
    """The bytes of an element."""
    return numbers_of(name).bits // 8


@functools.cache
def real_of(library: Library[Any, D], dtype: D) -> D:
    """The type of the real part."""
    kind, bits = numbers_of(library.type_name(dtype))
    return library.dtype(f"float{bits // 2}") if kind == "complex" else dtype


def arithmetic(library: Library[Any, D], dtype: D) -> D:
    """The type in which the maths is done: that of the parameter, but float32 at least."""
    kind, bits = numbers_of(library.type_name(dtype))
    if kind == "complex":
        return library.dtype(f"complex{max(64, bits)}")
    return library.dtype("float32" if bits < 32 else f"{kind}{bits}")


def promoted(library: Library[Any, D], dtype: D, others: Iterable[str]) -> D:
    """The type to which one of the arithmetic and floating point types of these names promote, real or
    complex as it is.
    """
    own = numbers_of(library.type_name(dtype))
    known = [own, *(n for n in map(numbers_of, others) if n.kind in ("float", "complex"))]
    bits = max(n.bits // 2 if n.kind == "complex" else n.bits for n in known)
    return library.dtype(f"complex{2 * bits}" if own.kind == "complex" else f"float{bits}")
