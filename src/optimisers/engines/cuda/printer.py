"""A pass -> the source of a Triton kernel over all leaves of a group; scalars -> the source of one that
computes them on the device.

One launch walks the same tables as the CPU kernel does: a program takes one chunk (leaf, start, length),
loads the numbers of its leaf, then goes through the chunk block by block. Where all arrays of a leaf begin at
multiples of 16 bytes, whole blocks are read and written 16 bytes at a time; what is left takes masks.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import ClassVar

from optimisers.engines.cpu.printer import ARITHMETIC, BYTES, REAL, Maths, Printer, Unprintable, support_hash
from optimisers.graph.expr import Expr, order
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
"""Words that kernels say by calling a function."""

WORDS: dict[str, Callable[..., str]] = {
    **REAL,
    **{word: _called(function) for word, function in FUNCTIONS.items()},
    "logical_not": "({0} == 0)".format,
    "sign": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, {0}))".format,
    "maximum": "tl.where({0} > {1}, {0}, tl.where({0} == {0}, {1}, {0}))".format,
    "minimum": "tl.where({0} < {1}, {0}, tl.where({0} == {0}, {1}, {0}))".format,
    "sum": "{0} + {1}".format,
}
"""Words on real numbers, where Triton does not write them as Python does. The reductions at the end take the
value so far first.
"""

IDENTITY = {"sum": "0", "max": "-inf", "min": "inf"}
"""What a reduction of nothing is."""


CALLED = (
    *("arctan", "bfloat16_of", "cos", "divide", "exp", "expm1", "high_bits", "join_bits", "larger", "live"),
    *("load", "log", "log1p", "low_bits", "max_over", "min_over", "power", "root", "sin", "smaller", "store"),
    *("sum_over", "tanh", "to_bfloat16", "to_float16", "to_float32", "widened"),
)
"""What kernels call beside Triton's own words."""


class _Written(Maths):
    """Maths in the words of Triton."""

    words: ClassVar[dict[str, Callable[..., str]]] = WORDS

    def literal(self, text: str) -> str:
        number = f'float("{text}")' if "inf" in text or "nan" in text else text
        return f"tl.full([], {number}, tl.{self.real})"

    def cast(self, text: str, kind: str) -> str:
        return f"({text}).to(tl.{kind})"


