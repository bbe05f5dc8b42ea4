"""A pass -> the source of a Numba kernel over all leaves of a group.

One call walks a table of chunks (leaf, start, length), cut so that a chunk is a few pages; each chunk loads
the numbers of its leaf from a table, then runs one loop whose maths stays in registers. Arrays come as a
table of addresses.
"""

import functools
import hashlib
import keyword
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from optimisers.graph.expr import Expr, show
from optimisers.graph.passes import Pass


class Unprintable(Exception):
    """A pass holds what kernels do not know; the text says what."""


ARITHMETIC = {
    "int16": "float32",
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex64": "float32",
    "complex128": "float64",
}
"""Element type of the parameters -> real type of the maths."""

BYTES = {
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}


# -- the words, as text --------------------------------------------------------------------------------------


def _real(text: str) -> Callable[..., str]:
    return text.format


REAL: dict[str, Callable[..., str]] = {
    "add": _real("{0} + {1}"),
    "subtract": _real("{0} - {1}"),
    "multiply": _real("{0} * {1}"),
    "divide": _real("{0} / {1}"),
    "power": _real("{0} ** {1}"),
    "negative": _real("-{0}"),
    "less": _real("{0} < {1}"),
    "less_equal": _real("{0} <= {1}"),
    "greater": _real("{0} > {1}"),
    "greater_equal": _real("{0} >= {1}"),
    "equal": _real("{0} == {1}"),
    "not_equal": _real("{0} != {1}"),
    "logical_and": _real("{0} & {1}"),
    "logical_or": _real("{0} | {1}"),
    "logical_not": _real("not {0}"),
    "sqrt": _real("math.sqrt({0})"),
    "exp": _real("math.exp({0})"),
    "expm1": _real("math.expm1({0})"),
    "log": _real("math.log({0})"),
    "log1p": _real("math.log1p({0})"),
    "sin": _real("math.sin({0})"),
    "cos": _real("math.cos({0})"),
    "tanh": _real("math.tanh({0})"),
    "arctan": _real("math.atan({0})"),
    "floor": _real("numpy.floor({0})"),
    "ceil": _real("numpy.ceil({0})"),
    "sign": _real("select({0} > 0, one, select({0} < 0, -one, {0}))"),
    "abs": _real("math.fabs({0})"),
    "abs2": _real("{0} * {0}"),
    "real": _real("{0}"),
    "imag": _real("zero"),
    "conj": _real("{0}"),
    "isfinite": _real("{0} - {0} == 0"),
    "isnan": _real("{0} != {0}"),
    "maximum": _real("select(({0} > {1}) | ({0} != {0}), {0}, {1})"),
    "minimum": _real("select(({0} < {1}) | ({0} != {0}), {0}, {1})"),
    "where": _real("select({0}, {1}, {2})"),
    "join_bits": _real("join_bits({0}, {1})"),
    "high_bits": _real("high_bits({0})"),
    "low_bits": _real("low_bits({0})"),
    "to_float16": _real("to_float16({0})"),
    "to_bfloat16": _real("to_bfloat16({0})"),
    "to_float32": _real("to_float32({0})"),
    "sum": _real("{0} + float64({1})"),
    "max": _real("max({0}, rank_max({1}))"),
    "min": _real("min({0}, rank_min({1}))"),
}
"""Words on real numbers. The reductions at the end take the value so far first."""


