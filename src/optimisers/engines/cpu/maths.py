"""Lowered operations as text: what each of them is in the language of kernels."""

from collections.abc import Callable
from typing import ClassVar

from optimisers.graph.expr import Expr


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
    "abs": _real("math.fabs({0})"),
    "abs2": _real("{0} * {0}"),
    "real": _real("{0}"),
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

TYPED = {"sign": "select({0} > 0, {real}(1), select({0} < 0, -{real}(1), {0}))", "imag": "{real}(0)"}
"""Those that name the type of the arithmetic."""


FUNCTIONS = (
    "arctan",
    "arctan_of",
    "cube_root",
    "exponential",
    "expm1",
    "log1p",
    "logarithm",
    "power",
    "tanh",
)
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


class Maths:
    """Lowered nodes as text; a kernel language says how it writes operations and numbers."""

    operations: ClassVar[dict[str, Callable[..., str]]] = REAL
    typed: ClassVar[dict[str, str]] = TYPED
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
        if e.op in self.typed:
            return self.typed[e.op].format(*args, real=self.real)
        if e.op not in self.operations:
            raise Unprintable(e.op)
        return self.operations[e.op](*args)