class _Kernel(_Written, Printer):
    """The text of a kernel of one pass."""

    reserved = Printer.reserved | {
        *(
            "tl",
            "triton",
            "aligned",
            "whole",
            "leaves",
            "full",
            "scale",
            "scale_at",
            "found",
            "BLOCK",
            "TAIL",
        ),
        *("block", "kernel", "float", "range", *CALLED),
    }

    def __init__(
        self,
        p: Pass,
        kinds: dict[str, str],
        arithmetic: str,
        labels: dict[str, str],
        *,
        inplace: bool,
        scaled: bool,
    ) -> None:
        super().__init__(p, kinds, arithmetic, labels, inplace=inplace)
        self.scaled = scaled

    def load(self, array: str, at: str) -> str:
        kind = ARITHMETIC[self.kinds[array]]
        text = f"load({at}, i, n, full)"
        text = f"widened({text})" if self.kinds[array] == "bfloat16" else self.cast(text, kind)
        return f"divide({text}, scale.to(tl.{kind}))" if self.scaled and array.startswith("d") else text

    def store(self, array: str, at: str, value: str) -> str:
        kind = self.kinds[array]
        kept = f"bfloat16_of({value})" if kind == "bfloat16" else f"({value}).to(tl.{kind})"
        return f"store({at}, i, n, {kept}, full)"

    def source(self, title: str) -> str:
        """The text of the module."""
        p = self.p
        if any(self.kinds[a].startswith("complex") for a in self.arrays):
            raise Unprintable("complex numbers")
        lines = ["c = tl.program_id(0)", "k = tl.load(chunks + 3 * c)", "first = tl.load(chunks + 3 * c + 1)"]
        lines.append("n = tl.load(chunks + 3 * c + 2)")
        if self.scaled:
            lines.append("scale = tl.load(scale_at)")
            lines += [] if p.reductions else ["n = tl.where(tl.load(found) != 0, 0, n)"]
        scalars = self.scalars(lines)
        at = self.places(lines)
        sums = [self.name(f"{r.op}_of") for r in p.reductions]
        for r, total in zip(p.reductions, sums, strict=True):
            if r.type == "complex":
                raise Unprintable("a sum of complex numbers")
            lines.append(f'{total} = tl.full([BLOCK], float("{IDENTITY[r.op]}"), tl.float64)')
            lines.append(f'rest_{total} = tl.full([TAIL], float("{IDENTITY[r.op]}"), tl.float64)')
        inner = ["i = s + tl.arange(0, BLOCK)", *self.element(at, sums)]
        inner += [f"return {', '.join(sums)}"] if sums else []
        lines.append("whole = tl.where(tl.load(aligned + k) != 0, n // BLOCK * BLOCK, 0)")
        more = [*scalars, *(["scale"] if self.scaled else [])]
        for bounds, size, wide, rest in (
            ("0, whole", "BLOCK", "wide_", ""),
            ("whole, n", "TAIL", "", "rest_"),
        ):
            kept = [rest + total for total in sums]
            given = ["s", "n", *(wide + a for a in at.values()), *more, *kept, size, str(bool(wide))]
            call = f"block({', '.join(given)})"
            lines.append(f"for s in range({bounds}, {size}):")
            lines.append(f"    {', '.join(kept)} = {call}" if sums else f"    {call}")
        for j, (r, total) in enumerate(zip(p.reductions, sums, strict=True)):
            value = self.words[r.op](f"{r.op}_over({total})", f"{r.op}_over(rest_{total})")
            lines.append(f"tl.store(partial + {j} * tl.num_programs(0) + c, {value})")
        arguments = ["chunks", "addresses", "aligned", "table", "row", "leaves"]
        arguments += [*(["scale_at", "found"] if self.scaled else []), *(["partial"] if p.reductions else [])]
        of_block = ["s", "n", *at.values(), *more, *sums, "BLOCK: tl.constexpr", "full: tl.constexpr"]
        head = [f"{self.names_of(a)}: {self.kinds[a]}" for a in self.arrays]
        return _module(
            f"{title}\n\nAddresses, in order: {', '.join(head)}.",
            [
                "@triton.jit",
                f"def block({', '.join(of_block)}):",
                *("    " + line for line in inner),
                "",
                "",
                '@triton.jit(do_not_specialize=["leaves"])',
                f"def kernel({', '.join([*arguments, 'BLOCK: tl.constexpr', 'TAIL: tl.constexpr'])}):",
                *("    " + line for line in lines),
            ],
        )

    def scalars(self, lines: list[str]) -> list[str]:
        """Names of the scalars of the leaf; lines that load them."""
        names: list[str] = []
        if self.p.scalars:
            lines.append("h = tl.load(row + k)")
        for j, e in enumerate(self.p.scalars):
            if e.type == "complex":
                raise Unprintable("a complex number beside the arrays")
            name = self.names[id(e)] = self.name(f"c{j}")
            value = f"tl.load(table + {len(self.p.scalars)} * h + {j})"
            lines.append(
                f"{name} = {value} != 0" if e.type == "bool" else f"{name} = {self.cast(value, self.real)}"
            )
            names.append(name)
        return names

    def places(self, lines: list[str]) -> dict[str, str]:
        """Name of the pointer to each array; lines that make it, and one that is known to be aligned."""
        at: dict[str, str] = {}
        for j, a in enumerate(self.arrays):
            name = at[a] = self.name(f"at_{self.names_of(a)}")
            pointer = f"tl.pointer_type(tl.{self.kinds[a]})"
            lines.append(f"{name} = tl.load(addresses + {j} * leaves + k) + {BYTES[self.kinds[a]]} * first")
            lines.append(f"wide_{name} = tl.multiple_of({name}.to({pointer}), 16)")
            lines.append(f"{name} = {name}.to({pointer})")
        return at

    def counted(self, op: str, value: str) -> str:
        return f'live({self.cast(value, "float64")}, i, n, float("{IDENTITY[op]}"), full)'


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
    return _Kernel(p, kinds, arithmetic, labels, inplace=inplace, scaled=scaled).source(title)