def _complex(op: str, args: list[str], types: list[str]) -> str:
    """Words where some argument is complex; a real factor stays real, so that 0 times infinity does not creep
    in.
    """
    z = args[0]
    mixed = len(args) == 2 and types.count("complex") == 1
    if mixed and op in ("add", "subtract", "multiply", "divide"):
        a, b = args
        if op == "divide" and types[1] == "real":
            return f"complex_of({a}.real / {b}, {a}.imag / {b})"
        if op == "multiply":
            r, c = (a, b) if types[0] == "real" else (b, a)
            return f"complex_of({r} * {c}.real, {r} * {c}.imag)"
        if op == "add":
            r, c = (a, b) if types[0] == "real" else (b, a)
            return f"complex_of({r} + {c}.real, {c}.imag)"
        if op == "subtract":
            return (
                f"complex_of({a}.real - {b}, {a}.imag)"
                if types[1] == "real"
                else f"complex_of({a} - {b}.real, -{b}.imag)"
            )
    whole = {
        "add": "{0} + {1}",
        "subtract": "{0} - {1}",
        "multiply": "{0} * {1}",
        "divide": "{0} / {1}",
        "negative": "-{0}",
        "equal": "{0} == {1}",
        "not_equal": "{0} != {1}",
        "abs": "math.hypot({0}.real, {0}.imag)",
        "abs2": "{0}.real * {0}.real + {0}.imag * {0}.imag",
        "real": "{0}.real",
        "imag": "{0}.imag",
        "conj": "complex_of({0}.real, -{0}.imag)",
        "isfinite": "({0}.real - {0}.real == 0) & ({0}.imag - {0}.imag == 0)",
        "isnan": "({0}.real != {0}.real) | ({0}.imag != {0}.imag)",
        "where": "select({0}, {1}, {2})",
    }
    if op == "sign":
        size = f"math.hypot({z}.real, {z}.imag)"
        return f"select({z} == 0, {z}, complex_of({z}.real / {size}, {z}.imag / {size}))"
    if op not in whole:
        raise Unprintable(f"{op} of complex numbers")
    return whole[op].format(*args)


SIGNATURE = "void(i8, i8[::1], i8[:,::1], i8[:,::1], f8[:,::1], i8[::1])"
SIGNATURE_SUMS = SIGNATURE[:-1] + ", f8[:,::1])"
"""Types of counter, spans, chunks, addresses, table, row (and partial): given, so that loading a module
compiles it.
"""

# -- one kernel ----------------------------------------------------------------------------------------------


class Maths:
    """Nodes of a graph as text; a kernel language says how it writes words and numbers."""

    words: ClassVar[dict[str, Callable[..., str]]] = REAL
    reserved: ClassVar[frozenset[str]] = frozenset()
    """Names that the text around the maths uses itself."""

    def __init__(self, arithmetic: str) -> None:
        self.real = arithmetic
        self.names: dict[int, str] = {}
        self.taken = set(self.reserved)

    def literal(self, text: str) -> str:
        """A number of the host."""
        return self.cast(text.replace("inf", "math.inf").replace("nan", "math.nan"), self.real)

    def cast(self, text: str, kind: str) -> str:
        """A number in another type."""
        return f"{kind}({text})"

    def name(self, wish: str) -> str:
        text = re.sub(r"\W", "_", wish).strip("_") or "t"
        text = f"_{text}" if text[0].isdigit() else text
        n = 0
        name = text
        while name in self.taken or keyword.iskeyword(name):
            n += 1
            name = f"{text}{n}"
        self.taken.add(name)
        return name

    def converted(self, text: str, have: str, want: str, kind: str) -> str:
        """A number from one arithmetic type in another."""
        if have == want:
            return text
        if kind == "complex":
            return f"{'complex64' if want == 'float32' else 'complex128'}({text})"
        return self.cast(text, want)

    def atom(self, e: Expr, *, number: bool = False) -> str:
        """A node as an operand; `number` turns conditions into 0 and 1."""
        if e.op == "const" and e.domain == "scalar":
            if e.type == "complex":
                raise Unprintable("a complex number beside the arrays")
            if e.type == "bool":
                return self.literal(str(int(e.value))) if number else str(e.value)
            return self.literal(repr(float(e.value)))
        text = self.names[id(e)]
        return self.cast(text, self.real) if number and e.type == "bool" else text

    def word(self, e: Expr) -> str:
        if e.op.startswith("logical"):
            args = [self.atom(a) if a.type == "bool" else f"({self.atom(a)} != 0)" for a in e.args]
        else:
            args = [self.atom(a, number=not (e.op == "where" and i == 0)) for i, a in enumerate(e.args)]
        types = ["real" if a.type == "bool" else a.type for a in e.args]
        if e.op == "where":
            if e.type == "bool":
                args = [self.atom(a) for a in e.args]
            elif e.type == "complex":
                args[1:] = [
                    a if t == "complex" else f"complex_of({a}, {self.real}(0))"
                    for a, t in zip(args[1:], types[1:], strict=True)
                ]
        if "complex" in types:
            return _complex(e.op, args, types)
        if e.op not in self.words:
            raise Unprintable(e.op)
        return self.words[e.op](*args)


