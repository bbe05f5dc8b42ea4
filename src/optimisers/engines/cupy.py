"""Steps of CuPy: a pass over one leaf is one kernel, which CuPy fuses from its own functions.

`cupy.fuse` follows a pass once for each element type and number of axes and compiles what it saw. Scalars are
arguments of the kernel, so a rate that changes compiles nothing. What a pass reads is widened first; what it
stores is rounded once, into the arrays that it is given, at the end.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays.cupy import ON_DEVICE, cp, library
from optimisers.arrays.memory import bounds
from optimisers.arrays.types import promoted, real_of
from optimisers.engines import interpret
from optimisers.engines.evaluate import evaluate
from optimisers.engines.interpret import input_of
from optimisers.engines.task import Engine, Holds, Members, Step
from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Pass, keeps, number_of, reduce_pass, store_pass
from optimisers.ops.dispatch import OPERATIONS
from optimisers.ops.primitives import ROUNDINGS
from optimisers.state.buffers import Indices
from optimisers.state.group import Group

NAME = "cupy.fuse"

_OF_BITS = ("join_bits", "high_bits", "low_bits")

FUSED = {
    name: ON_DEVICE[name]
    for name, declared in OPERATIONS.items()
    if declared.family == "elementwise" and name not in (*_OF_BITS, "to_bfloat16")
}
"""The operations that CuPy fuses: it looks at no bits, and does not change shapes."""

TYPES = frozenset({"float16", "float32", "float64", "complex64", "complex128"})
"""The element types that CuPy fuses."""


# -- which groups it takes -----------------------------------------------------------------------------------


def refusal(group: Group) -> str:
    """Why CuPy does not fuse the steps of a group; empty if it does."""
    program = group.program
    p = store_pass(program, (True,) * len(program.guards))
    if keeps(program) or any(s.shape is not None for s in program.slots):
        return "values of another shape than the parameters"
    kinds = [library.type_name(group.kind.dtype), *(s.dtype for s in program.slots)]
    odd = next((kind for kind in kinds if kind not in TYPES), None)
    if odd is not None:
        return f"element type {odd}"
    return "" if p is None else unfused(p) or ""


_KNOWN = frozenset({"load", "column", "cast"})
"""What lowering puts around the operations."""


def unfused(p: Pass) -> str | None:
    """Why CuPy does not fuse a pass; None if it does."""
    if p.free:
        return "values of another shape than the parameters"
    odd = next((e.op for e in p.body if e.op not in FUSED and e.op not in _KNOWN), None)
    return None if odd is None else f"the operation {odd}"


# -- a pass as a function ------------------------------------------------------------------------------------


def copied(x: Any, dtype: Any) -> Any:
    """What is widened, always as a copy, though in registers: what is read may be written before its value is
    stored.
    """
    return x.astype(dtype)


def evaluated(p: Pass, wide: Any, arrays: Sequence[Any], scalars: Sequence[Any]) -> list[Any]:
    """What a pass reduces, then what it stores, from its arrays and scalars, or from what stands for them."""
    known = dict(zip(p.loads, arrays, strict=True))
    columns = dict(zip(map(id, p.scalars), scalars, strict=True))
    roots = [*p.terms, *(e for _, e in p.stores)]

    def given(e: Expr) -> Any:
        return known[e.value] if e.op == "load" else columns[id(e.value)]

    def operation(name: str) -> Callable[..., Any]:
        if name in ROUNDINGS:
            return lambda x: x.astype(name.removeprefix("to_")).astype(real_of(library, wide))
        return FUSED[name]

    found = evaluate(roots, given, library, wide, operation=operation, cast=copied)
    return [found[id(e)] for e in roots]


@cached
def storing(p: Pass, wide: Any, apart: tuple[str, ...]) -> Any:
    """The kernel of a pass that stores: it takes the arrays that are read, those that are written `apart`
    from them, and the scalars; other stores go where the array of their name was read.
    """

    def step(*args: Any) -> None:
        arrays, others, scalars = _parts(args, len(p.loads), len(apart))
        new = evaluated(p, wide, arrays, scalars)
        targets = dict(zip((*p.loads, *apart), (*arrays, *others), strict=True))
        for (name, _), v in zip(p.stores, new, strict=True):
            targets[name][...] = v

    return cp.fuse(kernel_name="optimisers_step")(step)


@cached
def reducing(p: Pass, wide: Any) -> Any:
    """The kernel of a pass that reduces: the new arrays whose sums or extremes are wanted."""

    def terms(*args: Any) -> Any:
        arrays, _, scalars = _parts(args, len(p.loads), 0)
        return tuple(evaluated(p, wide, arrays, scalars))

    return cp.fuse(kernel_name="optimisers_terms")(terms)


def _parts(args: Sequence[Any], reads: int, apart: int) -> tuple[Any, Any, Any]:
    return args[:reads], args[reads : reads + apart], args[reads + apart :]


# -- the engine ----------------------------------------------------------------------------------------------


@cached
def tried(kernel: Any, arrays: tuple[tuple[Any, int], ...], scalars: tuple[type, ...], device: int) -> None:
    """Run a kernel once on arrays of one element: it is compiled, or cannot be."""
    with cp.cuda.Device(device):
        kernel(*(cp.ones((1,) * ndim, dtype) for dtype, ndim in arrays), *(kind(1) for kind in scalars))


@dataclasses.dataclass(eq=False)
class Call:
    """A kernel and what it is given, for one leaf."""

    leaf: int
    p: Pass
    kernel: Any
    arrays: list[Any]
    """Those that the pass reads, then those that are only written."""
    scalars: list[Any]
    x: Any
    """The new parameters; None if they stay."""

    def launch(self) -> None:
        with self.arrays[0].device:
            self.kernel(*self.arrays, *self.scalars)


def begin(step: Step) -> None:
    """Check the arrays; the calls of the last pass are noted as they are prepared."""
    interpret.begin(step)
    step.work = list[Call]()


def reduce(step: Step, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any] | None:
    """CuPy's own sums over what one kernel makes of each leaf: a sum that is fused with it would keep one
    block of threads busy, and no more.
    """
    p = reduce_pass(step.program, level, wanted)
    if p is None or len(p.reductions) != sum(wanted) or not p.loads or not takes(step, p):
        return None
    wide = promoted(library, step.wide, ["float64"]) if p.exact else step.wide
    kernel, scalars = reducing(p, wide), columns(step, p, wide)
    found: list[list[Any]] = []
    for leaf in range(step.leaves):
        arrays = [input_of(step, leaf, name) for name in p.loads]
        with arrays[0].device:
            terms = kernel(*arrays, *(c[leaf] for c in scalars))
        found.append([library.operations[r.op](t) for r, t in zip(p.reductions, terms, strict=True)])
    return {
        r: np.array([library.to_host(v[i]) for v in found], complex if r.type == "complex" else float)
        for i, r in enumerate(p.reductions)
    }


def takes(step: Step, p: Pass) -> bool:
    """Whether CuPy fuses a pass over the arrays of this step."""
    kinds = {a.dtype for g in step.grads for a in g}
    fused = unfused(p) is None and not keeps(step.program)
    return fused and all(d.kind in "biu" or library.type_name(d) in TYPES for d in kinds)


def columns(step: Step, p: Pass, wide: Any) -> list[Any]:
    """The scalars of a pass, each for all leaves, in the type of the arithmetic."""
    real = real_of(library, wide)
    return [
        library.scalars.number(step.scalars.of_leaves(e), wide if e.type == "complex" else real)
        for e in p.scalars
    ]


def prepare(step: Step, holds: Holds, members: Members) -> Callable[[], None] | None:
    """Make the new arrays and try every new kernel, since both may raise, before anything is written."""
    p = store_pass(step.program, holds)
    if p is None or not takes(step, p):
        return None
    scalars = columns(step, p, step.wide)
    calls = [call_of(step, p, i, [c[i] for c in scalars]) for i in interpret.every(step, members)]
    for c in calls:
        kinds = tuple((a.dtype, a.ndim) for a in c.arrays)
        tried(c.kernel, kinds, tuple(type(v) for v in c.scalars), c.arrays[0].device.id)
    step.new.update((c.leaf, c.x) for c in calls if c.x is not None and c.x is not step.xs[c.leaf])
    step.work += calls
    return functools.partial(store, step, calls)


def call_of(step: Step, p: Pass, leaf: int, scalars: list[Any]) -> Call:
    """The kernel of a leaf, with its arrays: those of the state are written in place where that is asked for,
    and so are parameters that may be written.
    """
    inplace = step.job.inplace
    read = {name: input_of(step, leaf, name) for name in p.loads}
    apart: dict[str, Any] = {}
    x = None
    for name, _ in p.stores:
        if name == "x":
            x = step.xs[leaf]
            if not inplace or not library.is_writable(x):
                with x.device:
                    x = apart[name] = cp.empty_like(x)
            elif name not in read:
                apart[name] = x
        elif not inplace or name not in read:
            apart[name] = step.out[number_of(name)][leaf]
    kernel = storing(p, step.wide, tuple(apart))
    return Call(leaf, p, kernel, [*read.values(), *apart.values()], scalars, x)


def separate(step: Step, begin: Indices, end: Indices) -> None:
    """Copy what is read, and not written by the same kernel, where this step writes."""
    for c in step.work:
        for k, name in enumerate(c.p.loads):
            if name.startswith("s") or c.arrays[k] is c.x:
                continue
            low, high = bounds(c.arrays[k])
            before = int(np.searchsorted(begin, high)) - 1
            if low < high and before >= 0 and end[before] > low:
                c.arrays[k] = library.duplicate(c.arrays[k])


def store(step: Step, calls: list[Call]) -> None:
    """Launch the kernels."""
    for c in calls:
        c.launch()
        stored = {name for name, _ in c.p.stores}
        for spec, slot, old in zip(step.program.slots, step.out, step.slots, strict=True):
            if spec.name not in stored and slot is not old:
                slot.put(c.leaf, old[c.leaf])


ENGINE = Engine(NAME, refusal, begin, reduce, prepare, interpret.spans, separate, otherwise=interpret.ENGINE)
"""Leaves of one group, each stepped by one kernel where a pass is element by element."""
