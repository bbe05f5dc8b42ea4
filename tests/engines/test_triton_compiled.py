"""The kernels for CUDA, compiled ahead of time without a device: their assembly says what memory they touch.

Functions such as `exp` come from NVIDIA's libdevice here, as on a device; where Triton's interpreter runs the
same kernels, they are NumPy's. So what they compute is tested there, and that they compile is tested here.
"""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import optimisers as opt
from optimisers.engines.addressed import text as texts
from optimisers.engines.cpu import printer as kernels
from optimisers.engines.cuda import launch
from optimisers.engines.cuda import printer as triton_kernels
from optimisers.engines.cuda import task as engine
from optimisers.state.group import Shape, grouped, started
from tests.table import TABLE, Row

ARCHITECTURES = (80, 90)
"""Compute capabilities: A100 and H100."""

WORKERS = 2

THREADS = 32 * launch.OPTIONS["num_warps"]

POINTERS = {
    **dict.fromkeys(("chunks", "addresses", "aligned", "row", "sizes", "begin"), "*i64"),
    **dict.fromkeys(("table", "partial", "out", "vector", "total"), "*fp64"),
    **dict.fromkeys(("scale_at", "found"), "*fp32"),
}
"""What a kernel is given, without the digits at the end; everything else is a number."""


class Case(NamedTuple):
    """A kernel to compile: the text of its module, or its name among those written by hand."""

    title: str
    text: str
    constants: dict[str, Any]
    options: dict[str, Any]
    clock: str = "*fp64"
    loads: int = 0
    stores: int = 0
    """How many accesses of 16 bytes it takes a pass to read, and to write, all its arrays."""

    @property
    def key(self) -> str:
        """Equal for kernels that differ in their docstring alone."""
        return repr((self.text.rpartition('"""\n')[2], self.constants, self.options, self.clock))


# -- compiling -----------------------------------------------------------------------------------------------

WORKER = """
import contextlib, io, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimisers.engines import cache
from optimisers.engines.cuda import device_functions

assert not device_functions.INTERPRETED
found = []
for key, text, constants, options, pointers, architecture in json.load(sys.stdin):
    kernel = getattr(device_functions, text, None) if text.isidentifier() else cache.load(text).kernel
    kinds = {n: pointers.get(n.rstrip("0123456789"), "i32") for n in kernel.arg_names}
    kinds = {n: "constexpr" if n in constants else kind for n, kind in kinds.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if kinds[n][0] == "*"}
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            source = ASTSource(kernel, kinds, constexprs=constants, attrs=aligned)
            made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        found.append((key, architecture, made.asm["ptx"], log.getvalue()))
    except Exception as error:
        found.append((key, architecture, "", f"{type(error).__name__}: {error}"))
json.dump(found, sys.stdout)
"""


