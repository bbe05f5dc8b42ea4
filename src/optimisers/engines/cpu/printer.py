"""A pass -> the source of a Numba kernel over all leaves of a group.

One call walks a table of chunks (leaf, start, length), cut so that a chunk is a few pages; each chunk loads
the numbers of its leaf from a table, then runs one loop whose maths stays in registers. Arrays come as a
table of addresses.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from optimisers.arrays import philox
from optimisers.engines.cpu.maths import BYTES, COMPLEX, FUNCTIONS, Maths, Unprintable
from optimisers.engines.labels import fitting
from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr, show
from optimisers.graph.passes import Pass

FIRST = {
    "sum": "float64(0)",
    "norm2": "float64(0)",
    "max": "rank_max({real}(-math.inf))",
    "min": "rank_min({real}(math.inf))",
}
"""Reduction -> its value before any element."""

WIDE = {"real": "float64", "complex": "complex128"}
"""Type of a node -> what it is in float64."""

LAST = {"sum": "{0}", "norm2": "math.sqrt({0}) / by_{0}", "max": "unrank({0})", "min": "unrank({0})"}
"""Reduction -> what is kept of a chunk."""


# -- one kernel ----------------------------------------------------------------------------------------------


def indented(lines: Iterable[str], levels: int = 1) -> list[str]:
    """Lines inside of some loops."""
    return ["    " * levels + line for line in lines]


Element = Callable[[Callable[[str, str, Expr], list[str]], bool], list[str]]
"""The lines of one element, from those that a reduction takes of it, and whether it is stored."""


class Printer(Maths):
    """The text of a kernel of one pass."""

    of_quotients: ClassVar[dict[str, str]] = {"arctan": "arctan_of({0}, {1})"}
    """Functions of y / x, taken of y and x."""

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
        parts = {dict(e.options)["part"] for e in random_in(p)}
        self.shared = bool(parts) and not parts & {philox.FIRST, philox.SECOND}
        """Whether elements share random words."""
        self.lane: int | None = None
        """Which of the elements that share words is written, where they are side by side."""
        self.words: dict[tuple[str, str, str], None] = {}
        """Functions that give random words: (name, what is drawn, which word of a place)."""

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
        work = self.chunk()
        lines += [f'{name} = random_word({given}, "{self.real}"{which})' for name, given, which in self.words]
        fast = ["contract", "afn", "nsz", *(["reassoc"] if p.reductions else [])]
        wide = f", wide={BYTES[self.real]}" if self.is_slow(work) else ""
        lines += [
            "",
            "",
            f"@compiled({str(fast)[1:-1]}, kept=True{wide})",
        ]
        last = ", partial" if p.reductions else ""
        lines.append(f"def kernel(counter, spans, chunks, addresses, table, row{last}):")
        lines += [
            "    while True:",
            "        s = claim(counter)",
            "        if s + 1 >= spans.size:",
            "            return",
            "        for c in range(spans[s], spans[s + 1]):",
        ]
        lines += indented(work, 3)
        about = f'"""{title}\n\nAddresses, in order: {", ".join(head)}.\n"""\n'
        return about, "\n".join(lines) + "\n"

    def is_slow(self, lines: list[str]) -> bool:
        """Whether vectors of the whole width pay, and all of it vectorises: where an element takes much
        arithmetic, and where sums in float64 stand beside float32, of which LLVM takes no more at once than
        of them.
        """
        called = {name for line in lines for name in re.findall(r"[\w.]+(?=\()", line)}
        much = {*FUNCTIONS, *(name for name, *_ in self.words)}
        slow = bool(called & much) or bool(self.p.reductions)
        return self.real == "float32" and slow and "math.hypot" not in called

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
        totals, named = self.totals(), self.count

        def element(take: Callable[[str, str, Expr], list[str]], stored: bool) -> list[str]:
            self.count = named
            lines = self.element(at)
            lines += [line for reduced in self.reduced(totals) for line in take(*reduced)]
            return [*lines, *(self.stores(at) if stored else [])]

        return [
            *lines,
            *(
                f"{total} = {FIRST[op].format(real='float64' if id(term) in p.double else self.real)}"
                for total, op, term in self.reduced(totals)
            ),
            *self.loop(lambda: element(self.taken, True)),
            *self.second_look(element, totals),
            *(f"partial[{j}, c] = {LAST[op].format(t)}" for j, (t, op) in enumerate(totals.items())),
        ]

    def loop(self, lines: Callable[[], list[str]]) -> list[str]:
        """Lines for every element of a chunk; where four elements share random words, for those at once."""
        if not self.shared:
            return ["for i in range(n):", *indented(lines())]
        n, block = philox.LANES, 4 * philox.LANES
        four: list[str] = []
        for lane in range(4):
            self.lane = lane
            four += [f"i = {block} * b + r + {n * lane}", *lines()]
        self.lane = None
        return [
            f"for b in range(n >> {block.bit_length() - 1}):",
            f"    place = ((first + {block} * b) >> 2)",
            f"    for r in range({n}):",
            *indented(four, 2),
            f"for i in range({block} * (n >> {block.bit_length() - 1}), n):",
            *indented(lines()),
        ]

    def second_look(self, element: "Element", totals: dict[str, str]) -> list[str]:
        """Where squares overflow or vanish: what is in the caches once more, times a power of two."""
        norms = [total for total, op in totals.items() if op == "norm2"]
        if not norms:
            return []

        def squares(total: str, op: str, term: Expr) -> list[str]:
            halves = self.halves(term) if op == "norm2" else []
            return [f"{total} = {total} + square(float64({half}), by_{total})" for half in halves]

        return [
            *(f"by_{total} = refit({total})" for total in norms),
            f"if {' | '.join(f'(by_{total} != 1)' for total in norms)}:",
            *indented(f"{total} = {FIRST['norm2']}" for total in norms),
            *indented(self.loop(lambda: element(squares, False))),
        ]

    def halves(self, e: Expr) -> list[str]:
        """The real numbers that a value is made of."""
        value = self.atom(e)
        return [f"{value}.real", f"{value}.imag"] if e.type == "complex" else [value]

    def taken(self, total: str, op: str, term: Expr) -> list[str]:
        """The line that takes one more element into a reduction."""
        value = self.atom(term)
        if op == "norm2" and term.type == "complex":
            return [f"{total} = {total} + {COMPLEX['abs2', 'complex'].format(f'complex128({value})')}"]
        return [f"{total} = {self.operations[op](total, value)}"]

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
        draw, part, bits = chosen(e)
        which, at = "", "first + i"
        if self.lane is not None:
            if int(part) == philox.PARITY:
                return self.literal(repr(float(self.lane & 1)))
            word = {philox.OWN: self.lane, philox.EVEN: self.lane & 2, philox.ODD: self.lane | 1}[int(part)]
            which, at = f", {word}", "place + r"
        name = f"random_{draw}_{part}_{bits}" + which.replace(", ", "_word_")
        self.words[name, f"{draw}, {part}, {bits}", which] = None
        return f"{name}({', '.join([*map(self.atom, e.args), at])})"

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
                text = self.in_double(e) if id(e) in p.double else self.operation(e)
                name = self.new_name()
            self.names[id(e)] = name
            lines.append(f"{name} = {text}")
        return lines

    def operation(self, e: Expr) -> str:
        """What a node computes; some functions of a quotient do without it."""
        (of, *_) = e.args or (e,)
        single = not {id(e), id(of)} & self.p.double
        if e.op in self.of_quotients and of.op == "divide" and of.type == "real" and single:
            return self.of_quotients[e.op].format(*map(self.atom, of.args))
        return super().operation(e)

    def in_double(self, e: Expr) -> str:
        """What a node computes in float64; others that it reads are widened."""
        real, names = self.real, self.names
        single = [a for a in e.args if a.op != "const" and a.type != "bool" and id(a) not in self.p.double]
        wide = {id(a): self.cast(self.atom(a), WIDE[a.type]) for a in single} if real != "float64" else {}
        try:
            self.real, self.names = "float64", names | wide
            return self.operation(e)
        finally:
            self.real, self.names = real, names

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
    """Which random bits a node is: draw, which part of them, how many bits."""
    options = dict(e.options)
    return [str(options[name]) for name in ("draw", "part", "bits")]


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
