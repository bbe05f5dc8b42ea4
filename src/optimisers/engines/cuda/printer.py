"""A pass -> the source of a Triton kernel over all leaves of a group; scalars -> the source of one that
computes them on the device.

One launch walks the same tables as the CPU kernel does: a program takes one chunk (leaf, start, length),
loads the numbers of its leaf, then goes through the chunk block by block. Where all arrays of a leaf begin at
multiples of 16 bytes, whole blocks are read and written 16 bytes at a time; what is left takes masks.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import ClassVar

from optimisers.engines.cpu.maths import ARITHMETIC, BYTES, REAL, Maths, Unprintable
from optimisers.engines.cpu.printer import Printer, chosen, indented, random_in, support_hash
from optimisers.engines.labels import fitting
from optimisers.graph.check import check
from optimisers.graph.expr import Expr, order
from optimisers.graph.lower import Lowering
from optimisers.graph.passes import Pass


def _called(function: str) -> Callable[..., str]:
    return lambda *args: f"{function}({', '.join(args)})"


SAME = ("power", "divide", "exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "arctan")

FUNCTIONS = {
    **dict(zip(SAME, SAME, strict=True)),
    "sqrt": "root",
    "floor": "tl.floor",
    "ceil": "tl.ceil",
    "abs": "tl.abs",
    "imag": "tl.zeros_like",
    "where": "tl.where",
    "max": "larger",
    "min": "smaller",
}
"""Operations that kernels write as calls of a function."""

OPERATIONS: dict[str, Callable[..., str]] = {
    **REAL,
    **{op: _called(function) for op, function in FUNCTIONS.items()},
    "logical_not": "({0} == 0)".format,
    "sign": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, {0}))".format,
    "maximum": "tl.where({0} > {1}, {0}, tl.where({0} == {0}, {1}, {0}))".format,
    "minimum": "tl.where({0} < {1}, {0}, tl.where({0} == {0}, {1}, {0}))".format,
    "sum": "{0} + {1}".format,
    "norm2": "{0} + {1} * {1}".format,
}
"""Operations on real numbers, where Triton does not write them as Python does. The reductions at the end take
the value so far first.
"""

IDENTITY = {"sum": "0", "norm2": "0", "max": "-inf", "min": "inf"}
"""What a reduction of nothing is."""


CALLED = (
    *("arctan", "bfloat16_of", "cos", "divide", "exp", "expm1", "high_bits", "join_bits", "larger", "live"),
    *("load", "log", "log1p", "low_bits", "max_over", "min_over", "power", "root", "sin", "smaller", "store"),
    *(
        "random_word",
        "refit",
        "scale_of",
        "sum_over",
        "tanh",
        "to_bfloat16",
        "to_float16",
        "to_float32",
        "widened",
    ),
)
"""What kernels call beside Triton's own functions."""


WIDENED = {"bfloat16": "widened({0})"}
"""Element type -> an element in the type of its arithmetic, where a cast does not do."""

ROUNDED = {"bfloat16": "bfloat16_of({0})", "float16": "({0}).to(tl.float32).to(tl.float16)"}
ROUNDED["int16"] = "({0}).to(tl.float32).to(tl.int16)"
"""Element type -> a number rounded to it, where one cast does not do."""


class _Written(Maths):
    """Maths in the language of Triton."""

    operations: ClassVar[dict[str, Callable[..., str]]] = OPERATIONS
    typed: ClassVar[dict[str, str]] = {}
    casts: ClassVar[dict[tuple[str, str], str]] = {
        ("bool", "real"): "({0}).to(tl.{real})",
        ("real", "bool"): "{0} != 0",
    }

    def literal(self, text: str) -> str:
        number = f'float("{text}")' if "inf" in text or "nan" in text else text
        return f"tl.full([], {number}, tl.{self.real})"

    def cast(self, text: str, kind: str) -> str:
        return f"({text}).to(tl.{kind})"