def compile_all(cases: list[tuple[Case, int]], where: Path) -> dict[Any, Any]:
    """(kernel, architecture) -> (assembly, what the assembler said), by some processes at once."""
    unique = list({(case.key, architecture): (case, architecture) for case, architecture in cases}.values())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(where), "TRITON_DUMP_PTXAS_LOG": "1"}

    def work(n: int) -> list[Any]:
        items = [
            (c.key, c.text, c.constants, c.options, POINTERS | {"clock": c.clock}, architecture)
            for c, architecture in unique[n::WORKERS]
        ]
        ended = subprocess.run(
            [sys.executable, "-c", WORKER],
            input=json.dumps(items),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    with ThreadPoolExecutor(WORKERS) as pool:
        found = [x for part in pool.map(work, range(WORKERS)) for x in part]
    return {(key, architecture): (ptx, log) for key, architecture, ptx, log in found}


# -- which kernels there are ---------------------------------------------------------------------------------


@functools.cache
def group_of(row: Row, dtype: str) -> Any:
    x = torch.zeros(2, 3, dtype=getattr(torch, dtype))
    (group,) = grouped([(0, row.rule, started(row.rule, x, "x"))], [Shape.of(x)])
    return group


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(constants of a kernel, how it is compiled)."""
    constants = {k: v for k, v in options.items() if k.isupper()}
    return constants, {k: v for k, v in options.items() if k not in constants}


@functools.cache
def passes_of(
    row: Row, dtype: str, gradient: str, *, inplace: bool = True, scaled: bool = False
) -> list[Case]:
    """The passes of a row."""
    found = []
    program = group_of(row, dtype).program
    for p in texts.sample_passes(program):
        kinds = texts.kinds_of(program, p, dtype, gradient)
        text = engine.sources(program, p, kinds, dtype, inplace=inplace, scaled=scaled)
        what = "reduction" if p.reductions else "store"
        title = (
            f"{row.name} {dtype} {gradient} {what}{' scaled' if scaled else ''}{'' if inplace else ' anew'}"
        )
        read = [kinds[a] for a in (*p.loads, *(f"f{n}" for n in range(len(p.free))))]
        written = [kinds[a] for a, _ in p.stores]
        loads, stores = (
            sum(launch.BLOCK // THREADS * kernels.BYTES[kind] // 16 for kind in kinds)
            for kinds in (read, written)
        )
        loads *= 2 if any(r.op == "norm2" for r in p.reductions) else 1  # there is a second look
        constants, options = split(launch.options_of(kernels.BYTES[dtype]))
        found.append(Case(title, text, constants, options, loads=loads, stores=stores))
    return found


class Way(NamedTuple):
    """How the passes of some rows are compiled, and for which devices."""

    dtype: str
    gradient: str
    architectures: tuple[int, ...]
    inplace: bool = True
    scaled: bool = False
    names: tuple[str, ...] = ("AdamW", "Chain-accumulate-clip-AdamW", "Chain-global-AdamW", "MixedPrecision")
    """The rows; of every row where there are none."""

    def passes(self) -> list[Case]:
        """All that differ in kind."""
        rows = (row for row in TABLE if row.takes(self.dtype) and (not self.names or row.name in self.names))
        options = {"inplace": self.inplace, "scaled": self.scaled}
        return differing([x for row in rows for x in passes_of(row, self.dtype, self.gradient, **options)])


WAYS = {
    "float32": Way("float32", "float32", (80,), names=()),
    "bfloat16": Way("bfloat16", "bfloat16", (90,), names=()),
    "float16": Way("float16", "float16", (80,)),
    "float64": Way("float64", "float64", (90,)),
    "gradients of another type": Way("bfloat16", "float32", (80,)),
    "anew": Way("float32", "float32", (90,), inplace=False),
    "scaled": Way("float32", "float32", (80,), scaled=True),
    "scaled bfloat16": Way("bfloat16", "bfloat16", (90,), scaled=True),
}


def differing(cases: list[Case]) -> list[Case]:
    """Those of some kernels that show a statement which no larger one has, under whatever names and with
    whatever numbers: what one row computes between reading and writing is printed as for all others.
    """
    seen: set[tuple[str, str]] = set()
    kept = []
    for case in sorted(cases, key=lambda case: -len(case.text)):
        shown = {(form, case.clock) for form in forms(case.text)}
        if shown - seen:
            kept.append(case)
        seen |= shown
    return kept


def forms(text: str) -> set[str]:
    """The statements of a kernel, their names and numbers left out."""
    lines = (line.strip() for line in text.rpartition('"""\n')[2].splitlines())
    stated = (line for line in lines if not line.startswith(("block(", "def ")))
    numbered = (re.sub(r"\b\d+(\.\d+)?(e-?\d+)?\b", "0", line) for line in stated)
    return {re.sub(r"(?<!\.)\b(?!tl\b)[a-z]\w*\b(?!\()", "_", line) for line in numbered}


@functools.cache
def scalars_of(row: Row) -> list[Case]:
    """The kernels for scalars that a step of a row launches, as it launches them."""
    texts: list[tuple[str, str]] = []
    original = triton_kernels.scalar_source
    for capturable in (False, True):
        kind = "*fp64" if capturable else "*fp32"

        def noted(*args: Any, kind: str = kind, **options: Any) -> str:
            texts.append((original(*args, **options), kind))
            return texts[-1][0]

        model = [torch.full((2, 3), 0.5, dtype=getattr(torch, row.single)) for _ in range(2)]
        state = opt.setup(row.rule, model, engine="triton", capturable=capturable)
        triton_kernels.scalar_source = noted
        try:
            opt.update_(state, model, [x.clone() for x in model])
        finally:
            triton_kernels.scalar_source = original
    return [
        Case(f"{row.name} scalars", text, {"LANES": launch.LANES}, launch.EXACT, kind) for text, kind in texts
    ]


def differing_scalars() -> list[Case]:
    return differing([case for row in TABLE for case in scalars_of(row)])


BY_HAND = [
    *(
        Case(f"gather {op}", "gather", {"OP": op, "BLOCK": 1024}, launch.EXACT)
        for op in ("sum", "max", "min", "norm2")
    ),
    *(
        Case(f"add_up {op}", "add_up", {"OP": op, "BLOCK": 8192}, launch.EXACT | {"num_warps": 16})
        for op in ("sum", "norm2")
    ),
]

FOLLOWING = Row(
    "following",
    opt.Chain(
        opt.ClipGlobalNorm(), opt.AdamW(opt.Cosine(0.1, 100, warmup=10), (opt.Linear(0.9, 0.8, 9), 0.99))
    ),
)
"""Settings that follow the clock are computed by the kernel for scalars."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """All kernels of this file."""
    cases = [(case, n) for way in WAYS.values() for case in way.passes() for n in way.architectures]
    by_hand_or_for_scalars = [*BY_HAND, *differing_scalars(), *scalars_of(FOLLOWING)]
    cases += [(case, n) for case in by_hand_or_for_scalars for n in ARCHITECTURES]
    return compile_all(cases, tmp_path_factory.mktemp("triton"))


# -- what they do --------------------------------------------------------------------------------------------

CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def refuse_spills(case: Case, architecture: int, compiled: dict[Any, Any]) -> str:
    """The assembly of a kernel, which keeps everything in registers."""
    ptx, log = compiled[case.key, architecture]
    where = f"{case.title}, sm_{architecture}"

    assert f".target sm_{architecture}" in ptx, (where, log)
    assert ".local" not in ptx, where
    assert set(re.findall(r"\d+ bytes stack frame.*", log)) == {CLEAN}, (where, log)
    return ptx


def accesses(ptx: str, word: str) -> Counter[int]:
    """How often so many bytes are read or written at once."""
    found = re.findall(rf"\b{word}\.global(?:\.[a-zA-Z_0-9:]+?)*?(?:\.v([248]))?\.[bfsu](8|16|32|64)\b", ptx)
    return Counter(int(n or 1) * int(bits) // 8 for n, bits in found)


def test_accesses_are_counted_by_their_width() -> None:
    ptx = """
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.b16 %rs1, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.f64 { %rd1, %rd2 }, [ %rd1 ];
        st.global.v2.b32 [ %rd1 ], { %r1, %r2 };
        ld.shared.b32 %r1, [%r2];
    """

    assert accesses(ptx, "ld") == {16: 2, 2: 1}
    assert accesses(ptx, "st") == {8: 1}
    assert len(re.findall(r"\b(?:ld|st)\.global", ptx)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_passes_read_and_write_16_bytes_at_once(way: str, compiled: dict[Any, Any]) -> None:
    """Whole blocks of aligned leaves, every array once; and never more than an element where a leaf is not
    aligned, or where a block ends early.
    """
    found = WAYS[way].passes()

    assert {bool(x.stores) for x in found} == {True, False}
    for case, architecture in itertools.product(found, WAYS[way].architectures):
        ptx = refuse_spills(case, architecture, compiled)
        read, written = accesses(ptx, "ld"), accesses(ptx, "st")

        assert sum(read.values()) == len(re.findall(r"\bld\.global", ptx)), case.title
        assert sum(written.values()) == len(re.findall(r"\bst\.global", ptx)), case.title
        assert {size: n for size, n in read.items() if size > 8} == (
            {16: case.loads} if case.loads else {}
        ), case.title
        assert {size: n for size, n in written.items() if size > 8} == (
            {16: case.stores} if case.stores else {}
        ), case.title
        assert ".v2.b32" not in ptx, case.title


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scalars_stay_in_registers(architecture: int, compiled: dict[Any, Any]) -> None:
    for case in differing_scalars():
        refuse_spills(case, architecture, compiled)


def test_kernels_differ_by_their_statements() -> None:
    def case(*lines: str) -> Case:
        return Case("", '"""What it does.\n"""\n' + "\n".join(lines), {}, {})

    largest = case("    t0 = c1 * x", "    t1 = larger(t0, 2.5)", "    store(at_x, i, n, t1, full)")
    alike = case("    t4 = c3 * dx", "    t5 = larger(t4, 1e-08)")
    smaller, other_type = case("    t0 = smaller(c1, x)"), case("    t0 = (x).to(tl.float32)")

    assert differing([smaller, alike, other_type, largest]) == [largest, other_type, smaller]


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_HAND, ids=lambda case: case.title)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_written_by_hand_stay_in_registers(
    case: Case, architecture: int, compiled: dict[Any, Any]
) -> None:
    refuse_spills(case, architecture, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_schedules_are_computed_on_the_device(architecture: int, compiled: dict[Any, Any]) -> None:
    cases = scalars_of(FOLLOWING)

    assert len(cases) > 1
    for case in cases:
        ptx, log = compiled[case.key, architecture]

        assert f".target sm_{architecture}" in ptx, (case.title, log)


@pytest.mark.parametrize(
    ("ptx", "log"),
    [
        (".target sm_90a", CLEAN.replace("0 bytes spill", "4 bytes spill", 1)),
        (".target sm_90a", f"{CLEAN}\n8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"),
        (".target sm_90a .local .b8 depot[8];", CLEAN),
        (".target sm_80", CLEAN),
        ("", "PTXASError: registers"),
    ],
)
def test_a_kernel_that_spills_is_noticed(ptx: str, log: str) -> None:
    refuse_spills(BY_HAND[0], 90, {(BY_HAND[0].key, 90): (".target sm_90a", CLEAN)})
    with pytest.raises(AssertionError):
        refuse_spills(BY_HAND[0], 90, {(BY_HAND[0].key, 90): (ptx, log)})


# -- launches, by a driver that does nothing -----------------------------------------------------------------

DRIVEN = """
import json, warnings
import torch
import triton.runtime
from triton.backends.compiler import GPUTarget

warnings.simplefilter("error")
launches, loads = [], []

class Utils:
    def load_binary(self, name, kernel, shared, device):
        loads.append(name)
        return object(), object(), 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def unload_module(self, module):
        pass

class Launcher:
    def __init__(self, src, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, *rest):
        launches.append([self.name, x])

class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

import optimisers as opt
from optimisers.engines.cuda import launch

launch.reaches = lambda device: True
found = []
for capturable in (False, True):
    for rule in (opt.AdamW(), opt.Chain(opt.ClipGlobalNorm(1.0, throw=False), opt.AdamW())):
        for leaves in (3, 40):
            model = [torch.ones(32, 32 + leaves) for _ in range(leaves)]
            state = opt.setup(rule, model, engine="triton", capturable=capturable)
            for step in range(3):
                launches.clear()
                opt.update_(state, model, [torch.ones_like(x) for x in model])
                opt.adjust_(state, 0.1 * step)
                found.append([capturable, type(rule).__name__, leaves, step, len(loads), launches.copy()])
                loads.clear()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_triton_compiles_once_and_launches_what_was_compiled() -> None:
    """Triton's own launches, as far as the driver: one for each pass of all leaves; nothing is compiled for
    other numbers of leaves, other rates or later steps, and nothing warns.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    given = [sys.executable, "-c", DRIVEN]
    done = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for capturable, rule, leaves, step, loads, launches in json.loads(done.stdout):
        where = capturable, rule, leaves, step
        kernels = [["kernel", 1]] * (capturable or rule == "Chain") + [["kernel", leaves]]
        wanted = [["kernel", leaves], ["add_up", 1], *kernels] if rule == "Chain" else kernels

        assert launches == wanted, where
        assert not loads or (leaves, step) == (3, 0), where
