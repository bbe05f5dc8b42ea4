"""Rules that apply one operation, arguments to try it on, and what NumPy says."""

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

import optimisers as opt
from optimisers.ops.dispatch import OPERATIONS, dispatch
from tests.table import dtype_of

ELEMENTWISE = sorted(name for name, op in OPERATIONS.items() if op.family == "elementwise")


REDUCE = sorted(name for name, op in OPERATIONS.items() if op.family == "reduce")


def reduced(name: str, values: Any) -> float:
    """What a reduction is of all elements, by NumPy in float64; of none, what changes no other."""
    if not np.size(values):
        return {"max": -math.inf, "min": math.inf}.get(name, 0.0)
    function = {"norm2": np.linalg.norm}.get(name) or getattr(np, name)
    return float(function(np.asarray(values, float).ravel()))


CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "one": lambda f, x, _: f(x),
    "two": lambda f, x, y: f(x, y),
    "power": lambda f, x, y: f(x, y),
    "condition": lambda f, x, _: f(x > 0),
    "conditions": lambda f, x, y: f(x > 0, y < 1),
    "choice": lambda f, x, y: f(x < y, x, y),
    "halves": lambda f, x, _: f(opt.ops.high_bits(x), opt.ops.low_bits(x)),
}
CALLS["choice of complex"] = lambda f, x, y: f(opt.ops.real(x) < opt.ops.imag(y), x, y)

ARGUMENTS: dict[str, str] = {
    **dict.fromkeys(("add", "subtract", "multiply", "divide", "maximum", "minimum"), "two"),
    **dict.fromkeys(("less", "less_equal", "greater", "greater_equal", "equal", "not_equal"), "two"),
    "power": "power",
    **dict.fromkeys(("logical_and", "logical_or"), "conditions"),
    "logical_not": "condition",
    **dict.fromkeys(("high_bits", "low_bits", "to_float16", "to_bfloat16", "to_float32"), "one"),
    "join_bits": "halves",
    "where": "choice",
    **dict.fromkeys(
        ("negative", "sqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "arctan"), "one"
    ),
    **dict.fromkeys(
        ("floor", "ceil", "sign", "abs", "abs2", "real", "imag", "conj", "isfinite", "isnan"), "one"
    ),
}
"""Operation -> what it is called with."""


COMPLEX = frozenset(
    [
        "add",
        "subtract",
        "multiply",
        "divide",
        "negative",
        "equal",
        "not_equal",
        "where",
        "sign",
        "abs",
        "abs2",
        "real",
        "imag",
        "conj",
        "isfinite",
        "isnan",
    ]
)
"""Operations that kernels know of complex numbers."""


OF_FLOAT32 = frozenset({"join_bits", "high_bits", "low_bits"})
"""Operations on the bits of a float32, which is the arithmetic of float16, bfloat16 and float32 alone."""


ULPS = {"power": 16, "exp": 8, "expm1": 8, "log": 8, "log1p": 8, "sin": 8, "cos": 8, "tanh": 8, "arctan": 8}
"""Units in the last place that the libraries of two engines may differ by; 2 for any other operation."""


def function_of(name: str) -> Callable[..., Any]:
    return lambda *args: dispatch(name, args, {})


class Computes(opt.Rule):
    """Keeps what some operations make of x and dx, and steps nowhere."""

    names: tuple[str, ...] = opt.static(())
    complex: bool = opt.static(False)

    def init(self, x: Any) -> Any:
        kept = {
            w: opt.zeros_like if OPERATIONS[w].gives in ("same", "branch") else opt.ops.real_zeros_like
            for w in self.names
        }
        return {w: like(x) for w, like in kept.items()}

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return {w: self.compute(w, x, dx) for w in self.names}, None

    def compute(self, name: str, x: Any, dx: Any) -> Any:
        call = CALLS["choice of complex" if name == "where" and self.complex else ARGUMENTS[name]]
        made = call(function_of(name), x, dx)
        return opt.where(made, 1, 0) if OPERATIONS[name].gives == "bool" else made


class Reduces(opt.Rule):
    """Keeps a reduction of dx as a number."""

    name: str = opt.static("")

    def init(self, x: Any) -> Any:
        return (0.0,)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return (function_of(self.name)(dx),), None


def computed(rule: opt.Rule, x: Any, dx: Any, engine: str | None) -> Any:
    state = opt.setup(rule, x, engine=engine)
    state, _ = opt.update_(state, x, dx)
    return state.state


def samples(dtype: str) -> Any:
    """Numbers of every kind: zeros, infinities, NaN, subnormals, the largest, small and large ones,
    halves.
    """
    kind = dtype_of(dtype)
    info = ml_dtypes.finfo(kind)
    tiny, least, most = float(info.tiny), float(info.smallest_subnormal), float(info.max)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny, -tiny, least, -least, 3 * least, most, -most]
    plain = [1.0, -1.0, 0.5, -0.5, 1.5, 2.0, 2.5, -3.0, 3.14159, 10.0, 88.0, -100.0, 1e-3, -1e-3, 1e4]
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        spread = rng.standard_normal(40) * 10.0 ** rng.uniform(-4, 4, 40)
        return np.array([*special, *plain, *rng.standard_normal(30), *spread]).astype(kind)