class _Kernel(_Written, Printer):
    """The text of a kernel of one pass."""

    of_quotients: ClassVar[dict[str, str]] = {}
    scaled = False
    """Whether every gradient is divided by a number on the device."""

    def load(self, array: str, at: str, index: str = "i") -> str:
        kind = ARITHMETIC[self.kinds[array]]
        found = f"load({at}, {index}, n, full)"
        text = WIDENED.get(self.kinds[array], f"({{0}}).to(tl.{kind})").format(found)
        if self.scaled and array.startswith("d"):
            text = f"divide({text}, scale.to(tl.{kind}))"
        return text if kind == self.real else self.cast(text, self.real)

    def random(self, e: Expr) -> str:
        given = [*map(self.atom, e.args), "first + i", *chosen(e)]
        return self.cast(f"random_word({', '.join(given)})", self.real)

    def store(self, array: str, at: str, value: str) -> str:
        kind = self.kinds[array]
        kept = ROUNDED.get(kind, f"({{0}}).to(tl.{kind})").format(value)
        return f"store({at}, i, n, {kept}, full)"

    def source(self, title: str) -> str:
        """The text of the module."""
        if any(self.kinds[a].startswith("complex") for a in self.arrays):
            raise Unprintable("complex numbers")
        at = {a: f"at_{self.names_of(a)}" for a in self.arrays}
        width, totals = len(self.p.scalars), self.totals()
        of_leaf = self.of_leaf([f"tl.load(table + {width} * h + {j})" for j in range(width)])
        given = [*(line.split(" = ")[0] for line in of_leaf), *self.if_scaled("scale")]
        given += ["first"] if random_in(self.p) else []
        head = [f"{self.names_of(a)}: {self.kinds[a]}" for a in self.arrays]
        return _module(
            f"{title}\n\nAddresses, in order: {', '.join(head)}.",
            [
                *self.block(at, given, totals),
                "",
                "",
                '@triton.jit(do_not_specialize=["leaves"])',
                f"def kernel({', '.join(self.arguments())}):",
                *indented(self.start_of_chunk()),
                *indented(of_leaf),
                *indented(line for j, a in enumerate(self.arrays) for line in self.pointers(j, a, at[a])),
                "    whole = tl.where(tl.load(aligned + k) != 0, n // BLOCK * BLOCK, 0)",
                *indented(self.blocks(at, given, totals, ["1.0"] * len(_norms(totals)))),
                *indented(self.look_again(at, given, totals)),
                *indented(self.partial(j, total, op) for j, (total, op) in enumerate(totals.items())),
            ],
        )

    def if_scaled(self, *lines: str) -> tuple[str, ...]:
        """What only kernels have that divide gradients."""
        return lines if self.scaled else ()

    def arguments(self) -> list[str]:
        """What a kernel takes."""
        own = (*self.if_scaled("scale_at", "found"), *(["partial"] if self.p.reductions else []))
        sizes = ("BLOCK: tl.constexpr", "TAIL: tl.constexpr")
        return ["chunks", "addresses", "aligned", "table", "row", "leaves", *own, *sizes]

    def block(self, at: dict[str, str], given: list[str], totals: dict[str, str]) -> list[str]:
        """The function that goes through one block."""
        by = [f"by_{total}" for total in _norms(totals)]
        arguments = [
            "s",
            "n",
            *at.values(),
            *given,
            *totals,
            *by,
            "BLOCK: tl.constexpr",
            "full: tl.constexpr",
        ]
        lines = [*self.element(at), *self.reducing(totals), *self.stores(at)]
        return [
            "@triton.jit",
            f"def block({', '.join(arguments)}):",
            "    i = s + tl.arange(0, BLOCK)",
            *indented(lines),
            *([f"    return {', '.join(totals)}"] if totals else []),
        ]

    def start_of_chunk(self) -> list[str]:
        """Which chunk it is, and the row of scalars of its leaf."""
        lines = ["c = tl.program_id(0)", "k = tl.load(chunks + 3 * c)", "first = tl.load(chunks + 3 * c + 1)"]
        lines += ["n = tl.load(chunks + 3 * c + 2)", *self.if_scaled("scale = tl.load(scale_at)")]
        if not self.p.reductions:
            lines += self.if_scaled("n = tl.where(tl.load(found) != 0, 0, n)")
        return [*lines, "h = tl.load(row + k)"] if self.p.scalars else lines

    def pointers(self, j: int, array: str, name: str) -> list[str]:
        """The pointer to an array, and one that is known to be aligned."""
        kind = self.kinds[array]
        pointer = f"tl.pointer_type(tl.{kind})"
        return [
            f"{name} = tl.load(addresses + {j} * leaves + k) + {BYTES[kind]} * first",
            f"wide_{name} = tl.multiple_of({name}.to({pointer}), 16)",
            f"{name} = {name}.to({pointer})",
        ]

    def look_again(self, at: dict[str, str], given: list[str], totals: dict[str, str]) -> list[str]:
        """Where squares overflow or vanish, the elements are looked at again, times a power of two."""
        norms = _norms(totals)
        if not norms:
            return []
        return [
            *(f"by_{t} = refit(sum_over({t}) + sum_over(rest_{t}))" for t in norms),
            f"if {' | '.join(f'(by_{t} != 1)' for t in norms)}:",
            *indented(self.blocks(at, given, totals, [f"by_{t}" for t in norms])),
        ]

    def partial(self, j: int, total: str, op: str) -> str:
        """The line that keeps a reduction of a chunk."""
        over = "sum" if op == "norm2" else op
        value = self.operations[over](f"{over}_over({total})", f"{over}_over(rest_{total})")
        value = f"root({value}) / by_{total}" if op == "norm2" else value
        return f"tl.store(partial + {j} * tl.num_programs(0) + c, {value})"

    def blocks(
        self, at: dict[str, str], given: list[str], totals: dict[str, str], by: list[str]
    ) -> list[str]:
        """The loops over whole blocks and over what is left; elements of norms are multiplied by `by`."""
        lines: list[str] = []
        for total, op in totals.items():
            lines.append(f'{total} = tl.full([BLOCK], float("{IDENTITY[op]}"), tl.float64)')
            lines.append(f'rest_{total} = tl.full([TAIL], float("{IDENTITY[op]}"), tl.float64)')
        for bounds, size, wide, rest in (
            ("0, whole", "BLOCK", "wide_", ""),
            ("whole, n", "TAIL", "", "rest_"),
        ):
            kept = [rest + total for total in totals]
            values = ["s", "n", *(wide + a for a in at.values()), *given, *kept, *by, size, str(bool(wide))]
            call = f"block({', '.join(values)})"
            lines.append(f"for s in range({bounds}, {size}):")
            lines.append(f"    {', '.join(kept)} = {call}" if totals else f"    {call}")
        return lines

    def reducing(self, totals: dict[str, str]) -> list[str]:
        """The reductions with the elements of one more block in them."""
        lines: list[str] = []
        for (total, op), term in zip(totals.items(), self.p.terms, strict=True):
            value = self.cast(self.atom(term), "float64")
            value = f"{value} * by_{total}" if op == "norm2" else value
            lines.append(f'{total}_next = live({value}, i, n, float("{IDENTITY[op]}"), full)')
            lines.append(f"{total} = {self.operations[op](total, f'{total}_next')}")
        return lines


