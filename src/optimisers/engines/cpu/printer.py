"""A pass -> the source of a Numba kernel over all leaves of a group.

One call walks a table of chunks (leaf, start, length), cut so that a chunk is a few pages; each chunk loads
the numbers of its leaf from a table, then runs one loop whose maths stays in registers. Arrays come as a
table of addresses.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from optimisers.engines.labels import fitting
from optimisers.graph.cached import cached
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


# -- operations, as text ---------------------------------------------------------------------------------


def _real(text: str) -> Callable[..., str]:
    return text.format


def _power(x: str, y: str) -> str:
    """x^y; a cube root, which takes a third of the time, where y is 1/3."""
    return f"cube_root({x})" if y.endswith(f"({1 / 3!r})") else f"power({x}, {y})"


REAL: dict[str, Callable[..., str]] = {
    "add": _real("{0} + {1}"),
    "subtract": _real("{0} - {1}"),
    "multiply": _real("{0} * {1}"),
    "divide": _real("{0} / {1}"),
    "power": _power,
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
    "exp": _real("exponential({0})"),
    "expm1": _real("expm1({0})"),
    "log": _real("logarithm({0})"),
    "log1p": _real("log1p({0})"),
    "sin": _real("math.sin({0})"),
    "cos": _real("math.cos({0})"),
    "tanh": _real("tanh({0})"),
    "arctan": _real("arctan({0})"),
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
    "norm2": _real("{0} + float64({1}) * float64({1})"),
    "max": _real("max({0}, rank_max({1}))"),
    "min": _real("min({0}, rank_min({1}))"),
}
"""Operations on real numbers. The reductions at the end take the value so far first."""


FUNCTIONS = ("arctan", "cube_root", "exponential", "expm1", "log1p", "logarithm", "power", "tanh")
"""What kernels call of `functions`."""

_SIZE = "math.hypot({0}.real, {0}.imag)"

_RC, _CR, _CC = ("real", "complex"), ("complex", "real"), ("complex", "complex")

COMPLEX: dict[tuple[str, ...], str] = {
    **{("equal", *types): "{0} == {1}" for types in (_RC, _CR, _CC)},
    **{("not_equal", *types): "{0} != {1}" for types in (_RC, _CR, _CC)},
    ("add", *_CC): "{0} + {1}",
    ("add", *_RC): "complex_of({0} + {1}.real, {1}.imag)",
    ("add", *_CR): "complex_of({1} + {0}.real, {0}.imag)",
    ("subtract", *_CC): "{0} - {1}",
    ("subtract", *_RC): "complex_of({0} - {1}.real, -{1}.imag)",
    ("subtract", *_CR): "complex_of({0}.real - {1}, {0}.imag)",
    ("multiply", *_CC): "{0} * {1}",
    ("multiply", *_RC): "complex_of({0} * {1}.real, {0} * {1}.imag)",
    ("multiply", *_CR): "complex_of({1} * {0}.real, {1} * {0}.imag)",
    ("divide", *_CC): "{0} / {1}",
    ("divide", *_RC): "{0} / {1}",
    ("divide", *_CR): "complex_of({0}.real / {1}, {0}.imag / {1})",
    ("negative", "complex"): "-{0}",
    ("abs", "complex"): _SIZE,
    ("abs2", "complex"): "{0}.real * {0}.real + {0}.imag * {0}.imag",
    ("real", "complex"): "{0}.real",
    ("imag", "complex"): "{0}.imag",
    ("conj", "complex"): "complex_of({0}.real, -{0}.imag)",
    ("isfinite", "complex"): "({0}.real - {0}.real == 0) & ({0}.imag - {0}.imag == 0)",
    ("isnan", "complex"): "({0}.real != {0}.real) | ({0}.imag != {0}.imag)",
    ("sign", "complex"): f"select({{0}} == 0, {{0}}, complex_of({{0}}.real / {_SIZE}, {{0}}.imag / {_SIZE}))",
    ("where", "bool", *_CC): "select({0}, {1}, {2})",
}
"""Operations where some argument is complex, by the types of all; a real factor stays real, so that 0 times
infinity does not creep in.
"""

CASTS: dict[tuple[str, str], str] = {
    ("bool", "real"): "{real}({0})",
    ("bool", "complex"): "complex_of({real}({0}), {real}(0))",
    ("real", "bool"): "{0} != 0",
    ("real", "complex"): "complex_of({0}, {real}(0))",
    ("complex", "bool"): "{0} != 0",
}
"""(type, type wanted) -> the conversion."""


FIRST = {
    "sum": "float64(0)",
    "norm2": "float64(0)",
    "max": "rank_max({real}(-math.inf))",
    "min": "rank_min({real}(math.inf))",
}
"""Reduction -> its value before any element."""

LAST = {"sum": "{0}", "norm2": "math.sqrt({0}) / by_{0}", "max": "unrank({0})", "min": "unrank({0})"}
"""Reduction -> what is kept of a chunk."""


# -- one kernel ----------------------------------------------------------------------------------------------


def indented(lines: Iterable[str], levels: int = 1) -> list[str]:
    """Lines inside of some loops."""
    return ["    " * levels + line for line in lines]


class Maths:
    """Lowered nodes as text; a kernel language says how it writes operations and numbers."""

    operations: ClassVar[dict[str, Callable[..., str]]] = REAL
    casts: ClassVar[dict[tuple[str, str], str]] = CASTS

    def __init__(self, arithmetic: str) -> None:
        self.start(arithmetic)

    def start(self, arithmetic: str) -> None:
        """Begin with no value named."""
        self.real = arithmetic
        self.names: dict[int, str] = {}
        self.count = 0

    def literal(self, text: str) -> str:
        """A number of the host."""
        return self.cast(text.replace("inf", "math.inf").replace("nan", "math.nan"), self.real)

    def cast(self, text: str, kind: str) -> str:
        """A number in another type of the kernel language."""
        return f"{kind}({text})"

    def new_name(self) -> str:
        """The name of the next value: t0, t1, ..."""
        self.count += 1
        return f"t{self.count - 1}"

    def atom(self, e: Expr) -> str:
        """A node as an operand."""
        if e.op != "const":
            return self.names[id(e)]
        if e.type == "complex":
            value = complex(e.value)
            halves = (self.literal(repr(half)) for half in (value.real, value.imag))
            return f"complex_of({', '.join(halves)})"
        return str(e.value) if e.type == "bool" else self.literal(repr(float(e.value)))

    def random(self, e: Expr) -> str:
        """Random bits of the element at hand."""
        raise Unprintable(e.op)

    def operation(self, e: Expr) -> str:
        """What a node computes."""
        args, types = [self.atom(a) for a in e.args], [a.type for a in e.args]
        if e.op == "random_word":
            return self.random(e)
        if e.op == "cast":
            return self.casts[types[0], e.type].format(*args, real=self.real)
        if "complex" in types:
            if (e.op, *types) not in COMPLEX:
                raise Unprintable(f"{e.op} of complex numbers")
            return COMPLEX[e.op, *types].format(*args)
        if e.op not in self.operations:
            raise Unprintable(e.op)
        return self.operations[e.op](*args)


class Printer(Maths):
    """The text of a kernel of one pass."""

    def __init__(
        self, p: Pass, kinds: dict[str, str], arithmetic: str, labels: dict[str, str], *, inplace: bool
    ) -> None:
        self.start(arithmetic)
        self.p, self.kinds, self.labels, self.inplace = p, kinds, labels, inplace
        self.arrays = columns(p, inplace=inplace)
        self.stored = {s: s if not self.is_apart(s) else f"new {s}" for s, _ in p.stores}
        """The array of the kernel that takes what is stored."""
        self.narrow = {f"f{j}" for j, once in enumerate(p.narrow) if once}
        """Values that are one number a leaf."""

    def is_apart(self, array: str) -> bool:
        """Whether a new array is written, beside the old one."""
        return f"new {array}" in self.arrays

    def text(self, title: str) -> tuple[str, str]:
        """(docstring of the module, definitions)."""
        p, lines = self.p, list[str]()
        head = [f"{self.names_of(a)}: {self.kinds[a]}" for a in self.arrays]
        for j, a in enumerate(self.arrays):
            given = f'("{self.kinds[a]}", {j}, {len(self.arrays)}, "{self.real}")'
            if a in p.loads or a.startswith("f"):
                lines.append(f"load_{self.names_of(a)} = loader{given}")
            if a in self.stored.values():
                lines.append(f"store_{self.names_of(a)} = storer{given}")
        for e in random_in(p):
            lines.append(f'{named(e)} = random_word({", ".join(chosen(e))}, "{self.real}")')
        fast = ["contract", "afn", "nsz", *(["reassoc"] if p.reductions else [])]
        lines += [
            "",
            "",
            f"@compiled({str(fast)[1:-1]}, kept=True)",
        ]
        last = ", partial" if p.reductions else ""
        lines.append(f"def kernel(counter, spans, chunks, addresses, table, row{last}):")
        for op, name, value in (("sign", "one", 1), ("imag", "zero", 0)):
            if any(e.op == op for e in p.body):
                lines.append(f"    {name} = {self.real}({value})")
        lines += [
            "    while True:",
            "        s = claim(counter)",
            "        if s + 1 >= spans.size:",
            "            return",
            "        for c in range(spans[s], spans[s + 1]):",
        ]
        lines += indented(self.chunk(), 3)
        about = f'"""{title}\n\nAddresses, in order: {", ".join(head)}.\n"""\n'
        return about, "\n".join(lines) + "\n"

    def names_of(self, array: str) -> str:
        """The array's name for the reader."""
        slot = array.removeprefix("new ")
        return ("new_" if slot != array else "") + self.labels.get(slot, slot)

    def chunk(self) -> list[str]:
        p = self.p
        lines = ["k = chunks[c, 0]", "first = chunks[c, 1]", "n = chunks[c, 2]"]
        if p.scalars:
            lines.append("h = row[k]")
        lines += self.of_leaf([f"table[h, {j}]" for j in range(len(p.scalars))])
        at: dict[str, str] = {}
        for j, a in enumerate(self.arrays):
            at[a] = f"at_{self.names_of(a)}"
            once = a in self.narrow
            lines.append(
                f"{at[a]} = addresses[{j}, k]" + ("" if once else f" + {BYTES[self.kinds[a]]} * first")
            )
        element, totals = self.element(at), self.totals()
        taken = [f"{total} = {self.taken(op, total, term)}" for total, op, term in self.reduced(totals)]
        return [
            *lines,
            *(f"{total} = {FIRST[op].format(real=self.real)}" for total, op in totals.items()),
            *self.loop([*element, *taken, *self.stores(at)]),
            *self.second_look(element, totals),
            *(f"partial[{j}, c] = {LAST[op].format(t)}" for j, (t, op) in enumerate(totals.items())),
        ]

    def loop(self, lines: list[str]) -> list[str]:
        """Lines for every element of a chunk."""
        return ["for i in range(n):", *indented(lines)]

    def second_look(self, element: list[str], totals: dict[str, str]) -> list[str]:
        """Where squares overflow or vanish: what is in the caches once more, times a power of two."""
        norms = {total: term for total, op, term in self.reduced(totals) if op == "norm2"}
        if not norms:
            return []
        squares = [
            f"{total} = {total} + square(float64({half}), by_{total})"
            for total, term in norms.items()
            for half in self.halves(term)
        ]
        return [
            *(f"by_{total} = refit({total})" for total in norms),
            f"if {' | '.join(f'(by_{total} != 1)' for total in norms)}:",
            *indented(f"{total} = {FIRST['norm2']}" for total in norms),
            *indented(self.loop([*element, *squares])),
        ]

    def halves(self, e: Expr) -> list[str]:
        """The real numbers that a value is made of."""
        value = self.atom(e)
        return [f"{value}.real", f"{value}.imag"] if e.type == "complex" else [value]

    def taken(self, op: str, total: str, term: Expr) -> str:
        """A reduction with one more element in it."""
        value = self.atom(term)
        if op == "norm2" and term.type == "complex":
            return f"{total} + float64({COMPLEX['abs2', 'complex'].format(value)})"
        return self.operations[op](total, value)

    def totals(self) -> dict[str, str]:
        """The name of each reduction, with what it is."""
        if any(r.type == "complex" for r in self.p.reductions):
            raise Unprintable("a sum of complex numbers")
        return {f"{r.op}_of{j or ''}": r.op for j, r in enumerate(self.p.reductions)}

    def reduced(self, totals: dict[str, str]) -> list[tuple[str, str, Expr]]:
        """(name, reduction, what is reduced)."""
        return [(*named, term) for named, term in zip(totals.items(), self.p.terms, strict=True)]

    def of_leaf(self, values: list[str]) -> list[str]:
        """Lines for what is one number a leaf, from the columns of the table."""
        lines: list[str] = []
        it = iter(enumerate(values))
        for e in self.p.body:
            if e.op == "column":
                if e.type == "complex":
                    raise Unprintable("a complex number beside the arrays")
                j, value = next(it)
                self.names[id(e)] = f"c{j}"
                lines.append(f"c{j} = {self.cast(value, self.real)}")
            elif e.domain == "scalar":
                text = self.operation(e)
                self.names[id(e)] = self.new_name()
                lines.append(f"{self.names[id(e)]} = {text}")
        return lines

    def random(self, e: Expr) -> str:
        return f"{named(e)}({', '.join([*map(self.atom, e.args), 'first + i'])})"

    def load(self, array: str, at: str, index: str = "i") -> str:
        """An element of an array, in the type of the arithmetic."""
        return f"load_{self.names_of(array)}({at}, {index})"

    def store(self, array: str, at: str, value: str) -> str:
        """The line that stores an element, given in the type of the arithmetic."""
        return f"store_{self.names_of(array)}({at}, i, {value})"

    def element(self, at: dict[str, str]) -> list[str]:
        """The maths of one element."""
        p, lines, spread = self.p, list[str](), 0
        for e in p.body:
            if e.domain == "scalar":
                continue
            if e.op == "load":
                name, text = self.names_of(e.value), self.load(e.value, at[e.value])
            elif e.op == "spread":
                name, array = f"free{spread or ''}", f"f{spread}"
                text = self.load(array, at[array], "0" if array in self.narrow else "i")
                spread += 1
            else:
                text = self.operation(e)
                name = self.new_name()
            self.names[id(e)] = name
            lines.append(f"{name} = {text}")
        return lines

    def stores(self, at: dict[str, str]) -> list[str]:
        """What is stored of one element."""
        return [
            self.store(self.stored[slot], at[self.stored[slot]], self.atom(e.args[0]))
            for slot, e in self.p.stores
        ]


