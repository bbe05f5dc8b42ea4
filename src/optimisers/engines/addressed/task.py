"""What do all fused engines share? Arrays at addresses: where each lies, which must be copied first, and what
comes after the kernels.

Serves writable or fresh arrays of float16, bfloat16, float32, float64, complex64 and complex128. Arrays that
are not laid out like the state, of another type, or overlapping what is written, are copied first; all else
is used where it lies.
"""

import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.layout import contiguous_strides
from optimisers.engines.addressed.pointers import CHUNK, Chunks, Form, Scratch
from optimisers.engines.cpu import printer as kernels
from optimisers.engines.cpu.printer import Unprintable
from optimisers.engines.interpret import Values
from optimisers.engines.stacks import Stacks, Workspace
from optimisers.engines.task import Job, Result, Task, merged
from optimisers.errors import TreeMismatch
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Pass, is_input, number_of, outputs, reduce_pass, stages, store_pass
from optimisers.graph.plan import operations
from optimisers.graph.trace import Program
from optimisers.state.buffers import Indices

# -- what a kernel of a program is made of -------------------------------------------------------------------


def sample_passes(program: Program) -> list[Pass]:
    """The passes of a step in which every condition of the rule holds."""
    found = [
        reduce_pass(program, k, (True,) * len(stage.reductions)) for k, stage in enumerate(stages(program))
    ]
    found.append(store_pass(program, (True,) * len(program.guards)))
    return [p for p in found if p is not None]


def printable(program: Program, dtype: str, printed: Callable[..., str]) -> str | None:
    """Why a program cannot be printed as kernels; None if it can."""
    try:
        for p in sample_passes(program):
            printed(program, p, dtype, inplace=True)
    except Unprintable as reason:
        return str(reason)
    return None


def kinds_of(program: Program, p: Pass, dtype: str, gradient: str) -> dict[str, str]:
    """The element type of every array that the kernel of a pass may touch."""
    kinds = {"x": dtype, "dx": gradient, **{f"dx{i}": gradient for i in range(2, 10)}}
    kinds |= {s.name: s.dtype for s in program.slots}
    kinds |= {f"new {name}": kind for name, kind in kinds.items()}
    real = arithmetic_of(program, dtype)
    whole = {"float32": "complex64", "float64": "complex128"}.get(real, real)
    stacks = {name: whole if e.type == "complex" else real for name, e in p.stores if name.startswith("w")}
    kinds |= stacks | {f"new {name}": kind for name, kind in stacks.items()}
    return kinds | {f"f{j}": whole if e.type == "complex" else real for j, e in enumerate(p.free)}


def titled(p: Pass, dtype: str, *, inplace: bool) -> str:
    """What the text of a kernel says of itself."""
    what = "sums" if p.reductions else "in place" if inplace else "into new arrays"
    return f"One pass over all parameters ({what}), {dtype}."


def arithmetic_of(program: Program, dtype: str, p: Pass | None = None) -> str:
    """The real type of the maths: float32 at least, and no narrower than the parameters and the state;
    float64 where a pass asks for it.
    """
    if p is not None and p.exact:
        return "float64"
    wide = any(s.dtype in ("float64", "complex128") for s in program.slots)
    return "float64" if wide else kernels.ARITHMETIC.get(dtype, dtype)


def traffic(program: Program, p: Pass, dtype: str, itemsize: int) -> int:
    """Bytes that a pass moves per parameter (see `kernels.traffic`)."""
    return kernels.traffic(p, kinds_of(program, p, dtype, dtype), itemsize)


def labels_of(program: Program) -> dict[str, str]:
    """Names of the state arrays for the reader of a kernel: the last key of their path, where that is one's
    own.
    """
    last = [str(s.path[-1]) if s.path and isinstance(s.path[-1], str) else s.name for s in program.slots]
    unique = [
        name if last.count(name) == 1 and name.isidentifier() and not _RESERVED.match(name) else s.name
        for name, s in zip(last, program.slots, strict=True)
    ]
    return {s.name: name for s, name in zip(program.slots, unique, strict=True)}


_RESERVED = re.compile(r"x$|dx\d*$|[sfw]\d+$|new_")
"""Names that a kernel gives to its other arrays."""


# -- the task ------------------------------------------------------------------------------------------------


PATTERNS = 16
"""How many parts of a group that took branches of their own are remembered."""


