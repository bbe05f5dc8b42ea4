"""Our compiler and Numba make the same of a kernel: its text is one of Numba too, but for the decorator."""

import gc
import linecache
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optimisers as opt
from optimisers import ops
from optimisers.engines import cache
from optimisers.engines.addressed.chunks import Chunks
from optimisers.engines.cpu import compiler, machine, task
from optimisers.rule import Rule
from tests.table import dtype_of, numbers

SIGNATURE = "void(i8, i8[::1], i8[:,::1], i8[:,::1], f8[:,::1], i8[::1], f8[:,::1])"

SIZES = np.array([1, 7, 300, 70001])


def by_numba(text: str) -> Any:
    """A kernel, compiled by Numba."""
    flags = re.search(r"@compiled\((.*)kept=True.*\)", text)
    assert flags is not None
    options = f'"{SIGNATURE}", nogil=True, error_model="numpy", fastmath={{{flags[1].rstrip(", ")}}}'
    text = text.replace("from optimisers.engines.cpu.kernel import compiled", "from numba import njit")
    text = text.replace(flags[0], f"@njit({options})").replace("table, row):", "table, row, partial):")
    name, space = f"<kernel {hash(text)}>", dict[str, Any]()
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), space)
    return space["kernel"]


def given(kind: str, size: int, rng: np.random.Generator) -> Any:
    """Numbers of all sizes, some of them none."""
    if kind == "int16":
        return rng.integers(-30000, 30000, size).astype(np.int16)
    x = numbers(rng, (size,), kind)
    with np.errstate(all="ignore"):
        x *= (10.0 ** rng.integers(-3, 3, size)).astype(x.real.dtype)
        for start, value in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, 1e30)):
            x[40 + start :: 97] = value
    return x


def ran(kernel: Any, text: str) -> list[Any]:
    """What a kernel leaves in its arrays and in its sums."""
    rng = np.random.default_rng(7)
    about = text.partition("Addresses, in order: ")[2].partition(".\n")[0]
    kinds = [one.split(": ")[1] for one in about.split(", ")]
    arrays = [[given(kind, n, rng) for n in SIZES] for kind in kinds]
    addresses = np.array([[x.ctypes.data for x in row] for row in arrays], np.int64)
    chunks = Chunks(SIZES)
    columns = [int(c) + 1 for c in re.findall(r"table\[h, (\d+)\]", text)]
    table = rng.uniform(0.05, 1.5, (2, max(columns, default=1)))
    partial = np.zeros((text.count("partial["), len(chunks.leaf)))
    counter = np.zeros(1, np.int64)
    kernel(counter.ctypes.data, chunks.spans, chunks.table, addresses, table, np.array([0, 1, 1, 0]), partial)
    return [*(x for row in arrays for x in row), partial]


def texts(rule: Rule, dtype: str, *, inplace: bool = True) -> list[str]:
    """The kernels of a rule; the rows of the table are named in comments alone."""
    found = opt.kernel(rule, dtype_of(dtype), inplace=inplace).split('"""One pass')[1:]
    return ['"""One pass' + re.sub(r"\n(?:# [cf]\d+ = .*\n)+$", "\n", text) for text in found]


class Words(opt.Rule):
    """Every operation of kernels, once."""

    eta: float = 0.1

    def apply(self, state: Any, x: Any, dx: Any) -> tuple[Any, Any]:
        y = abs(dx) + 0.5
        step = ops.exp(-y) + ops.log(y) + ops.sin(dx) + ops.cos(dx) + ops.tanh(dx) + ops.arctan(dx)
        step = step + ops.floor(dx) - ops.ceil(x) + ops.sign(dx) + ops.sqrt(y) + ops.expm1(-y) + ops.log1p(y)
        step = ops.where(ops.isfinite(step) & ~ops.isnan(dx) | (dx > 3), step, -self.eta * x)
        step = ops.maximum(step, x / y) + ops.minimum(step, y ** (1 / 3)) + (x <= dx) * y + (x == dx) * x
        return state, ops.where(ops.isnan(dx), x, step * y**self.eta)


class Extremes(opt.Rule):
    """Reductions to the largest and the smallest element."""

    def apply(self, state: Any, x: Any, dx: Any) -> tuple[Any, Any]:
        return state, dx / (ops.max(abs(dx)) - ops.min(x) + ops.sum(x))


class Turned(opt.Rule):
    """Complex numbers, of which no two in a row are multiplied: how those are joined is left to LLVM."""

    def apply(self, state: Any, x: Any, dx: Any) -> tuple[Any, Any]:
        turned = ops.where(abs(dx) > 1, dx, ops.conj(dx)) * x
        return state, ops.where((dx == x) | ops.isnan(dx) | ~ops.isfinite(x), -turned, turned)


