"""How are names, numbers and operations written in a formula?"""

import math
import re
from collections.abc import Callable
from typing import Any

SUM, PRODUCT, POWER, ATOM = range(1, 5)
"""How tightly a printed formula holds together; 0 is looser than a sum: comparisons, cases."""


LETTERS = {
    "lam": r"\lambda",
    "lambd": r"\lambda",
    "weight": "w",
    "sum": "a",
    "average": "a",
    "most": r"\hat{v}",
    "mean": r"\bar{g}",
    "master": "M",
    "low": "L",
    "bound": r"\rho_\infty",
    "rectified": "r",
    "taken": "k",
    "skipped": "n",
    "term": "u",
    "product": r"\pi",
    "size": "s",
    "rows": "r",
    "columns": "c",
    "scale_epsilon": r"\epsilon_x",
    "step": r"\Delta",
    "temperature": "T",
    "grams": "C",
    "bases": "Q",
    "basis": "P",
    "roots": "P",
    "factors": "Q",
    "often": "p",
    "credit": "n",
    "graft_beta": r"\beta_g",
    "graft_epsilon": r"\epsilon_g",
    "precond_eta": r"\eta_Q",
}
"""Letters of the papers for names of settings, of state and of variables."""

OWN_LETTERS = {("Rprop", "g"): r"\tilde{g}", ("AddNoise", "variance"): r"\sigma^2"}
"""The same for single rules."""

GREEK = frozenset(
    ["alpha", "beta", "gamma", "delta", "epsilon", "eta", "ell", "kappa", "mu", "nu", "omega", "psi", "rho"]
).union(["sigma", "tau", "theta", "xi", "zeta"])


COMPARISONS = {
    "less": "<",
    "less_equal": r"\le",
    "greater": ">",
    "greater_equal": r"\ge",
    "equal": "=",
    "not_equal": r"\ne",
    "logical_and": r"\land",
    "logical_or": r"\lor",
}
RANDOM = {
    "normal": (r"\xi_t", r"\mathcal{N}(0, 1)"),
    "uniform": ("u_t", r"\mathcal{U}(0, 1)"),
    "rademacher": ("z_t", r"\mathcal{U}\{-1, 1\}"),
}
"""Kind of random numbers -> their letter, and how they are distributed."""

GIVEN = {"clock": r"\text{clock}", "size": "N", "loss": "f_t", "examples": "n"}
"""What a step is given beside arrays and settings."""

FUNCTIONS = {
    "exp": r"\exp",
    "log": r"\log",
    "sin": r"\sin",
    "cos": r"\cos",
    "tanh": r"\tanh",
    "arctan": r"\arctan",
    "maximum": r"\max",
    "minimum": r"\min",
    "sign": r"\operatorname{sign}",
    "isfinite": r"\operatorname{finite}",
    "isnan": r"\operatorname{nan}",
    "real": r"\operatorname{Re}",
    "imag": r"\operatorname{Im}",
    "join_bits": r"\operatorname{join}",
    **{f"to_{kind}": rf"\operatorname{{{kind}}}" for kind in ("float16", "bfloat16", "float32")},
    "high_bits": r"\operatorname{high}",
    "low_bits": r"\operatorname{low}",
}
ALONG = {-1: "j", -2: "i"}
"""The index along an axis of a matrix: j counts the elements of a row, i those of a column."""

RESULTS = {"eigh": ("w", "Q"), "qr": ("Q", "R"), "svd": ("U", "s", "V^*")}
"""What an operation gives, by its letters."""

SEVERAL = ("every", *RESULTS)
"""Operations that give several values, which are named, not they."""

REDUCTIONS = {"sum": r"\sum", "max": r"\max", "min": r"\min"}


def letter(name: str, owner: str = "") -> str:
    r"""`beta[0]` -> \beta_1."""
    base, _, index = name.partition("[")
    text = OWN_LETTERS.get((owner, base)) or LETTERS.get(base)
    if text is None:
        text = "\\" + base if base in GREEK else base if len(base) == 1 else rf"\mathit{{{base}}}"
    return text if not index else subscripted(text, str(int(index.rstrip("]").split("][")[0]) + 1))


def subscripted(text: str, *more: str) -> str:
    r"""A letter with more below it: (\beta_1, t) -> \beta_{1,t}."""
    found = re.fullmatch(r"(.*?)_(?:\{(.*)\}|(\\?\w+))", text)
    base, below = (found[1], [found[2] or found[3]]) if found else (text, [])
    inner = ",".join([*below, *more])
    return f"{base}_{inner}" if len(inner) == 1 else f"{base}_{{{inner}}}"


def number(value: Any) -> tuple[str, int]:
    """A constant, and how tightly it holds together."""
    if isinstance(value, bool):
        return rf"\text{{{str(value).lower()}}}", ATOM
    if isinstance(value, complex) or not isinstance(value, int | float):
        return rf"\text{{{value}}}", ATOM
    if math.isinf(value):
        return (r"\infty" if value > 0 else r"-\infty"), (ATOM if value > 0 else SUM)
    text = f"{value:g}"
    half, exponent = math.frexp(value)
    if half == 0.5 and abs(exponent) > 20:
        return f"2^{{{exponent - 1}}}", POWER
    if "e" in text:
        digits, _, exponent = text.partition("e")
        power = f"10^{{{int(exponent)}}}"
        return (power, POWER) if digits == "1" else (rf"{digits} \cdot {power}", PRODUCT)
    return text, ATOM if value >= 0 else SUM


def short(path: tuple[Any, ...]) -> str:
    """`beta[0]` for the path of a number or an array, without what is around it."""
    words = [i for i, p in enumerate(path) if isinstance(p, str)]
    at = words[-1] if words else -1
    return str(path[at] if words else "state") + "".join(f"[{p}]" for p in path[at + 1 :])


def parenthesised(text: str) -> str:
    tall = re.search(r"\\(frac|sum|sqrt|begin|left)", text)
    return rf"\left({text}\right)" if tall else f"({text})"


def bars(text: str) -> str:
    return rf"\left|{text}\right|" if "\\frac" in text else f"|{text}|"


AROUND: dict[str, Callable[[str], str]] = {
    "abs": bars,
    "ceil": lambda text: rf"\lceil {text} \rceil",
    "conj": lambda text: rf"\overline{{{text}}}",
    "floor": lambda text: rf"\lfloor {text} \rfloor",
    "norm2": lambda text: rf"\lVert {text} \rVert_2",
    "sqrt": lambda text: rf"\sqrt{{{text}}}",
}
"""Operations that are written around their argument."""


def letters_of(paths: list[tuple[Any, ...]], owner: str) -> list[str]:
    """The letters of what stands at some paths in the state of a rule; of arrays with one letter, each with
    that of what it is part of.
    """
    found = [letter(short(path), owner) for path in paths]
    return [
        subscripted(sign, letter(short(path[:-1]), owner)) if found.count(sign) > 1 and path[:-1] else sign
        for sign, path in zip(found, paths, strict=True)
    ]
