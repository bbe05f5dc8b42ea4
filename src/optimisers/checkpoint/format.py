"""What is in a file? The format of safetensors: eight bytes with the length of a header, the header in JSON,
the elements. https://huggingface.co/docs/safetensors, "Format".

It is written here rather than by that package: it is a page of code, users of NumPy alone need nothing else,
arrays are streamed one by one, and what is damaged is named. A checksum over header and elements stands first
in the header, where it can be filled in when the last element was written.
"""

import json
import math
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from optimisers.checkpoint.threads import SHARE, checksum_of, joined, read_into
from optimisers.errors import BadFile

CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
}
"""Element types as NumPy or ml_dtypes calls them -> as the format does."""

NAMES = {code: name for name, code in CODES.items()}

PAIRS = "complex128"
"""The one type that the format lacks: written as float64 with a last axis of two, and noted in the header."""

LONGEST = 100_000_000
"""Bytes of a header, at most: what the package itself reads."""

START = b'{"__metadata__":{"checksum":"crc32:'

BLANK = "crc32:00000000"


class Form(NamedTuple):
    """What an array is, without its elements."""

    type: str
    """The element type, as NumPy or ml_dtypes calls it."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * width(self.type)

    def __str__(self) -> str:
        return f"{self.type}, {self.shape}"


class Header(NamedTuple):
    """What is said in a file about its elements."""

    about: dict[str, str]
    forms: dict[str, Form]
    offsets: dict[str, int]
    """The first byte of each array in the file."""


def width(kind: str) -> int:
    """Bytes of an element."""
    return 2 if kind == "bfloat16" else np.dtype(kind).itemsize


def ordered(forms: Mapping[str, Form]) -> list[str]:
    """Names in the order in which they are written: wide elements first, so that all are aligned."""
    return sorted(forms, key=lambda name: -width(forms[name].type))


def encoded(forms: Mapping[str, Form], about: Mapping[str, str]) -> bytes:
    """The bytes before the elements, of arrays in this order; the checksum is left blank."""
    pairs = [name for name, form in forms.items() if form.type == PAIRS]
    known = {"checksum": BLANK, **about, **({"pairs": json.dumps(pairs)} if pairs else {})}
    entries: dict[str, Any] = {"__metadata__": known}
    at = 0
    for name, form in forms.items():
        code, shape = CODES.get(form.type, "F64"), [*form.shape]
        if form.type == PAIRS:
            shape.append(2)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + form.bytes]}
        at += form.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(file: BinaryIO, forms: Mapping[str, Form], about: Mapping[str, str], data: Iterable[Any]) -> None:
    """Write a whole file; `data` are the arrays in the order of `forms`, as `elements` gives them. While an
    array is written, another thread takes its checksum.
    """
    head = encoded(forms, about)
    checksum = zlib.crc32(head)
    file.write(head)
    with ThreadPoolExecutor(1) as beside:
        for array in data:
            part = memoryview(array.reshape(-1).view(np.uint8))
            if part.nbytes < SHARE:
                checksum = zlib.crc32(part, checksum)
                file.write(part)
                continue
            own = beside.submit(zlib.crc32, part)
            file.write(part)
            checksum = joined(checksum, own.result(), part.nbytes)
    file.seek(8 + len(START))
    file.write(f"{checksum:08x}".encode())


def elements(host: Any, kind: str) -> Any:
    """An array of NumPy as it is written: its elements one after another, the smallest byte first; bfloat16
    may come as its bits, or in single precision.
    """
    if kind == "bfloat16":
        if host.dtype.itemsize == 2:
            return np.ascontiguousarray(host).view(np.uint16)
        wide = np.ascontiguousarray(host, np.float32)  # its upper half is the number in bfloat16
        return np.ascontiguousarray(wide.reshape(-1).view(np.uint16)[1::2])
    return np.ascontiguousarray(host, host.dtype.newbyteorder("<"))


def read(file: FileIO, header: Header, name: str) -> Any:
    """An array of a file, as one of NumPy; bfloat16 as its bits, in whole numbers."""
    form = header.forms[name]
    found = np.empty(form.shape, "uint16" if form.type == "bfloat16" else form.type)
    fill(file, header, name, found)
    return found


def widened(bits: Any) -> Any:
    """Numbers in bfloat16, of their bits: in the type of ml_dtypes where that was imported, as who has arrays
    of NumPy in it has done, else in single precision.
    """
    if (known := sys.modules.get("ml_dtypes")) is not None:
        return bits.view(known.bfloat16)
    wide = np.zeros((*bits.shape, 2), np.uint16)
    wide[..., 1] = bits
    return wide.view(np.float32).reshape(bits.shape)


def fill(file: FileIO, header: Header, name: str, target: Any) -> None:
    """Read the elements of an array into memory that is as large; raises BadFile where there are too few."""
    if target.size:
        read_into(file, memoryview(target.reshape(-1).view(np.uint8)), header.offsets[name])


# -- what is not trusted -------------------------------------------------------------------------------------


def checked(file: FileIO) -> Header:
    """The header of a file, all of which was looked through; raises BadFile for what is damaged, or is none
    of ours.
    """
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if size < 8 or length > min(LONGEST, size - 8):
        raise BadFile("it is no file in the format of safetensors, or one that was cut")
    head = file.read(length)
    noted = re.match(re.escape(START) + rb"([0-9a-f]{8})\"", head)
    if noted is None:
        raise BadFile(
            "it was not written by save, or was damaged; if it is another tool's, read it with safetensors "
            "and write opt.from_arrays(state, arrays)"
        )
    checksum = zlib.crc32(first + START + b"00000000" + head[noted.end(1) :])
    checksum = checksum_of(file, 8 + length, size, checksum)
    if f"{checksum:08x}".encode() != noted[1]:
        raise BadFile("its checksum is that of other bytes: it was damaged, or changed by hand")
    return parsed(head, size - 8 - length)


def parsed(head: bytes, size: int) -> Header:
    """A header whose checksum is right, before `size` bytes of elements; raises BadFile for one that says
    what cannot be.
    """
    try:
        said: Any = json.loads(head, object_pairs_hook=_once)
        about = said.pop("__metadata__")
        pairs = set(json.loads(about.get("pairs", "[]")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadFile(f"its header cannot be read: {error}") from error
    if not all(isinstance(text, str) for text in about.values()):
        raise BadFile("its header has metadata that is no text")
    found: dict[str, Form] = {}
    offsets: dict[str, int] = {}
    for name, entry in said.items():
        start, end = _span(name, entry)
        shape = tuple(entry["shape"])
        found[name] = Form(NAMES[entry["dtype"]], shape)
        if name in pairs:
            if found[name].type != "float64" or shape[-1:] != (2,):
                raise BadFile(f"{name!r} is noted as complex and is {found[name]}")
            found[name] = Form(PAIRS, shape[:-1])
        if end - start != found[name].bytes:
            raise BadFile(f"{name!r} is {found[name]} and has {end - start} bytes")
        offsets[name] = start
    at = 0
    for name in sorted(found, key=lambda n: (offsets[n], found[n].bytes)):
        if offsets[name] != at:
            raise BadFile(f"{name!r} begins at byte {offsets[name]}, where byte {at} comes")
        at += found[name].bytes
    if at != size:
        raise BadFile(f"its header speaks of {at} bytes, and there are {size}")
    return Header(about, found, {name: 8 + len(head) + start for name, start in offsets.items()})


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of JSON; raises ValueError where a key comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _span(name: str, entry: Any) -> tuple[int, int]:
    """(first byte, byte behind the last) of an array; raises BadFile for an entry of another form."""
    known = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
    known = known and isinstance(entry["dtype"], str) and isinstance(entry["shape"], list)
    if not known or entry["dtype"] not in NAMES:
        raise BadFile(f"its header has {str(entry)[:80]} under {name!r}, which is no array")
    numbers = [*entry["shape"], *(entry["data_offsets"] if isinstance(entry["data_offsets"], list) else ())]
    if len(numbers) != len(entry["shape"]) + 2 or not all(type(n) is int and n >= 0 for n in numbers):
        raise BadFile(f"its header has {str(entry)[:80]} under {name!r}, which is no array")
    return numbers[-2], numbers[-1]