class Printer(Maths):
    """The text of a kernel of one pass."""

    reserved = frozenset(
        {
            "i",
            "n",
            "k",
            "c",
            "s",
            "h",
            "first",
            "zero",
            "one",
            "counter",
            "spans",
            "chunks",
            "addresses",
            "table",
            "row",
            "partial",
            "math",
            "numpy",
            "float32",
            "float64",
            "load",
            "store",
            "select",
            "claim",
            "max",
            "min",
        }
    )

    def __init__(
        self, p: Pass, kinds: dict[str, str], arithmetic: str, labels: dict[str, str], *, inplace: bool
    ) -> None:
        super().__init__(arithmetic)
        self.p, self.kinds, self.labels, self.inplace = p, kinds, labels, inplace
        self.arrays = columns(p, inplace=inplace)

    def text(self, title: str) -> tuple[str, str]:
        """(docstring of the module, definitions)."""
        p, lines = self.p, list[str]()
        head = [f"{self.names_of(a)}: {self.kinds[a]}" for a in self.arrays]
        for j, a in enumerate(self.arrays):
            kind, label = self.kinds[a], self.names_of(a)
            if a in p.loads or a.startswith("f"):
                lines.append(f'load_{label} = loader("{kind}", {j}, {len(self.arrays)})')
            if self.stored_through(a):
                lines.append(f'store_{label} = storer("{kind}", {j}, {len(self.arrays)})')
        fast = ["contract", "afn", "nsz", *(["reassoc"] if p.reductions else [])]
        lines += [
            "",
            "",
            f'@njit("{SIGNATURE_SUMS if p.reductions else SIGNATURE}",',
            '      nogil=True, error_model="numpy", cache=True,',
            f"      fastmath={{{str(fast)[1:-1]}}})",
        ]
        last = ", partial" if p.reductions else ""
        lines.append(f"def kernel(counter, spans, chunks, addresses, table, row{last}):")
        for word, name, value in (("sign", "one", 1), ("imag", "zero", 0)):
            if any(e.op == word for e in p.body):
                lines.append(f"    {name} = {self.real}({value})")
        lines += [
            "    while True:",
            "        s = claim(counter)",
            "        if s + 1 >= spans.size:",
            "            return",
            "        for c in range(spans[s], spans[s + 1]):",
        ]
        lines += ["            " + line for line in self.chunk()]
        about = f'"""{title}\n\nAddresses, in order: {", ".join(head)}.\n"""\n'
        return about, "\n".join(lines) + "\n"

    def names_of(self, array: str) -> str:
        """The array's name for the reader."""
        slot = array.removeprefix("new ")
        return ("new_" if slot != array else "") + self.labels.get(slot, slot)

    def stored_through(self, array: str) -> bool:
        stored = {s for s, _ in self.p.stores}
        return array.removeprefix("new ") in stored and (
            array.startswith("new ") or self.inplace or array not in self.p.loads
        )

    def chunk(self) -> list[str]:
        p = self.p
        lines = ["k = chunks[c, 0]", "first = chunks[c, 1]", "n = chunks[c, 2]"]
        if p.scalars:
            lines.append("h = row[k]")
        for j, e in enumerate(p.scalars):
            name = self.names[id(e)] = self.name(f"c{j}")
            if e.type == "complex":
                raise Unprintable("a complex number beside the arrays")
            value = f"table[h, {j}] != 0" if e.type == "bool" else self.cast(f"table[h, {j}]", self.real)
            lines.append(f"{name} = {value}")
        at: dict[str, str] = {}
        for j, a in enumerate(self.arrays):
            at[a] = self.name(f"at_{self.names_of(a)}")
            lines.append(f"{at[a]} = addresses[{j}, k] + {BYTES[self.kinds[a]]} * first")
        sums: list[str] = []
        for r in p.reductions:
            sums.append(self.name(f"{r.op}_of"))
            if r.type == "complex":
                raise Unprintable("a sum of complex numbers")
            zero = (
                "float64(0)"
                if r.op == "sum"
                else f"rank_{r.op}({self.real}({'-' if r.op == 'max' else ''}math.inf))"
            )
            lines.append(f"{sums[-1]} = {zero}")
        lines.append("for i in range(n):")
        lines += ["    " + line for line in self.element(at, sums)]
        for j, (r, total) in enumerate(zip(p.reductions, sums, strict=True)):
            lines.append(f"partial[{j}, c] = {total if r.op == 'sum' else f'unrank({total})'}")
        return lines

    def load(self, array: str, at: str) -> str:
        """An element of an array, in the type of its arithmetic."""
        return f"load_{self.names_of(array)}({at}, i)"

    def store(self, array: str, at: str, value: str) -> str:
        """The line that stores an element, given in the type of its arithmetic."""
        return f"store_{self.names_of(array)}({at}, i, {value})"

    def counted(self, op: str, value: str) -> str:
        """An element, as a reduction takes it."""
        return value

    def element(self, at: dict[str, str], sums: list[str]) -> list[str]:
        p, lines = self.p, list[str]()
        for j, e in enumerate(p.free):
            self.names[id(e)] = self.name("free")
            text = self.load(f"f{j}", at[f"f{j}"])
            kind = ARITHMETIC[self.kinds[f"f{j}"]]
            text = f"{text} != 0" if e.type == "bool" else self.converted(text, kind, self.real, e.type)
            lines.append(f"{self.names[id(e)]} = {text}")
        for e in p.body:
            if e.op == "input":
                name = self.names[id(e)] = self.name(self.names_of(e.value))
                text = self.load(e.value, at[e.value])
                lines.append(
                    f"{name} = {self.converted(text, ARITHMETIC[self.kinds[e.value]], self.real, e.type)}"
                )
            else:
                text = self.word(e)
                name = self.names[id(e)] = self.name("t")
                lines.append(f"{name} = {text}")
        for r, total in zip(p.reductions, sums, strict=True):
            value = self.counted(r.op, self.atom(r.args[0], number=True))
            lines.append(f"{total} = {self.words[r.op](total, value)}")
        for slot, e in p.stores:
            array = slot if slot in at and self.stored_through(slot) else f"new {slot}"
            value, kind = self.atom(e, number=True), self.kinds[array]
            if kind.startswith("complex") and e.type != "complex":
                value = f"complex_of({value}, {self.real}(0))"
            value = self.converted(
                value, self.real, ARITHMETIC[kind], "complex" if kind.startswith("complex") else ""
            )
            lines.append(self.store(array, at[array], value))
        return lines


