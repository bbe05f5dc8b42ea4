"""Whatever the arrays of a state are called, the kernel's variables are its own."""

import builtins
import keyword
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optimisers as opt
from optimisers.engines.addressed.text import kinds_of, labels_of
from optimisers.engines.cpu.task import sources
from optimisers.engines.labels import fitting
from optimisers.graph.passes import Pass, store_pass
from optimisers.graph.trace import Program, trace

PLAIN = ("m", "v", "velocity", "T", "e1")

USED = (
    *("range", "load_m", "store_m", "at_m", "new_m", "load_x", "store_x", "at_x", "new_x", "x", "dx", "dx2"),
    *("s0", "s1", "s9", "f0", "w0", "t0", "t1", "c0", "i", "n", "k", "c", "s", "h", "q", "first", "counter"),
    *("spans", "chunks", "addresses", "table", "row", "partial", "kernel", "math", "numpy", "njit"),
    *("float32", "float64", "complex64", "select", "claim", "loader", "storer", "sum_of", "free", "one"),
    *("max", "min", "print", "True", "None", "lambda", "def", "self", "_", "__name__", "wide_at_m"),
)
"""Names that a kernel may use itself, or that Python does."""

ODD = (
    # two that look apart and are one
    "\ufb01",
    "fi",
    "\xaa",
    "a",
    "\U0001d426",
    "\u017f",
    "\u212a",
    "K",
    "\xb5",
    "\u03bc",
    "1m",
    "a b",
    "",
    "é",
)
"""Names that are another identifier to Python than they look, or none."""

NAMES = (*PLAIN, *USED, *ODD)


def made_of(names: Sequence[str]) -> opt.Rule:
    """A rule with one array of state a name, each with a factor of its own."""

    class Named(opt.Rule):
        eta: float = 0.1

        def init(self, x: Any) -> Any:
            return {name: opt.zeros_like(x) for name in names}

        def apply(self, state: Any, x: Any, dx: Any) -> Any:
            new = {k: (0.5 + 0.1 * i) * state[k] + (i + 1) * dx for i, k in enumerate(names)}
            step: Any = 0.0 * dx
            for i, k in enumerate(names):
                step = step + (i + 2) * new[k] + state[k]
            return new, self.eta * step

    return Named()


def by_hand(count: int, x: Any, dx: Any, steps: int) -> tuple[Any, list[Any]]:
    """The same formula in float64, with numbers for names."""
    x, states = np.float64(x), [np.zeros(x.shape) for _ in range(count)]
    for _ in range(steps):
        old = states
        states = [(0.5 + 0.1 * i) * s + (i + 1) * dx for i, s in enumerate(old)]
        x = x - 0.1 * sum((i + 2) * new + was for i, (new, was) in enumerate(zip(states, old, strict=True)))
    return x, states


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("start", range(0, len(NAMES), 16))
def test_numbers_are_right_whatever_arrays_are_called(start: int, *, inplace: bool) -> None:
    names = NAMES[start : start + 16]
    x, dx = np.linspace(-1, 1, 37).astype(np.float32), np.linspace(-2, 1, 37).astype(np.float32)
    model = {"w": x.copy()}
    state = opt.setup(made_of(names), model, engine="numba")
    for _ in range(3):
        state, model = (opt.update_ if inplace else opt.update)(state, model, {"w": dx})
    want, states = by_hand(len(names), x, np.float64(dx), 3)
    size = np.abs(want).max()
    np.testing.assert_allclose(model["w"] / size, want / size, atol=1e-6)
    for name, s in zip(names, states, strict=True):
        np.testing.assert_allclose(state["w"].state[name], s, rtol=1e-5, atol=1e-5, err_msg=repr(name))


def printed(names: Sequence[str]) -> tuple[Program, Pass, str]:
    rule, x = made_of(names), np.zeros(3, np.float32)
    program = trace(rule, rule.init(x), x)
    p = store_pass(program, ())
    assert p is not None
    kinds = kinds_of(program, p, "float32", "float32")
    return program, p, sources(program, p, kinds, "float32", inplace=False)


texts = st.one_of(st.sampled_from(NAMES), st.text(min_size=0, max_size=6), st.from_regex(r"\w{1,4}"))


@pytest.mark.slow
@given(st.lists(texts, min_size=1, max_size=8, unique=True))
def test_no_name_is_given_twice(names: list[str]) -> None:
    program, _, text = printed(names)
    body = text[text.index("def kernel") :]
    given = [line.split(" = ")[0].strip() for line in body.splitlines() if " = " in line]
    assert len(given) == len(set(map(normal, given)))
    compile(text, "kernel", "exec")
    labels = fitting(labels_of(program), "")
    outside = set(keyword.kwlist) | set(dir(builtins))
    assert not {normal(label) for label in labels.values()} & outside


def normal(name: str) -> str:
    return unicodedata.normalize("NFKC", name)


def test_a_good_name_stays_for_the_reader() -> None:
    assert "velocity = load_velocity(at_velocity, i)" in printed(PLAIN)[2]
