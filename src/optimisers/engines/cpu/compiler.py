"""Text of a kernel -> machine code, without inference: the types of what a kernel holds are plain.

A kernel is a function of a few tables (see `kernel`). Its language is a small part of Numba's, and means the
same: assignments, arithmetic, `for i in range(...)`, `while True`, `if`, and calls of intrinsics. Each word
becomes an instruction at once, so that a kernel is compiled in a seventh of the time that Numba takes; and
there is no wrapper for Python to compile: one function calls all kernels.
"""

import ast
import math
import operator
from typing import Any, final

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from optimisers.engines.cpu.intrinsics import F32, F64, I64

Value = tuple[Any, Any]
"""An instruction of LLVM, and its type in Numba; of a number in the text, Python's number and None."""

I1 = ir.IntType(1)

CONTEXT: Any = cpu_target.target_context
"""What intrinsics ask how Numba lays out a complex number."""

PARAMETERS = (
    *("counter", "spans", "bounds", "chunks", "addresses", "leaves", "table", "scalars", "row", "partial"),
    "pieces",
)
"""Of compiled code, all of them words: the tables, and how long those are whose length is not known."""

TABLES: dict[str, tuple[Any, str | int]] = {
    "spans": (types.int64, 0),
    "chunks": (types.int64, 3),
    "addresses": (types.int64, "leaves"),
    "table": (types.float64, "scalars"),
    "row": (types.int64, 0),
    "partial": (types.float64, "pieces"),
}
"""Table -> (type of its elements, length of its rows; 0 where it is one row)."""

LLVM: dict[Any, Any] = {
    types.boolean: I1,
    types.int32: ir.IntType(32),
    types.int64: I64,
    types.float32: F32,
    types.float64: F64,
    types.complex64: ir.LiteralStructType([F32, F32]),
    types.complex128: ir.LiteralStructType([F64, F64]),
}

NUMBERS = {
    np.float32: types.float32,
    np.float64: types.float64,
    np.complex64: types.complex64,
    np.complex128: types.complex128,
}
"""What kernels call types, by name, and what these are."""

HALF: dict[object, Any] = {types.complex64: types.float32, types.complex128: types.float64}

RANKS: tuple[object, ...] = (types.boolean, types.int32, types.int64, *HALF.values(), *HALF)
"""Types, the narrower ones first."""

WORDS: dict[Any, str] = {
    math.sqrt: "sqrt",
    math.fabs: "fabs",
    math.sin: "sin",
    math.cos: "cos",
    np.floor: "floor",
    np.ceil: "ceil",
}
"""Functions that LLVM knows, of one real number."""

ARITHMETIC: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.RShift: "ashr",
}

COMPARISONS: dict[type[ast.AST], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}

METHODS: dict[type[ast.AST], str] = {
    ast.Assign: "assign",
    ast.Attribute: "part",
    ast.BinOp: "binary",
    ast.Call: "call",
    ast.Compare: "comparison",
    ast.Constant: "number",
    ast.Expr: "expression",
    ast.For: "count",
    ast.If: "branch",
    ast.Name: "name",
    ast.Return: "end",
    ast.Subscript: "element",
    ast.UnaryOp: "unary",
    ast.While: "forever",
}
"""Words of Python's grammar -> the method of `Compiler` that writes them."""

definition = operator.attrgetter("_defn")
"""Of an intrinsic: types of arguments -> its signature, and what writes its instructions."""


@final
class Unknown(Exception):
    """The text of a kernel has a word that the compiler does not know."""