def random_in(p: Pass) -> list[Expr]:
    """The nodes of a pass that are random bits."""
    return [e for e in p.body if e.op == "random_word"]


def chosen(e: Expr) -> list[str]:
    """Which random bits a node is: draw, which of four words, how many bits."""
    options = dict(e.options)
    return [str(options[name]) for name in ("draw", "which", "bits")]


def named(e: Expr) -> str:
    """What a kernel calls the function that gives random bits."""
    return f"random_{'_'.join(chosen(e))}"


@cached
def columns(p: Pass, *, inplace: bool) -> list[str]:
    """The arrays of a kernel in the order of its address table: those read, values of another shape, those
    written.
    """
    written = [s if inplace else f"new {s}" for s, _ in p.stores if not inplace or s not in p.loads]
    return [*p.loads, *(f"f{j}" for j in range(len(p.free))), *written]


@functools.cache
def support_hash(file: str) -> str:
    """Tells kernels compiled against other functions of a file of the engines apart."""
    return hashlib.sha256(Path(__file__).parents[1].joinpath(file).read_bytes()).hexdigest()[:12]


def imported(file: str, names: list[str]) -> str:
    """The line that imports what a kernel calls from a file beside this one; none where it calls nothing."""
    found = f"optimisers.engines.cpu.{file} import {', '.join(names)}"
    return f"from {found}  # {support_hash(f'cpu/{file}.py')}\n" if names else ""


