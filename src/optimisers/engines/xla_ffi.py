"""How does compiled code read what XLA hands to it? The structures of its foreign function interface, by offset.

The interface is a stable one in C (`xla/ffi/api/c_api.h`, shipped with jaxlib). A handler made by Numba needs
no C compiler, but knows no structures: it reads and writes at addresses. Where every field lies is compared
with the header that is installed.
"""

import ctypes
import functools
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)

OFFSETS = {
    "XLA_FFI_CallFrame": {"extension_start": 8, "api": 16, "ctx": 24, "args": 40, "rets": 80, "attrs": 120},
    "XLA_FFI_Args": {"size": 16, "args": 32},
    "XLA_FFI_Rets": {"size": 16, "rets": 32},
    "XLA_FFI_Attrs": {"size": 16, "attrs": 40},
    "XLA_FFI_Array": {"dtype": 0, "size": 8, "data": 16},
    "XLA_FFI_Buffer": {"dtype": 16, "data": 24, "rank": 32, "dims": 40},
    "XLA_FFI_Api": {
        "struct_size": 0,
        "api_version": 16,
        "XLA_FFI_Error_Create": 48,
        "XLA_FFI_Error_Destroy": 64,
        "XLA_FFI_ThreadPool_Schedule": 136,
        "XLA_FFI_ThreadPool_NumThreads": 144,
    },
    "XLA_FFI_Api_Version": {"major_version": 16, "minor_version": 20},
    "XLA_FFI_Extension_Base": {"type": 8, "next": 16},
    "XLA_FFI_Metadata_Extension": {"extension_base": 0, "metadata": 24},
    "XLA_FFI_Metadata": {"api_version": 8, "traits": 32, "state_type_id": 40},
    "XLA_FFI_Error_Create_Args": {"struct_size": 0, "message": 16, "errc": 24},
    "XLA_FFI_Error_Destroy_Args": {"struct_size": 0, "error": 16},
    "XLA_FFI_ThreadPool_Schedule_Args": {"struct_size": 0, "ctx": 16, "task": 24, "data": 32},
    "XLA_FFI_ThreadPool_NumThreads_Args": {"struct_size": 0, "ctx": 16, "num_threads": 24},
}
"""Where the fields lie that `HANDLE` reads or writes."""

CONSTANTS = {"XLA_FFI_Extension_Metadata": 1, "XLA_FFI_API_MAJOR": 0}
"""Numbers of the header that `HANDLE` takes for granted."""


# -- the header ----------------------------------------------------------------------------------------------

WORDS = {"size_t": 8, "int64_t": 8, "int": 4, "int32_t": 4, "uint32_t": 4, "XLA_FFI_Handler_Traits": 4}
"""Sizes of the types of C that stand in the structures."""


class Header:
    """The structures in the text of a header."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        self.text = text
        found = re.findall(r"struct (\w+) \{([^{}]*)\}", text)
        self.bodies: dict[str, str] = dict(found)
        self.enums = set(re.findall(r"typedef enum \{[^{}]*\} (\w+);", text))

    def offsets(self, name: str) -> dict[str, int]:
        """Field -> offset, as a C compiler for 64 bits lays them out; raises KeyError for what is not
        known.
        """
        at, found = 0, dict[str, int]()
        for declared in self.bodies[name].split(";"):
            field = self.field(declared.strip())
            if field is not None:
                label, size, alignment = field
                at = -(-at // alignment) * alignment
                found[label] = at
                at += size
        found["end"] = at
        return found

    def field(self, declared: str) -> tuple[str, int, int] | None:
        """(name, size, alignment) of one field."""
        if not declared:
            return None
        macro = re.fullmatch(r"_XLA_FFI_API_STRUCT_FIELD\((\w+)\)", declared)
        if macro is not None:
            return macro[1], 8, 8
        called = re.search(r"\(\*(\w+)\)", declared)
        if called is not None:
            return called[1], 8, 8
        kind, label = declared.replace("*", "* ").rsplit(None, 1)
        if "*" in kind:
            return label, 8, 8
        if kind in self.enums or kind in WORDS:
            size = WORDS.get(kind, 4)
            return label, size, size
        size = self.offsets(kind)["end"]
        return label, -(-size // 8) * 8, 8

    def constant(self, name: str) -> int:
        """The value of a macro or of a name in an enumeration; raises KeyError if it is not there."""
        found = re.search(rf"\b{name}\b(?: =)? (\d+)", self.text)
        if found is None:
            raise KeyError(name)
        return int(found[1])


def agrees(text: str) -> bool:
    """Whether a header has the fields where `OFFSETS` has them."""
    header = Header(text)
    try:
        return all(header.constant(name) == value for name, value in CONSTANTS.items()) and all(
            header.offsets(struct)[field] == at
            for struct, fields in OFFSETS.items()
            for field, at in fields.items()
        )
    except (KeyError, ValueError):
        return False


def header(folder: str) -> str | None:
    """The text of the header below an include directory; None if none is shipped."""
    path = Path(folder) / "xla" / "ffi" / "api" / "c_api.h"
    return path.read_text() if path.is_file() else None


# -- intrinsics ----------------------------------------------------------------------------------------------


def _poke(bits: Any, number: Any) -> Any:
    @intrinsic
    def poke(_typing: Any, address: Any, value: Any) -> Any:
        def emit(context: Any, b: Any, __: Any, args: Any) -> Any:
            b.store(args[1], b.inttoptr(args[0], bits.as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64, number), emit

    return poke


poke64 = _poke(I64, types.int64)
poke32 = _poke(I32, types.int32)


def _pointer(number: Any) -> Any:
    @intrinsic
    def pointer(_typing: Any, address: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return b.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), emit

    return pointer


int64s = _pointer(types.int64)
float32s = _pointer(types.float32)
float64s = _pointer(types.float64)


@intrinsic
def add(_typing: Any, address: Any, value: Any) -> Any:
    """Raise the word at an address in one instant, seen by all threads; what it was before."""

    def emit(_: Any, b: Any, __: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def fence(_typing: Any) -> Any:
    """Let no thread see what comes later before what came earlier."""

    def emit(context: Any, b: Any, __: Any, ___: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call(_typing: Any, function: Any, one: Any, two: Any) -> Any:
    """Call the C function at an address with two words; those that take fewer do not look."""

    def emit(_: Any, b: Any, __: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I64, I64])
        return b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64), emit


def symbol(name: str) -> Any:
    """`symbol(name)()`: the address that `provide` gave to a name, looked up when compiled code is loaded, so
    that the code may be kept on disk.
    """

    @intrinsic
    def address(_typing: Any) -> Any:
        def emit(_: Any, b: Any, __: Any, ___: Any) -> Any:
            found = b.module.globals.get(name)
            if found is None:
                found = ir.GlobalVariable(b.module, I8, name)
            return b.ptrtoint(found, I64)

        return types.int64(), emit

    return address


def provide(name: str, address: int) -> None:
    """Give a name to an address in this process."""
    llvmlite.binding.add_symbol(name, address)


MESSAGE = ctypes.create_string_buffer(b"a kernel of optimisers found no memory, or another interface")


@functools.cache
def provide_system() -> None:
    """Give names to what handlers need of the system; raises OSError where that is not known."""
    if os.name != "posix":
        raise OSError("handlers have been tried on systems with sched_yield only")
    c = ctypes.CDLL(None)
    for name in ("malloc", "free", "sched_yield"):
        provide(f"optimisers_{name}", ctypes.cast(getattr(c, name), ctypes.c_void_p).value or 0)
    provide("optimisers_message", ctypes.addressof(MESSAGE))


@functools.cache
def edition() -> str:
    """Tells compiled handlers, and calls to them that were kept, apart from those of another form."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