def columns(p: Pass, *, inplace: bool) -> list[str]:
    """The arrays of a kernel in the order of its address table: those read, values of another shape, those
    written.
    """
    written = [
        s if inplace and s not in p.loads else f"new {s}"
        for s, _ in p.stores
        if not inplace or s not in p.loads
    ]
    return [*p.loads, *(f"f{j}" for j in range(len(p.free))), *written]


@functools.cache
def support_hash(file: str) -> str:
    """Tells kernels compiled against other functions of a file of the engines apart."""
    return hashlib.sha256(Path(__file__).parents[1].joinpath(file).read_bytes()).hexdigest()[:12]


def source(
    p: Pass, kinds: dict[str, str], arithmetic: str, labels: dict[str, str], title: str, *, inplace: bool
) -> str:
    """The module text of one pass.

    `kinds` has the element type of every array in `columns`, `labels` their names for the reader. Raises
    Unprintable.
    """
    about, body = Printer(p, kinds, arithmetic, labels, inplace=inplace).text(title)
    return (
        f"{about}import math\n\nimport numpy\nfrom numba import njit\n"
        "from numpy import complex64, complex128, float32, float64\n\n"
        "from optimisers.engines.cpu.intrinsics import (\n    claim, complex_of, high_bits, join_bits, "
        "loader, low_bits, rank_max, rank_min,\n    select, storer, "
        "to_bfloat16, to_float16, to_float32, unrank,\n)\n"
        f"\n# intrinsics {support_hash('cpu/intrinsics.py')}\n{body}"
    )


def legend(p: Pass) -> str:
    """What the columns of the scalar table hold, for the reader: it is no part of the source, which serves
    all rules with the same maths on arrays.
    """
    scalars = [f"# c{j} = {show(e, 24)}\n" for j, e in enumerate(p.scalars)]
    return "".join(scalars + [f"# f{j} = {show(e)}, by the array library\n" for j, e in enumerate(p.free)])


def traffic(p: Pass, kinds: dict[str, str], itemsize: int) -> int:
    """Bytes that a pass moves per parameter: every array read, every array written.

    `itemsize` is that of element types that no kernel knows.
    """
    arrays = [*p.loads, *(f"f{j}" for j in range(len(p.free))), *(s for s, _ in p.stores)]
    return sum(BYTES.get(kinds[a], itemsize) for a in arrays)