# -- scalars -------------------------------------------------------------------------------------------------


class _Scalars(_Written):
    """The text of a kernel that computes scalars of every leaf, in float64."""

    reserved = _Kernel.reserved | {
        *("table", "row", "sizes", "clock", "out", "at", "on", "go", "sum_of", "LANES"),
    }

    def lines(self, wanted: Sequence[Expr], given: dict[int, str]) -> list[str]:
        """The values of nodes from those that are given by id, as text."""
        lines: list[str] = []
        above = order(wanted, given)
        known = [e for e in (*wanted, *(a for e in above for a in e.args)) if id(e) in given]
        for e in [*dict.fromkeys(known), *above]:
            if e.op == "const":
                continue
            if e.type == "complex":
                raise Unprintable("a complex number beside the arrays")
            name = self.name("t")
            text = given.get(id(e)) or (self.atom(e.args[0]) if e.op == "scheduled" else self.word(e))
            lines.append(
                f"{name} = {text} != 0" if id(e) in given and e.type == "bool" else f"{name} = {text}"
            )
            self.names[id(e)] = name
        return lines


def scalar_source(
    wanted: Sequence[Expr],
    counters: Sequence[Expr],
    inputs: Sequence[tuple[Expr, str]],
    width: int,
    hypers: int,
    *,
    total: bool,
) -> str:
    """The module text that computes scalar nodes for every leaf.

    `inputs` says for every known node where it stands: "number j" in a table of `width` columns, "vector j" a
    value for every leaf, "total j" one for all, "size", "clock". New `counters` are written back into the
    table, from column `hypers` on. With `total` the only value wanted is summed over all leaves, by one
    program. Raises Unprintable.
    """
    maths = _Scalars("float64")
    given: dict[int, str] = {}
    for e, where in inputs:
        what, _, j = where.partition(" ")
        given[id(e)] = {
            "number": f"tl.load(table + {width} * h + {j}, mask=on, other=0)",
            "vector": f"tl.load(vector{j} + k, mask=on, other=0)",
            "total": f"tl.load(total{j}) + tl.zeros([LANES], tl.float64)",
            "size": "tl.load(sizes + k, mask=on, other=0).to(tl.float64)",
            "clock": "tl.load(clock + h, mask=on, other=0).to(tl.float64)",
        }[what]
    body = ["k = at + tl.arange(0, LANES)", "on = k < leaves", "h = tl.load(row + k, mask=on, other=0)"]
    body += maths.lines([*wanted, *counters], given)
    values = [f"{maths.atom(e, number=True)} + tl.zeros([LANES], tl.float64)" for e in wanted]
    if total:
        body.append(f"sum_of += tl.where(on, {values[0]}, 0)")
        body = [
            "sum_of = tl.zeros([LANES], tl.float64)",
            "for at in range(0, leaves, LANES):",
            *("    " + line for line in body),
            "tl.store(out, tl.sum(sum_of))",
        ]
    else:
        body.insert(0, "at = tl.program_id(0) * LANES")
        body += [
            f"tl.store(out + {max(1, len(values))} * k + {j}, {v}, mask=on)" for j, v in enumerate(values)
        ]
        if counters:
            body.append("go = k < tl.where(tl.load(found) != 0, 0, leaves)")
        body += [
            f"tl.store(table + {width} * h + {hypers + j}, {maths.atom(e, number=True)}, mask=go)"
            for j, e in enumerate(counters)
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
            *("    " + line for line in body),
        ],
    )


# -- modules -------------------------------------------------------------------------------------------------


def _module(about: str, lines: list[str]) -> str:
    called = textwrap.fill(", ".join(CALLED), 100, initial_indent="    ", subsequent_indent="    ")
    body = "\n".join(lines)
    return (
        f'"""{about}\n"""\nimport triton\nimport triton.language as tl\n\n'
        f"from optimisers.engines.cuda.device_functions import (\n{called},\n)\n\n"
        f"# functions {support_hash('cuda/device_functions.py')}\n\n\n{body}\n"
    )