def _norms(totals: dict[str, str]) -> list[str]:
    """The reductions whose squares may overflow or vanish."""
    return [total for total, op in totals.items() if op == "norm2"]


def source(
    p: Pass,
    kinds: dict[str, str],
    arithmetic: str,
    labels: dict[str, str],
    title: str,
    *,
    inplace: bool,
    scaled: bool = False,
) -> str:
    """The module text of one pass; arguments as those of `kernels.source`.

    `scaled` kernels divide every gradient by a number on the device, and store nothing where another one is
    not 0. Raises Unprintable.
    """

    def written(labels: dict[str, str]) -> str:
        kernel = _Kernel(p, kinds, arithmetic, labels, inplace=inplace)
        kernel.scaled = scaled
        return kernel.source(title)

    return written(fitting(labels, written({})))


# -- scalars -------------------------------------------------------------------------------------------------


class _Scalars(_Written):
    """The text of a kernel that computes scalars of every leaf, in float64."""

    def lines(self, roots: Sequence[Expr], given: dict[int, str]) -> list[str]:
        """The values of lowered nodes from those that are given by id, as text."""
        lines: list[str] = []
        above = order(roots, given)
        known = [e for e in (*roots, *(a for e in above for a in e.args)) if id(e) in given]
        for e in [*dict.fromkeys(known), *above]:
            if e.op == "const":
                continue
            if e.type == "complex":
                raise Unprintable("a complex number beside the arrays")
            text = given[id(e)] if id(e) in given else self.operation(e)
            self.names[id(e)] = self.new_name()
            lines.append(
                f"{self.names[id(e)]} = {text} != 0"
                if id(e) in given and e.type == "bool"
                else f"{self.names[id(e)]} = {text}"
            )
        return lines


