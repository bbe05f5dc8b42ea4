"""How does compiled code read what XLA hands to it? The structures of its foreign functions, by offset.

The interface is a stable one in C (`xla/ffi/api/c_api.h`, shipped with jaxlib). A handler made by Numba needs
no C compiler, but knows no structures: it reads and writes at addresses. Where every field lies is compared
with the header that is installed.
"""

import ctypes
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from optimisers.engines.cpu import machine

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)

OFFSETS = {
    "XLA_FFI_CallFrame": {"extension_start": 8, "api": 16, "ctx": 24, "args": 40, "rets": 80, "attrs": 120},
    "XLA_FFI_Args": {"size": 16, "args": 32},
    "XLA_FFI_Rets": {"size": 16, "rets": 32},
    "XLA_FFI_Attrs": {"size": 16, "attrs": 40},
    "XLA_FFI_Array": {"size": 8, "data": 16},
    "XLA_FFI_Buffer": {"data": 24},
    "XLA_FFI_Api": {
        "struct_size": 0,
        "api_version": 16,
        "XLA_FFI_Error_Create": 48,
        "XLA_FFI_Error_Destroy": 64,
        "XLA_FFI_ThreadPool_Schedule": 136,
        "XLA_FFI_ThreadPool_NumThreads": 144,
    },
    "XLA_FFI_Api_Version": {"major_version": 16, "minor_version": 20},
    "XLA_FFI_InternalExtension": {"type": 8},
    "XLA_FFI_Metadata_Extension": {"extension_base": 0, "metadata": 24},
    "XLA_FFI_Metadata": {"api_version": 8, "traits": 32, "state_type_id": 40},
    "XLA_FFI_Error_Create_Args": {"struct_size": 0, "message": 16, "errc": 24},
    "XLA_FFI_Error_Destroy_Args": {"struct_size": 0, "error": 16},
    "XLA_FFI_ThreadPool_Schedule_Args": {"struct_size": 0, "ctx": 16, "task": 24, "data": 32},
    "XLA_FFI_ThreadPool_NumThreads_Args": {"struct_size": 0, "ctx": 16, "num_threads": 24},
}
"""Where the fields lie that `HANDLE` reads or writes: the same numbers as there."""

FORMER = {"XLA_FFI_InternalExtension": "XLA_FFI_Extension_Base"}
"""What structures were called by headers before JAX 0.11."""

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

    def named(self, name: str) -> str:
        """What the header calls a structure."""
        return name if name in self.bodies else FORMER.get(name, name)

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
            header.offsets(header.named(struct))[field] == at
            for struct, fields in OFFSETS.items()
            for field, at in fields.items()
        )
    except (KeyError, ValueError):
        return False


# -- intrinsics ----------------------------------------------------------------------------------------------