CASES: dict[str, tuple[Rule, str]] = {
    "every operation": (Words(), "float32"),
    "every operation in double precision": (Words(), "float64"),
    "extremes": (Extremes(), "float32"),
    "norms": (opt.Chain(opt.ClipGlobalNorm(1.0), opt.AdamW()), "float32"),
    "halves": (opt.Chain(opt.ClipNorm(1.0), opt.AdamW()), "float16"),
    "split numbers": (opt.SplitPrecision(opt.Lion()), "bfloat16"),
    "random numbers": (opt.SGLD(), "float32"),
    "complex": (Turned(), "complex64"),
    "complex norms": (opt.Chain(opt.ClipNorm(1.0), opt.Momentum()), "complex128"),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_numba_to_the_bit(case: str) -> None:
    """With vectors of the width that both leave to LLVM: sums are taken in the order of these."""
    pytest.importorskip("ml_dtypes")
    for text in (re.sub(", wide=4", "", text) for text in texts(*CASES[case])):
        ours, theirs = ran(cache.load(text).kernel.run, text), ran(by_numba(text), text)
        for x, y in zip(ours, theirs, strict=True):
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            assert same.all(), (text, x[~same][:3], y[~same][:3])


@pytest.mark.parametrize(
    ("rule", "dtype", "wide"),
    [
        (opt.SGLD(), "float32", True),
        (opt.MADGRAD(), "float32", True),
        (opt.AdamAtan2(), "float16", True),
        (opt.Chain(opt.ClipNorm(1.0), opt.Descent()), "float32", True),  # float64 beside float32
        (opt.Lion(), "float32", False),  # memory is slower than its arithmetic
        (opt.MADGRAD(), "float64", False),  # a call of C for each element
    ],
    ids=repr,
)
def test_loops_with_much_arithmetic_fill_the_widest_vectors(
    rule: Rule, dtype: str, wide: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text, seen = texts(rule, dtype)[0], list[str]()
    monkeypatch.setattr(
        machine, "vector", lambda: 256
    )  # no processor has such, and LLVM would not ask for them
    monkeypatch.setattr(cache, "_loaded", {})
    optimise = machine.optimised
    monkeypatch.setattr(machine, "optimised", lambda m: seen.append(str(optimise(m))) or optimise(m))
    cache.load(text, tmp_path / "kernels")

    assert [("<64 x float>" in code) for code in seen] == [wide]


def test_complex_numbers_are_divided_as_numpy_divides() -> None:
    class Divided(opt.Rule):
        def apply(self, state: Any, x: Any, dx: Any) -> tuple[Any, Any]:
            return state, x / dx

    rng = np.random.default_rng(3)
    x, dx = (numbers(rng, (500,), "complex128") for _ in range(2))
    dx[::7] = dx[::7].real
    dx[::11] *= 1e200
    _, new = opt.update(opt.setup(Divided(), x, engine="numba"), x, dx)
    np.testing.assert_allclose(new, x - x / dx, rtol=1e-13)
    _, new = opt.update(opt.setup(Divided(), x, engine="numba"), x, np.zeros_like(x))
    assert np.isnan(new).all()


HEAD = """from optimisers.engines.cpu.kernel import compiled
from optimisers.engines.cpu.intrinsics import claim, loader, storer

load = loader("float32", 0, 1, "float32")
store = storer("float32", 0, 1, "float32")


@compiled(kept=True)
def kernel(counter, spans, chunks, addresses, table, row):
"""

DOUBLED = (
    HEAD
    + """    for i in range(chunks[0, 2]):
        store(addresses[0, 0], i, load(addresses[0, 0], i) * 2)
"""
)


def doubled(module: Any) -> None:
    x = np.arange(5, dtype=np.float32)
    chunks, addresses = Chunks(np.array([5])), np.array([[x.ctypes.data]])
    module.kernel.run(
        0, chunks.spans, chunks.table, addresses, np.zeros((1, 1)), np.zeros(1, np.int64), task.NOTHING
    )
    assert x.tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    "line",
    [
        "x = y",
        "x = spans[0] / 2",
        "x = addresses.shape",
        "x = [1]",
        "del row",
        "if claim(counter) > 1:\n        x = 1\n    else:\n        x = 2",
        "while row[0] > 1:\n        x = 2",
        "for i, j in zip(row, row):\n        x = 2",
        "x = load(addresses[0, 0], table[0, 0])",
    ],
)
def test_a_word_that_is_not_known_is_an_error(line: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(compiler.Unknown):
        cache.load(f"{HEAD}    {line}\n", tmp_path / "kernels")


def test_compiled_code_is_kept_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compilations: list[Any] = []
    compile_ = machine.object_code
    monkeypatch.setattr(machine, "object_code", lambda m: compilations.append(m) or compile_(m))
    for _ in range(2):
        monkeypatch.setattr(cache, "_loaded", {})
        doubled(cache.load(DOUBLED, tmp_path / "kernels"))
    assert len(compilations) == 1

    (kept,) = tmp_path.glob("kernels/__pycache__/*.o")
    kept.write_bytes(kept.read_bytes() + b"?")
    for _ in range(2):  # what is broken is thrown away, and kept the next time
        monkeypatch.setattr(cache, "_loaded", {})
        doubled(cache.load(DOUBLED, tmp_path / "kernels"))
    assert len(compilations) == 3
    assert len(list(tmp_path.glob("kernels/__pycache__/*.o"))) == 1


def test_code_of_other_machines_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for edition in ("ours", "theirs"):
        monkeypatch.setattr(machine, "edition", lambda edition=edition: edition)
        monkeypatch.setattr(cache, "_loaded", {})
        doubled(cache.load(DOUBLED, tmp_path / "kernels"))
    assert len(list(tmp_path.glob("kernels/__pycache__/*.o"))) == 2


def test_code_goes_with_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # kernels of other tests have gone
    closed: list[object] = []
    tracker = machine.llvm.orcjit.ResourceTracker
    dispose = tracker._dispose
    monkeypatch.setattr(tracker, "_dispose", lambda self: closed.append(self.name) or dispose(self))
    monkeypatch.setattr(cache, "_recent", {})
    module = cache.load(DOUBLED + "# gone soon\n")
    doubled(module)
    assert closed == []

    cache._recent.clear()
    del module
    gc.collect()
    assert len(closed) == 1