def pairs(dtype: str) -> tuple[Any, Any]:
    """Every sample beside every other."""
    a = samples(dtype)
    x, y = np.meshgrid(a, a)
    return np.ascontiguousarray(x.ravel()), np.ascontiguousarray(y.ravel())


def complex_pairs(dtype: str) -> tuple[Any, Any]:
    """Finite complex numbers, zeros and purely real or imaginary ones among them; nothing that overflows a
    square.
    """
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((2, 500)) + 1j * rng.standard_normal((2, 500))) * 10.0 ** rng.uniform(
        -3, 3, (2, 500)
    )
    x[:50], x[50:100], x[100:120], y[20:60] = x[:50].real, 1j * x[50:100].imag, 0, y[20:60].real
    return x.astype(dtype), y.astype(dtype)  # no y is 0: NumPy and C differ in what they divide by it


def agree(got: Any, wanted: Any, ulps: int) -> None:
    """Equal to some units in the last place; NaN where NaN is, infinities too, subnormals to one of
    theirs.
    """
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.dtype == wanted.dtype
    for a, b in (
        ((got.real, wanted.real), (got.imag, wanted.imag)) if got.dtype.kind == "c" else ((got, wanted),)
    ):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        with np.errstate(all="ignore"):
            size = np.abs(wanted).astype(b.dtype)  # of both parts: one may cancel
            off = (
                (a != b)
                & ~np.isnan(b)
                & ~(np.abs(a.astype(float) - b.astype(float)) <= ulps * np.spacing(size))
            )
        assert not off.any(), (a[off][:5], b[off][:5], np.flatnonzero(off)[:5])


REAL_TYPES = ("float16", "bfloat16", "float32", "float64")


def known_of(dtype: str) -> tuple[str, ...]:
    """The operations that kernels know of this type."""
    if dtype.startswith("complex"):
        return tuple(sorted(COMPLEX))
    return tuple(w for w in ELEMENTWISE if dtype != "float64" or w not in OF_FLOAT32)


BITS = np.concatenate(
    [
        np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32),
        (np.arange(1 << 16, dtype=np.uint32) << 16) + 0x8000,  # the middle between two bfloat16
        (np.arange(1 << 16, dtype=np.uint32) << 16) + 0x7FFF,
    ]
).view(np.float32)
"""Many float32, NaN and infinities among them."""


SUMS = {
    "plain": [1.0, 2.5, -3.0, 0.25],
    "of nothing": [],
    "one": [-2.0],
    "NaN first": [math.nan, 1.0, 2.0],
    "NaN last": [1.0, 2.0, math.nan],
    "negative NaN": [1.0, -math.nan, 2.0],
    "infinite": [1.0, math.inf, -5.0],
    "both infinities": [-math.inf, math.inf],
    "only infinite": [-math.inf, -math.inf],
    "negative": [-1.0, -2.0, -0.5],
    "zeros": [-0.0, 0.0],
    "long": list(np.random.default_rng(0).standard_normal(1001)),
}


HALVES = ("float16", "bfloat16")


class Widens(opt.Rule):
    """Keeps the gradient, in the type of the arithmetic."""

    def init(self, x: Any) -> Any:
        return (opt.zeros_like(x),)

    def apply(self, state: Any, x: Any, dx: Any) -> Any:
        return (dx,), None


def same_bits(got: Any, wanted: Any) -> None:
    """Bit for bit; NaN need not have the same payload, and a zero may have lost its sign in an addition."""
    unsigned = np.dtype(f"u{got.itemsize}")
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(got), nan)
    off = (got.view(unsigned) != wanted.view(unsigned)) & ~nan & ~((got == 0) & (wanted == 0))
    assert not off.any(), (got[off][:5], wanted[off][:5])


def hard_to_round(dtype: str) -> Any:
    """float32: every half, every middle between two, its neighbours; random bits; overflow and subnormals
    among them.
    """
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype_of(dtype)).astype(np.float32)
    finite = np.unique(every[np.isfinite(every)].astype(np.float64))
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    most = finite[-1].astype(np.float32)
    edge = np.array(
        [most, np.nextafter(most, np.float32(np.inf)), np.inf, np.nan, 65519.996, 65520, 1e30], np.float32
    )
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 32, 1 << 19, dtype=np.uint32).view(np.float32)
    up, down = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))
    return np.concatenate([every, middle, up, down, edge, -edge, noise])