def _poke(bits: ir.Type, number: Any) -> Any:
    @intrinsic
    def poke(_typing: object, _address: object, _value: object) -> Any:
        def emit(context: Any, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
            b.store(args[1], b.inttoptr(args[0], bits.as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64, number), emit

    return poke


poke64 = _poke(I64, types.int64)
poke32 = _poke(I32, types.int32)


def _pointer(number: object) -> Any:
    @intrinsic
    def pointer(_typing: object, _address: object) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return b.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.int64), emit

    return pointer


int64s = _pointer(types.int64)
float32s = _pointer(types.float32)
float64s = _pointer(types.float64)


@intrinsic
def add(_typing: object, _address: object, _value: object) -> Any:
    """Raise the word at an address in one instant, seen by all threads; what it was before."""

    def emit(_: object, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def fence(_typing: object) -> Any:
    """Let no thread see what comes later before what came earlier."""

    def emit(context: Any, b: ir.IRBuilder, __: object, ___: object) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call(_typing: object, _function: object, _one: object, _two: object) -> Any:
    """Call the C function at an address with two words; those that take fewer do not look."""

    def emit(_: object, b: ir.IRBuilder, __: object, args: Sequence[ir.Value]) -> Any:
        kind = ir.FunctionType(I64, [I64, I64])
        return b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64), emit


def symbol(name: str) -> Any:
    """`symbol(name)()`: the address that `provide` gave to a name, looked up when compiled code is loaded, so
    that the code may be kept on disk.
    """

    @intrinsic
    def address(_typing: object) -> Any:
        def emit(_: object, b: ir.IRBuilder, __: object, ___: object) -> Any:
            found = b.module.globals.get(name)
            if found is None:
                found = ir.GlobalVariable(b.module, I8, name)
            return b.ptrtoint(found, I64)

        return types.int64(), emit

    return address


def provide(name: str, address: int) -> None:
    """Give a name to an address in this process."""
    llvmlite.binding.add_symbol(name, address)


MESSAGE = ctypes.create_string_buffer(
    b"a kernel of optimisers found no memory, or an unknown form of its call"
)
FAILURE = (ctypes.c_int64 * 4)(32, 0, ctypes.addressof(MESSAGE), 13)
"""`XLA_FFI_Error_Create_Args`: size, extension, message, code (internal error)."""


@functools.cache
def provide_system() -> None:
    """Give names to what handlers need of the system; raises OSError where that is not known."""
    if os.name != "posix":
        raise OSError("handlers have been tried where there is sched_yield only")
    c = ctypes.CDLL(None)
    for name in ("malloc", "free", "sched_yield"):
        provide(f"optimisers_{name}", ctypes.cast(getattr(c, name), ctypes.c_void_p).value or 0)
    provide("optimisers_failure", ctypes.addressof(FAILURE))


@functools.cache
def edition() -> str:
    """Tells compiled handlers, and calls to them that were kept, apart from those of another form."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


# -- what is compiled ----------------------------------------------------------------------------------------

COLUMNS, LEAVES, BOUNDS, CHUNKS, ROWS, SCALARS, WIDE, INPUTS, SUMS, WIDE_SUMS, HELPERS, PLAN = range(12)
"""The plan of a call, its attribute: one array of int64, of which these words come first.

Sizes of the tables; whether the numbers are float64; how many inputs; how many sums, and whether float64; how
many threads may help. After these: places, row, spans, chunks, kinds of the sums.
"""

COUNTER, INSIDE, REFERENCES, SPANS, CHUNK, ADDRESSES, TABLE, ROW, PARTIAL, KERNEL, SIZES = range(11)
SCRATCH = SIZES + PLAN
BLOCK = SCRATCH + 8
"""The block of a call in flight, in words; threads that come late look at it and at nothing else.

The next span to claim; how many threads are in the kernel; how many still know the block; where the tables
lie, and the kernel; the first words of the plan. Then room for arguments, and the tables that are made for
this call.
"""

HANDLE = '''"""Runs a kernel inside a computation of XLA: finds the arrays, shares work, gathers sums."""
import math

from numba import carray, cfunc

from optimisers.engines.cpu.intrinsics import peek32, peek64, run
from optimisers.engines.xla.c_api import add, call, fence, float32s, float64s, int64s, poke32, poke64, provide
from optimisers.engines.xla.c_api import symbol
from optimisers.engines.xla.c_api import (
    ADDRESSES, BLOCK, BOUNDS, CHUNK, CHUNKS, COLUMNS, COUNTER, HELPERS, INPUTS, INSIDE, KERNEL, LEAVES,
    PARTIAL, PLAN, REFERENCES, ROW, ROWS, SCALARS, SCRATCH, SIZES, SPANS, SUMS, TABLE, WIDE, WIDE_SUMS,
)

# form {edition}
malloc, free = symbol("optimisers_malloc"), symbol("optimisers_free")
sched_yield, failure = symbol("optimisers_sched_yield"), symbol("optimisers_failure")
task_of_all = symbol("optimisers_task")


@cfunc("i8(i8)", cache=True)
def task(block):
    add(block + 8 * INSIDE, 1)
    fence()
    at = carray(int64s(block), SIZES)
    n = carray(int64s(block + 8 * SIZES), PLAN)
    run(at[KERNEL], block, at[SPANS], n[BOUNDS], at[CHUNK], at[ADDRESSES], n[LEAVES], at[TABLE], n[SCALARS],
        at[ROW], at[PARTIAL], n[CHUNKS])
    add(block + 8 * INSIDE, -1)
    if add(block + 8 * REFERENCES, -1) == 1:
        call(free(), block, 0)
    return 0


provide("optimisers_task", task.address)


@cfunc("i8(i8, i8)", cache=True)
def handle(frame, kernel):
    extension = peek64(frame + 8)
    if extension != 0 and peek32(extension + 8) == 1:  # XLA asks for which version this was made
        about = peek64(extension + 24)
        poke32(about + 24, 0)
        poke32(about + 28, {minor})
        poke32(about + 32, 0)
        poke64(about + 40, 0)
        return 0

    api, ctx = peek64(frame + 16), peek64(frame + 24)
    inputs, results = peek64(frame + 72), peek64(frame + 112)
    block, plan = 0, 0
    if peek64(frame) >= 168 and peek64(api) >= 152 and peek32(api + 32) == 0 and peek64(frame + 136) == 1:
        attribute = peek64(peek64(frame + 160))
        plan = peek64(attribute + 16)
        n = carray(int64s(plan), PLAN)
        if peek64(attribute + 8) >= PLAN and peek64(frame + 56) == 1 + n[INPUTS]:
            tables = n[COLUMNS] * n[LEAVES] + n[ROWS] * n[SCALARS] + n[SUMS] * n[CHUNKS]
            block = call(malloc(), 8 * (BLOCK + tables), 0)
    if block == 0:
        return call(peek64(api + 48), failure(), 0)

    n, at = carray(int64s(plan), PLAN), carray(int64s(block), BLOCK)
    places = plan + 8 * PLAN
    at[COUNTER] = 0
    at[KERNEL] = kernel
    task = task_of_all()
    at[INSIDE] = 0
    at[ROW] = places + 16 * n[COLUMNS] * n[LEAVES]
    at[SPANS] = at[ROW] + 8 * n[LEAVES]
    at[CHUNK] = at[SPANS] + 8 * n[BOUNDS]
    at[ADDRESSES] = block + 8 * BLOCK
    at[TABLE] = at[ADDRESSES] + 8 * n[COLUMNS] * n[LEAVES]
    at[PARTIAL] = at[TABLE] + 8 * n[ROWS] * n[SCALARS]
    for i in range(PLAN):
        at[SIZES + i] = n[i]

    address = carray(int64s(at[ADDRESSES]), n[COLUMNS] * n[LEAVES])
    for i in range(n[COLUMNS] * n[LEAVES]):
        place = carray(int64s(places + 16 * i), 2)
        where = inputs + 8 * (1 + place[0]) if place[0] < n[INPUTS] else results + 8 * (place[0] - n[INPUTS])
        address[i] = peek64(peek64(where) + 24) + place[1]

    numbers = peek64(peek64(inputs) + 24)
    if n[WIDE]:
        at[TABLE] = numbers
    else:
        narrow = carray(float32s(numbers), n[ROWS] * n[SCALARS])
        table = carray(float64s(at[TABLE]), n[ROWS] * n[SCALARS])
        for i in range(n[ROWS] * n[SCALARS]):
            table[i] = narrow[i]

    scratch = block + 8 * SCRATCH
    args, other = carray(int64s(scratch), 5), carray(int64s(scratch + 40), 3)
    helpers = n[HELPERS]
    if helpers > 0:
        args[0], args[1], args[2], args[3], other[0] = 32, 0, ctx, scratch + 40, 0
        error = call(peek64(api + 144), scratch, 0)
        helpers = min(helpers, other[0] - 1)
        if error != 0:
            helpers = 0
            other[0], other[1], other[2] = 24, 0, error
            call(peek64(api + 64), scratch + 40, 0)
    helpers = max(helpers, 0)
    at[REFERENCES] = 2 + helpers  # the helpers, this thread at work, this thread until the end
    for _ in range(helpers):
        args[0], args[1], args[2], args[3], args[4] = 40, 0, ctx, task, block
        error = call(peek64(api + 136), scratch, 0)
        if error != 0:
            add(block + 8 * REFERENCES, -1)
            other[0], other[1], other[2] = 24, 0, error
            call(peek64(api + 64), scratch + 40, 0)

    call(task, block, 0)
    fence()
    while add(block + 8 * INSIDE, 0) > 0:  # all spans are taken; whoever comes in now finds none
        call(sched_yield(), 0, 0)
    fence()

    chunks = carray(int64s(at[CHUNK]), (n[CHUNKS], 3))
    kinds = carray(int64s(at[CHUNK] + 24 * n[CHUNKS]), n[SUMS])
    partial = carray(float64s(at[PARTIAL]), (n[SUMS], n[CHUNKS]))
    for r in range(n[SUMS]):
        out = peek64(peek64(results + 8 * (peek64(frame + 96) - 1)) + 24)
        wide = carray(float64s(out), (n[SUMS], n[LEAVES]))
        narrow_out = carray(float32s(out), (n[SUMS], n[LEAVES]))
        c = 0
        for leaf in range(n[LEAVES]):
            total = 0.0 if kinds[r] in (0, 3) else -math.inf if kinds[r] == 1 else math.inf
            while c < n[CHUNKS] and chunks[c, 0] == leaf:
                part = partial[r, c]
                if kinds[r] == 0:
                    total += part
                elif kinds[r] == 3:
                    total = math.hypot(total, part) if part == part else part
                elif part != part or (part > total if kinds[r] == 1 else part < total):
                    total = part if total == total else total
                c += 1
            if n[WIDE_SUMS]:
                wide[r, leaf] = total
            else:
                narrow_out[r, leaf] = total
    if add(block + 8 * REFERENCES, -1) == 1:
        call(free(), block, 0)
    return 0
'''
"""Compiled once for all kernels: what a thread does for a call, and what XLA calls, given the call frame and
the address of the kernel.
"""


def handler_text(folder: str) -> str:
    """The text of the handler of all kernels; raises OSError if the header is not as expected."""
    path = Path(folder) / "xla" / "ffi" / "api" / "c_api.h"
    text = path.read_text()
    if not agrees(text):
        raise OSError(f"its header {path.name} has structures of another form")
    return HANDLE.format(edition=edition(), minor=Header(text).constant("XLA_FFI_API_MINOR"))


@functools.cache
def handler(handle: int, kernel: int) -> Any:
    """The function that XLA calls for a kernel, as long as the process runs: both are addresses."""
    module = ir.Module("handler")
    module.triple = llvmlite.binding.get_process_triple()
    function = ir.Function(module, ir.FunctionType(I64, [I64]), "handler")
    b: Any = ir.IRBuilder(function.append_basic_block())
    kind = ir.FunctionType(I64, [I64, I64]).as_pointer()
    b.ret(b.call(b.inttoptr(ir.Constant(I64, handle), kind), [function.args[0], ir.Constant(I64, kernel)]))
    code = machine.Code(machine.object_code(module), "handler")
    found: Any = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(code.address)
    found.code = code
    return found