# -- what is compiled ----------------------------------------------------------------------------------------

# The plan, an attribute of a call: one array of int64, these words first.
COLUMNS, LEAVES, BOUNDS, CHUNKS, ROWS, SCALARS, WIDE, INPUTS, SUMS, WIDE_SUMS, HELPERS, PLAN = range(12)
"""Sizes of the tables; whether the numbers come in float64; how many inputs; how many sums, and whether they go
in float64; how many threads may help. After these: places, row, spans, chunks, kinds of the sums.
"""

# The block of a call in flight, in words. Late threads look at it, and at nothing else.
COUNTER, INSIDE, REFERENCES, SPANS, SPAN_BOUNDS, TABLE, ROW, PARTIAL, WANTED, SCRATCH, BLOCK = (
    *range(9),
    16,
    24,
)
"""The next span; how many threads are in the kernel; how many still know the block; addresses of tables; the
plan. Then room for arguments, and the tables.
"""


HANDLE = '''"""Runs a kernel inside a computation of XLA: finds the arrays, shares out the spans, gathers the sums."""
import math

from numba import carray, cfunc

from optimisers.engines.support import peek32, peek64
from optimisers.engines.xla_ffi import (
    add, call, fence, float32s, float64s, int64s, poke32, poke64, symbol,
    COLUMNS, LEAVES, BOUNDS, CHUNKS, ROWS, SCALARS, WIDE, INPUTS, SUMS, WIDE_SUMS, HELPERS, PLAN,
    INSIDE, REFERENCES, SPANS, SPAN_BOUNDS, TABLE, ROW, PARTIAL, WANTED, SCRATCH, BLOCK,
)

# form {edition}
malloc, free = symbol("optimisers_malloc"), symbol("optimisers_free")
sched_yield, message = symbol("optimisers_sched_yield"), symbol("optimisers_message")


@cfunc("i8(i8, i8)", cache=True)
def handle(frame, task):
    api = peek64(frame + 16)
    extension = peek64(frame + 8)
    if extension != 0 and peek32(extension + 8) == 1:  # XLA asks for which version this was written
        about = peek64(extension + 24)
        poke32(about + 24, 0)
        poke32(about + 28, {minor})
        poke32(about + 32, 0)
        poke64(about + 40, 0)
        return 0

    fits = peek64(frame) >= 168 and peek64(frame + 40) >= 40 and peek64(frame + 80) >= 40
    fits = fits and peek64(frame + 120) >= 48 and peek64(api) >= 152 and peek32(api + 32) == 0
    fits = fits and peek64(frame + 136) == 1
    at = peek64(peek64(peek64(frame + 160)) + 16) if fits else 0
    n = carray(int64s(at), PLAN)
    words = 0
    if fits:
        words = BLOCK + n[COLUMNS] * n[LEAVES] + n[ROWS] * n[SCALARS] + n[SUMS] * n[CHUNKS]
    block = call(malloc(), 8 * words, 0) if fits else 0
    if block == 0:
        error = carray(int64s(at), 4)
        with_message(api)
    ctx, args, rets = peek64(frame + 24), peek64(frame + 72), peek64(frame + 112)
    return 0
'''