@final
class Compiler:
    """One function on its way to LLVM."""

    def __init__(self, tree: ast.FunctionDef, names: dict[str, Any], flags: set[str], lanes: int = 0) -> None:
        """With `lanes`, inner loops are made of vectors of so many elements; else LLVM chooses how many."""
        self.names, self.flags, self.lanes = names, flags, lanes
        self.module = ir.Module("kernel")
        self.module.triple = llvm.get_process_triple()
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(PARAMETERS))
        self.function = ir.Function(self.module, kind, "kernel")
        start = self.function.append_basic_block("variables")
        self.b: Any = ir.IRBuilder(start)
        self.variables: dict[str, Value] = {}
        self.words = dict(zip(PARAMETERS, self.function.args, strict=True))
        self.pointers = {
            name: self.b.inttoptr(self.words[name], LLVM[kind].as_pointer())
            for name, (kind, _) in TABLES.items()
        }
        first = self.function.append_basic_block("body")
        self.b.position_at_end(first)
        self.block(tree.body)
        if not self.b.block.is_terminated:
            self.b.ret_void()
        self.b.position_at_end(start)
        self.b.branch(first)
        self.mark()

    def mark(self) -> None:
        """Let arithmetic be as fast as the kernel says, where an intrinsic has not said it."""
        for block in self.function.blocks:
            for instruction in block.instructions:
                if instruction.opname in ("fadd", "fsub", "fmul", "fdiv", "fcmp") and not instruction.flags:
                    instruction.flags.extend(sorted(self.flags))
                elif instruction.opname == "call" and instruction.type in (F32, F64):
                    instruction.fastmath.update(self.flags)

    # -- statements ----------------------------------------------------------------------------------------

    def block(self, body: list[ast.stmt]) -> None:
        for line in body:
            getattr(self, METHODS.get(type(line), "refuse"))(line)

    def refuse(self, node: ast.AST) -> Any:
        raise Unknown(ast.unparse(node))

    def expression(self, line: ast.Expr) -> None:
        self.value(line.value)

    def end(self, _: ast.Return) -> None:
        self.b.ret_void()

    def assign(self, line: ast.Assign) -> None:
        target, found = line.targets[0], self.value(line.value)
        if isinstance(target, ast.Subscript):
            place, kind = self.place(target)
            self.b.store(self.cast(found, kind), place)
            return
        if not isinstance(target, ast.Name):
            raise Unknown(ast.unparse(line))
        kind = found[1] or of_number(found[0])
        place, kind = self.variable(target.id, kind)
        self.b.store(self.cast(found, kind), place)

    def branch(self, line: ast.If) -> None:
        if line.orelse:
            raise Unknown("else")
        with self.b.if_then(self.cast(self.value(line.test), types.boolean)):
            self.block(line.body)

    def forever(self, line: ast.While) -> None:
        if not (isinstance(line.test, ast.Constant) and line.test.value is True):
            raise Unknown(ast.unparse(line.test))
        loop = self.function.append_basic_block("while")
        self.b.branch(loop)
        self.b.position_at_end(loop)
        self.block(line.body)
        self.b.branch(loop)
        self.b.position_at_end(self.function.append_basic_block("never"))

    def count(self, line: ast.For) -> None:
        if not (isinstance(line.target, ast.Name) and isinstance(line.iter, ast.Call)):
            raise Unknown(ast.unparse(line))
        ends = [self.cast(self.value(a), types.int64) for a in line.iter.args]
        first, last = (ir.Constant(I64, 0), *ends)[-2:]
        name = line.target.id
        at, _ = self.variable(name, types.int64)
        self.b.store(first, at)
        with self.b.if_then(self.b.icmp_signed("<", first, last)):
            loop = self.b.append_basic_block(name)
            self.b.branch(loop)
            self.b.position_at_end(loop)
            self.block(line.body)
            after = self.b.add(self.b.load(at), ir.Constant(I64, 1), flags=("nsw",))
            self.b.store(after, at)
            done = self.b.append_basic_block(f"after_{name}")
            back = self.b.cbranch(self.b.icmp_signed("<", after, last), loop, done)
            if self.lanes and not any(
                isinstance(inside, ast.For) for each in line.body for inside in ast.walk(each)
            ):
                back.set_metadata("llvm.loop", self.wide())
            self.b.position_at_end(done)

    def wide(self) -> Any:
        """What tells LLVM how many elements of a loop are taken at once. Of a loop it names itself first."""
        word = ir.MetaDataString(self.module, "llvm.loop.vectorize.width")
        width = self.module.add_metadata([word, ir.Constant(ir.IntType(32), self.lanes)])
        loop: Any = self.module.add_metadata(
            [ir.MetaDataString(self.module, f"loop {len(self.module.metadata)}")]
        )
        loop.operands = loop, width
        return loop

    def variable(self, name: str, kind: object) -> Value:
        """Where a variable lies, and its type: that of its first value."""
        if name not in self.variables:
            with self.b.goto_entry_block():
                self.variables[name] = self.b.alloca(LLVM[kind], name=name), kind
        return self.variables[name]

    # -- values --------------------------------------------------------------------------------------------

    def value(self, node: ast.expr) -> Value:
        return getattr(self, METHODS.get(type(node), "refuse"))(node)

    def number(self, node: ast.Constant) -> Value:
        return node.value, None

    def name(self, node: ast.Name) -> Value:
        if node.id in self.variables:
            place, kind = self.variables[node.id]
            return self.b.load(place), kind
        if node.id in self.words:
            return self.words[node.id], types.int64
        return self.refuse(node)

    def part(self, node: ast.Attribute) -> Value:
        if isinstance(node.value, ast.Name) and node.value.id in TABLES and node.attr == "size":
            return self.words["bounds"], types.int64
        if node.attr in ("real", "imag"):
            z, kind = self.value(node.value)
            return self.b.extract_value(z, int(node.attr == "imag")), HALF[kind]
        return self.known(node), None

    def element(self, node: ast.Subscript) -> Value:
        place, kind = self.place(node)
        return self.b.load(place), kind

    def unary(self, node: ast.UnaryOp) -> Value:
        x, kind = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            return self.b.not_(self.cast((x, kind), types.boolean)), types.boolean
        if not isinstance(node.op, ast.USub):
            return self.refuse(node)
        if kind is None:
            return -x, None
        if kind in HALF:
            return self.joined(kind, *map(self.b.fneg, self.halves(x))), kind
        return (self.b.fneg(x) if kind in HALF.values() else self.b.neg(x)), kind

    def binary(self, node: ast.BinOp) -> Value:
        x, y, kind = self.alike(self.value(node.left), self.value(node.right))
        if isinstance(node.op, ast.BitAnd | ast.BitOr) and kind == types.boolean:
            return (self.b.and_ if isinstance(node.op, ast.BitAnd) else self.b.or_)(x, y), kind
        if type(node.op) not in ARITHMETIC or kind == types.boolean:
            return self.refuse(node)
        word = ARITHMETIC[type(node.op)]
        if kind in HALF:
            of = {"mul": self.product, "div": self.quotient}.get(word)
            parts = zip(self.halves(x), self.halves(y), strict=True)
            found = of(x, y) if of else [getattr(self.b, f"f{word}")(*pair) for pair in parts]
            return self.joined(kind, *found), kind
        if kind in HALF.values():
            return getattr(self.b, f"f{word}")(x, y), kind
        return self.refuse(node) if word == "div" else getattr(self.b, word)(x, y), kind

    def comparison(self, node: ast.Compare) -> Value:
        x, y, kind = self.alike(self.value(node.left), self.value(node.comparators[0]))
        word = COMPARISONS[type(node.ops[0])]
        compared = self.b.fcmp_unordered if word == "!=" else self.b.fcmp_ordered
        if kind in HALF:
            both = [compared(word, *p) for p in zip(self.halves(x), self.halves(y), strict=True)]
            return (self.b.or_ if word == "!=" else self.b.and_)(*both), types.boolean
        if kind not in HALF.values():
            compared = self.b.icmp_signed
        return compared(word, x, y), types.boolean

    def call(self, node: ast.Call) -> Value:
        function, args = self.known(node.func), [self.value(a) for a in node.args]
        if function in NUMBERS:
            return self.cast(args[0], NUMBERS[function]), NUMBERS[function]
        if function in WORDS:
            x, kind = args[0]
            known = self.module.declare_intrinsic(f"llvm.{WORDS[function]}", [x.type])
            return self.b.call(known, [x]), kind
        if function is math.hypot:
            x, y, kind = self.alike(*args)
            name = "hypotf" if kind == types.float32 else "hypot"
            of = ir.FunctionType(x.type, [x.type] * 2)
            return self.b.call(
                self.module.globals.get(name) or ir.Function(self.module, of, name), [x, y]
            ), kind
        if function in (max, min):
            x, y, kind = self.alike(*args)
            first = self.b.icmp_signed(">" if function is max else "<", x, y)
            return self.b.select(first, x, y), kind
        return self.by_intrinsic(function, args)

    def by_intrinsic(self, function: Any, args: list[Value]) -> Value:
        """What an intrinsic of Numba gives."""
        given = [kind or of_number(x) for x, kind in args]
        signature, emit = definition(function)(None, *given)
        wanted = [self.cast(a, kind) for a, kind in zip(args, signature.args, strict=True)]
        return emit(CONTEXT, self.b, signature, wanted), signature.return_type

    # -- numbers -------------------------------------------------------------------------------------------

    def known(self, node: ast.expr) -> Any:
        """What a name of the module, or one in another module, stands for."""
        if isinstance(node, ast.Attribute):
            return getattr(self.known(node.value), node.attr)
        found = {"max": max, "min": min, **self.names}
        return found[node.id] if isinstance(node, ast.Name) and node.id in found else self.refuse(node)

    def place(self, node: ast.Subscript) -> Value:
        """Where an element of a table lies, and its type."""
        if not (isinstance(node.value, ast.Name) and node.value.id in TABLES):
            raise Unknown(ast.unparse(node))
        kind, length = TABLES[node.value.id]
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        at, *more = [self.cast(self.value(i), types.int64) for i in index]
        if more:
            row = self.words[length] if isinstance(length, str) else ir.Constant(I64, length)
            at = self.b.add(self.b.mul(at, row), more[0])
        return self.b.gep(self.pointers[node.value.id], [at]), kind

    def alike(self, a: Value, b: Value) -> tuple[Any, Any, Any]:
        """Two values in the wider of their types, and that."""
        kinds = [kind for _, kind in (a, b) if kind is not None]
        kind = max(kinds, key=RANKS.index) if kinds else of_number(operator.add(a[0], b[0]))
        return self.cast(a, kind), self.cast(b, kind), kind

    def cast(self, a: Value, kind: object) -> Any:
        """A value in another type."""
        x, have = a
        if have is None:
            return self.constant(x, kind)
        if have == kind:
            return x
        if kind in HALF:
            half = HALF[kind]
            if have not in HALF:
                return self.joined(kind, self.cast(a, half), ir.Constant(LLVM[half], 0.0))
            return self.joined(kind, *(self.cast((p, HALF[have]), half) for p in self.halves(x)))
        if kind in HALF.values():
            if have in HALF.values():
                return (self.b.fpext if kind == types.float64 else self.b.fptrunc)(x, LLVM[kind])
            return (self.b.uitofp if have == types.boolean else self.b.sitofp)(x, LLVM[kind])
        raise Unknown(f"{have} as {kind}")

    def constant(self, number: float, kind: object) -> Any:
        """A number of the text."""
        if kind in HALF:
            half = LLVM[HALF[kind]]
            parts = [ir.Constant(half, part) for part in (complex(number).real, complex(number).imag)]
            return ir.Constant(LLVM[kind], parts)
        if kind in HALF.values():
            return ir.Constant(LLVM[kind], rounded(float(number), kind))
        return ir.Constant(LLVM[kind], int(number))

    # -- complex numbers -----------------------------------------------------------------------------------

    def halves(self, z: ir.Value) -> list[Any]:
        return [self.b.extract_value(z, j) for j in range(2)]

    def joined(self, kind: object, re: ir.Value, im: ir.Value) -> Any:
        """The complex number of its parts."""
        z = self.b.insert_value(ir.Constant(LLVM[kind], ir.Undefined), re, 0)
        return self.b.insert_value(z, im, 1)

    def product(self, x: ir.Value, y: ir.Value) -> list[Any]:
        b, (a, c), (d, e) = self.b, self.halves(x), self.halves(y)
        return [b.fsub(b.fmul(a, d), b.fmul(c, e)), b.fadd(b.fmul(a, e), b.fmul(c, d))]

    def quotient(self, x: ir.Value, y: ir.Value) -> list[Any]:
        """Smith's: both divided by the larger part of the divisor. By 0 it is NaN."""
        b, (a, c), (d, e) = self.b, self.halves(x), self.halves(y)
        fabs = self.module.declare_intrinsic("llvm.fabs", [d.type])
        first = b.fcmp_ordered(">=", b.call(fabs, [d]), b.call(fabs, [e]))
        large, small = b.select(first, d, e), b.select(first, e, d)
        ratio = b.fdiv(small, large)
        below = b.fadd(large, b.fmul(small, ratio))
        re = b.select(first, b.fadd(a, b.fmul(c, ratio)), b.fadd(b.fmul(a, ratio), c))
        im = b.select(first, b.fsub(c, b.fmul(a, ratio)), b.fsub(b.fmul(c, ratio), a))
        return [b.fdiv(re, below), b.fdiv(im, below)]


def of_number(number: object) -> Any:
    """The type of a number in the text."""
    if isinstance(number, bool):
        return types.boolean
    return types.int64 if isinstance(number, int) else types.float64


def rounded(number: float, kind: object) -> float:
    """A number as it is in a type; too large ones are infinite."""
    with np.errstate(over="ignore"):
        return float(np.float32(number)) if kind == types.float32 else number