def source(
    p: Pass, kinds: dict[str, str], arithmetic: str, labels: dict[str, str], title: str, *, inplace: bool
) -> str:
    """The module text of one pass.

    `kinds` has the element type of every array in `columns`, `labels` their names for the reader. Raises
    Unprintable.
    """

    def written(labels: dict[str, str]) -> str:
        about, body = Printer(p, kinds, arithmetic, labels, inplace=inplace).text(title)
        called = [name for name in FUNCTIONS if f" {name}(" in body]
        more = imported("functions", called) + imported("random", ["random_word"] if random_in(p) else [])
        return (
            f"{about}import math\n\nimport numpy\n"
            "from numpy import complex64, complex128, float32, float64\n\n"
            "from optimisers.engines.cpu.kernel import compiled\n"
            "from optimisers.engines.cpu.intrinsics import (\n    claim, complex_of, high_bits, join_bits, "
            "loader, low_bits, rank_max, rank_min,\n    refit, select, square, storer, "
            f"to_bfloat16, to_float16, to_float32, unrank,\n)\n{more}"
            f"\n# intrinsics {support_hash('cpu/intrinsics.py')}\n{body}"
        )

    return written(fitting(labels, written({})))


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
    read = [*p.loads, *(f"f{j}" for j in range(len(p.free)))]
    return sum(BYTES.get(kinds[a], itemsize) for a in (*read, *(s for s, _ in p.stores)))