def scalar_source(
    wanted: Sequence[Expr],
    counters: Sequence[Expr],
    inputs: Sequence[tuple[Expr, str]],
    width: int,
    hypers: int,
    lowering: Lowering,
    *,
    total: str = "",
) -> str:
    """The module text that computes scalar nodes for every leaf.

    `inputs` says for every known node where it stands: "number j" in a table of `width` columns, "vector j" a
    value for every leaf, "total j" one for all, "size", "clock". New `counters` are written back into the
    table, from column `hypers` on. With `total`, `sum`, `norm2` or `max`, the only value wanted is reduced
    over all leaves, by one program. Raises Unprintable.
    """
    maths = _Scalars("float64")
    given: dict[int, str] = {}
    for e, where in inputs:
        what, _, j = where.partition(" ")
        given[id(lowering.scalar(e))] = {
            "number": f"tl.load(table + {width} * h + {j}, mask=on, other=0)",
            "vector": f"tl.load(vector{j} + k, mask=on, other=0)",
            "total": f"tl.load(total{j}) + tl.zeros([LANES], tl.float64)",
            "size": "tl.load(sizes + k, mask=on, other=0).to(tl.float64)",
            "clock": "tl.load(clock + h, mask=on, other=0).to(tl.float64)",
        }[what]
    body = ["k = at + tl.arange(0, LANES)", "on = k < leaves", "h = tl.load(row + k, mask=on, other=0)"]
    columns = [lowering.cast(lowering.scalar(e), "number") for e in wanted]
    kept = [lowering.cast(lowering.scalar(e), "number") for e in counters]
    check([*columns, *kept])
    body += maths.lines([*columns, *kept], given)
    values = [f"{maths.atom(e)} + tl.zeros([LANES], tl.float64)" for e in columns]
    if total:
        body = _totalled(body, f"tl.where(on, {values[0]}, 0)", total)
    else:
        body.insert(0, "at = tl.program_id(0) * LANES")
        body += [
            f"tl.store(out + {max(1, len(values))} * k + {j}, {v}, mask=on)" for j, v in enumerate(values)
        ]
        if counters:
            body.append("go = k < tl.where(tl.load(found) != 0, 0, leaves)")
        body += [
            f"tl.store(table + {width} * h + {hypers + j}, {maths.atom(e)}, mask=go)"
            for j, e in enumerate(kept)
        ]
    places = [
        where.replace(" ", "")
        for what in ("vector", "total")
        for _, where in inputs
        if where.startswith(what)
    ]
    arguments = ", ".join(["table, row, sizes, clock, found, out", *places, "leaves, LANES: tl.constexpr"])
    return _module(
        "Scalars of every leaf.",
        [
            '@triton.jit(do_not_specialize=["leaves"])',
            f"def kernel({arguments}):",
            *indented(body),
        ],
    )


def _totalled(body: list[str], value: str, join: str) -> list[str]:
    """Lines that reduce a value over all leaves, of which `body` computes it for some."""

    def loop(total: str, last: str) -> list[str]:
        lines = [f"{total} = tl.zeros([LANES], tl.float64)", "for at in range(0, leaves, LANES):"]
        return [*lines, *indented([*body, f"{total} = {last}"])]

    if join == "sum":
        return [*loop("sum_of", f"sum_of + {value}"), "tl.store(out, tl.sum(sum_of))"]
    largest = loop("most", f"larger(most, tl.abs({value}))")
    if join == "max":
        return [*largest, "tl.store(out, max_over(most))"]
    return [
        *largest,
        "scale = scale_of(max_over(most))",
        *loop("sum_of", f"sum_of + ({value} / scale) * ({value} / scale)"),
        "tl.store(out, root(tl.sum(sum_of)) * scale)",
    ]


# -- modules -------------------------------------------------------------------------------------------------


def _module(about: str, lines: list[str]) -> str:
    called = textwrap.fill(", ".join(CALLED), 100, initial_indent="    ", subsequent_indent="    ")
    body = "\n".join(lines)
    return (
        f'"""{about}\n"""\nimport triton\nimport triton.language as tl\n\n'
        f"from optimisers.engines.cuda.device_functions import (\n{called},\n)\n\n"
        f"# functions {support_hash('cuda/device_functions.py')}\n\n\n{body}\n"
    )