class Addressed(Task):
    """Leaves of one group, on their way through kernels that find their arrays at addresses.

    An engine says how a pass is launched, and what a pass of reductions comes to.
    """

    chunk: ClassVar[int] = CHUNK
    """Elements of one chunk."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if "form" not in job.memo:
            contiguous = [contiguous_strides(s) == t for s, t in zip(job.shapes, job.strides, strict=True)]
            job.memo["form"] = Form(job.library.NAME, job.device, job.shapes, job.strides, contiguous)
            job.memo["scratch"] = Scratch()
            job.memo["chunks"] = Chunks(job.sizes, self.chunk)
        self.form: Form = job.memo["form"]
        self.chunks: Chunks = job.memo["chunks"]
        self.scratch: Scratch = job.memo["scratch"]
        kind = job.dtype
        self.wide = job.wide
        self.x, self.x_at = self.fitted("x", job.x, kind, job.checked_x, write=job.inplace)
        self.gradient = kind
        looked = [self.look(f"dx{n}", grads, kind, write=False) for n, grads in enumerate(job.grads)]
        if any(len(misfits) for _, misfits in looked):
            self.gradient = common_dtype(job.library, job.grads, kind, self.wide)
            found = [
                self.fitted(
                    f"dx{n}", grads, self.gradient, functools.partial(job.checked_gradient, n), write=False
                )
                for n, grads in enumerate(job.grads)
            ]
            self.dx = [arrays for arrays, _ in found]
            self.dx_at = [at for _, at in found]
        else:
            self.dx, self.dx_at = list(job.grads), [at for at, _ in looked]
        self.ran: tuple[int, ...] = ()

    def look(self, name: str, arrays: Sequence[Any], dtype: Any, *, write: bool) -> tuple[Indices, Indices]:
        """(addresses, the numbers of arrays that are not laid out like the state)."""
        n = len(self.job.row)
        at = self.scratch.array(name, (n,), np.int64)
        return self.form.addresses(
            arrays, dtype, at, self.scratch.array("misfit " + name, (n,), np.int64), write=write
        )

    def fitted(
        self, name: str, arrays: Sequence[Any], dtype: Any, checked: Callable[[int], Any], *, write: bool
    ) -> tuple[Sequence[Any], Indices]:
        """(arrays, addresses) with every array laid out like the state: where one is not, a copy that is."""
        at, misfits = self.look(name, arrays, dtype, write=write)
        if len(misfits):
            arrays = list(arrays)
            for i in misfits:
                arrays[i] = self.job.library.laid_out(checked(int(i)), dtype, *self.layout(i))
                at[i] = self.job.library.address(arrays[i])
        return arrays, at

    def layout(self, leaf: int) -> tuple[tuple[int, ...] | None, str]:
        """(the strides of a leaf's arrays, None where they are contiguous; their device)."""
        return None if self.form.contiguous[leaf] else self.job.strides[leaf], self.job.device

    def chunks_of(self, members: Any) -> Chunks:
        """The chunk table of some leaves, kept for the patterns seen last."""
        patterns = self.scratch.kept("patterns", dict)
        key = members.tobytes()
        if key not in patterns:
            if len(patterns) >= PATTERNS:
                patterns.pop(next(iter(patterns)))
            patterns[key] = Chunks(self.job.sizes[members], self.chunk)
        return patterns[key]

    # -- what an engine says --

    def reductions(self, p: Pass) -> list[Any]:
        """The reductions of a pass, each for every leaf."""
        raise NotImplementedError

    def launch(self, p: Pass, chunks: Chunks, members: Any, new: dict[str, Indices], *partial: Any) -> None:
        """Run the kernel of a pass over these chunks; `new` has the addresses of the arrays that are written
        anew.
        """
        raise NotImplementedError

    def kernel(self, p: Pass) -> Any:
        """The compiled kernel of a pass."""
        raise NotImplementedError

    # -- passes --

    def reduce(self, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any]:
        found: dict[Expr, Any] = {}
        p = reduce_pass(self.job.program, level, wanted)
        others = [r for r, w in zip(self.stages[level].reductions, wanted, strict=True) if w]
        others = [r for r in others if r.args[0].domain == "free"]
        if others or (p is not None and p.free):
            self.stacks.ensure(operations(self.job.program, level, done=self.ran), None)
            self.ran = (*self.ran, level)
        found.update((r, self.stacked(self.stacks.reduced(r))) for r in others)
        if p is not None:
            found.update(zip(p.reductions, self.reductions(p), strict=True))
        return found

    def stacked(self, values: Any) -> Any:
        """A vector of the array library, a number of each leaf, as one of the host."""
        return np.array(self.job.library.to_numpy(values), float)

    # -- what the array library computes, on stacks --

    @functools.cached_property
    def stacks(self) -> Stacks:
        return Stacks(
            self.job, self.scalars, self.scratch.kept("workspace", Workspace), self.fill, self.given
        )

    def given(self, name: str, leaf: int) -> Any:
        """An array that a pass reads, laid out like the state."""
        if name == "x":
            return self.x[leaf]
        return (
            self.dx[number_of(name)][leaf] if name.startswith("d") else self.job.slots[number_of(name)][leaf]
        )

    def fill(self, p: Pass, members: Any, at: list[Indices]) -> None:
        """Run a pass that writes stacks, at these addresses."""
        new = {f"{new}w{j}": a for j, a in enumerate(at) for new in ("", "new ")}
        self.launch(p, self.chunks if members is None else self.chunks_of(members), members, new)

    def rows(self, p: Pass, new: dict[str, Indices]) -> list[Indices]:
        """The address table of a pass."""
        out: list[Indices] = []
        for name in kernels.columns(p, inplace=self.job.inplace):
            if name in new:
                out.append(new[name])
            elif name == "x":
                out.append(self.x_at)
            elif name.startswith("d"):
                out.append(self.dx_at[number_of(name)])
            elif name.startswith("f"):
                out.append(self.stacks.addresses(p.free[number_of(name)]))
            else:
                out.append(self.job.slots[number_of(name)].addresses)
        return out

    def addressed(
        self, p: Pass, members: Any, new: dict[str, Indices], row: Indices
    ) -> tuple[list[Indices], Indices]:
        """(address table, rows of numbers) of a pass for all leaves, or for some members."""
        rows = self.rows(p, new)
        return (rows, row) if members is None else ([r[members] for r in rows], row[members])

    # -- storing --

    def prepare(self) -> None:
        job = self.job
        self.plan: list[tuple[Pass | None, Any]] = []
        self.other: list[tuple[int, int, Any]] = []
        for holds, members in self.branches():
            out = outputs(job.program, holds)
            p = store_pass(job.program, holds)
            self.stacks.ensure(operations(job.program, None, holds, self.ran), members)
            self.plan.append((p, members))
            for j, (slot, e, pack) in enumerate(zip(job.program.slots, out.slots, job.slots, strict=True)):
                if slot.shape is not None and not is_input(e, slot.name):
                    for k in range(len(job.row)) if members is None else members:
                        known = e.domain == "free" and e.op != "input"
                        value = (
                            self.stacks.value(e, int(k))
                            if known
                            else job.library.duplicate(Values(self, int(k)).get(e))
                        )
                        self.other.append(
                            (j, int(k), self.fitting(value, pack.places.shapes[k], int(k), "a state"))
                        )
            if p is not None:
                self.kernel(p)
                for e in p.free:
                    self.stacks.addresses(e)

    def separate(self, begin: Indices, end: Indices) -> None:
        """Copy gradients that lie where this step writes: `{"a": model["b"], "b": model["a"]}` is a
        gradient.
        """
        if not len(begin):
            return
        was = self.job.memo.get("apart")
        if was is not None and was[0] is begin and all(map(np.array_equal, was[1], self.dx_at)):
            return
        size = self.job.sizes * self.gradient.itemsize
        apart = True
        for n, at in enumerate(self.dx_at):
            before = np.searchsorted(begin, at + size) - 1
            for i in np.flatnonzero((end[before] > at) & (before >= 0) & (self.job.sizes > 0)).tolist():
                arrays = self.dx[n] = list(self.dx[n])
                arrays[i] = self.job.library.laid_out(arrays[i], self.gradient, *self.layout(i))
                at[i] = self.job.library.address(arrays[i])
                apart = False
        if apart:
            self.job.memo["apart"] = begin, [at.copy() for at in self.dx_at]

    def written(self) -> tuple[Indices, Indices]:
        """(begin, end) of the memory of parameters and state, sorted; remembered while it stays where it is.

        Raises TreeMismatch for parameters that share memory: they would be stepped one after the other.
        """
        job = self.job
        known = job.memo.get("written")
        where = [p.addresses for p in job.slots]
        if known is None or not (
            np.array_equal(known[0], self.x_at) and all(map(operator.is_, known[3], where))
        ):
            buffers = [b for p in job.slots for b in p.buffers]
            state_at = np.array([job.library.address(b) for b in buffers], np.int64)
            at = np.concatenate([self.x_at, state_at])
            size = np.concatenate(
                [job.sizes * job.dtype.itemsize, np.array([b.nbytes for b in buffers], np.int64)]
            )
            by = np.argsort(at, kind="stable")
            by = by[size[by] > 0]
            begin, end = at[by], (at + size)[by]
            clash = np.flatnonzero(begin[1:] < end[:-1])
            if len(clash):
                self.refuse_overlap(*by[clash[0] : clash[0] + 2].tolist())
            known = job.memo["written"] = (self.x_at.copy(), begin, end, where)
        if self.x is job.x:
            return known[1], known[2]
        home = [job.library.bounds(old) for old, new in zip(job.x, self.x, strict=True) if new is not old]
        low, high = (np.array(part, np.int64) for part in zip(*home, strict=True))
        return merged([(known[1], known[2]), (low, high)])

    def refuse_overlap(self, i: int, j: int) -> None:
        names = [self.job.code(k, "model") if k < len(self.job.row) else "the state" for k in (i, j)]
        raise TreeMismatch(
            f"{' and '.join(names)} share memory, which they did not at `setup`; call `setup` again, or copy"
        )

    def commit(self) -> Result:
        job = self.job
        results: Sequence[Any] = job.x if job.inplace else list(job.x)
        for p, members in self.plan:
            stored = {name for name, _ in p.stores} if p is not None else set[str]()
            new: dict[str, Indices] = {}
            if not job.inplace:
                new = {f"new s{j}": pack.addresses for j, pack in enumerate(job.out)}
                self.keep(stored, members)
            if "x" in stored:
                new["new x"] = self.targets(results, members)
            if p is not None:
                self.launch(
                    p,
                    self.chunks if members is None else self.chunks_of(members),
                    members,
                    new,
                )
        for j, k, value in self.other:
            job.out[j].put(k, value)
        if job.inplace:
            moved = self.x is not job.x
            stepped = [x for x, was in zip(self.x, job.x, strict=True) if x is was] if moved else job.x
            job.library.touched(stepped)
            if moved:
                results = self.write_back()
        return Result(results, *self.counters())

    def keep(self, stored: set[str], members: Any) -> None:
        """Carry over the state that this step leaves as it was."""
        for j, (pack, old) in enumerate(zip(self.job.out, self.job.slots, strict=True)):
            if f"s{j}" not in stored:
                for k in range(len(old)) if members is None else members:
                    pack.put(int(k), old[int(k)])

    def targets(self, results: Any, members: Any) -> Indices:
        """Where new parameters go: the arrays themselves in place, else fresh ones, which become the
        results.
        """
        if self.job.inplace:
            return self.x_at
        fresh, contiguous, strides = self.job.library.fresh, self.form.flat, self.job.strides
        new = [
            fresh(shape, self.job.dtype, None if flat else laid, self.job.device)
            for shape, flat, laid in zip(self.job.shapes, contiguous, strides, strict=True)
        ]
        at, misfits = self.look("new x", new, self.job.dtype, write=True)
        for k in misfits.tolist():
            at[k] = self.job.library.address(new[k])
        for k in range(len(new)) if members is None else members:
            results[k] = self.job.library.like(self.job.x[k], new[k])
        return at

    def write_back(self) -> list[Any]:
        """Bring parameters that were stepped in a copy home; immutable ones are replaced by the copy."""
        pairs = zip(self.job.x, self.x, strict=True)
        return [old if new is old else self.job.library.stored(old, new, inplace=True) for old, new in pairs]


def common_dtype(library: Any, grads: tuple[Sequence[Any], ...], dtype: Any, wide: Any) -> Any:
    """The element type in which kernels read the gradients: their own if they agree, else that of the
    arithmetic.
    """
    kinds = {g.dtype if registry.library_of(type(g)) is library else wide for order in grads for g in order}
    if kinds == {dtype} or not kinds:
        return dtype
    kind = kinds.pop()
    if kinds:
        return wide
    name, own = library.type_name(kind), library.type_name(dtype)
    readable = name in kernels.ARITHMETIC and name != "int16" and ("complex" in name) == ("complex" in own)
    return kind if readable else wide
