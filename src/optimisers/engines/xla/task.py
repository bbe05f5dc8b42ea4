"""Steps of JAX: a pass over all leaves as few operations of XLA, or as one call of the CPU kernel in place.

The pass is evaluated bucket by bucket: sixteen small leaves are one vector, large leaves stand alone. On the
CPU, where Numba and a known interface of XLA are there, the same kernel that serves NumPy and PyTorch runs
instead, at the addresses of XLA's buffers; other devices, `vmap` and `grad` take the evaluation.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optimisers.arrays.jax import library
from optimisers.arrays.types import real_of
from optimisers.engines import interpret
from optimisers.engines.addressed import text
from optimisers.engines.cpu import task as numba
from optimisers.engines.cpu.maths import Unprintable
from optimisers.engines.cpu.printer import columns
from optimisers.engines.evaluate import Values, evaluate
from optimisers.engines.task import Engine, Holds, Members, Step
from optimisers.engines.xla import call as ffi
from optimisers.engines.xla.together import Together
from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Pass, number_of, reduce_pass, store_pass
from optimisers.graph.plan import Round, filling, operations
from optimisers.graph.trace import Program
from optimisers.state.buffers import Bucketed, Indices, Separate
from optimisers.state.group import Group

CALL = 64
"""Leaves of one call of the kernel: more compile slowly, fewer run slowly."""

NAME = "xla"


def refusal(group: Group) -> str:
    """Why the CPU kernel does not step a group; empty if it does."""
    p = store_pass(group.program, None)
    if p is None or any(s.shape is not None for s in group.program.slots):
        return "values of another shape than the parameters"
    name = library.type_name(group.kind.dtype)
    if _source(group.program, p, name, name) is None:
        return numba.unprintable(group.program, name) or "no kernel"
    if not group.kind.kernels:
        return "asked for"
    if any(library.shards.is_spread(b) for slot in group.slots for b in slot.buffers):
        return "arrays on several devices"
    if jax.default_backend() != "cpu":
        return f"arrays on {jax.default_backend()}"
    return ffi.refusal()


# -- the engine ----------------------------------------------------------------------------------------------

Bundles: TypeAlias = list[list[int]]
"""The leaves of each buffer of the state."""


def prepare(step: Step, holds: Holds, members: Members) -> Callable[[], None] | None:
    """Step the leaves in as few operations as can be: nothing is written, arrays are replaced."""
    p = store_pass(step.program, holds)
    if p is None or members is not None or not takes(step, p):
        return None
    rounds = operations(step.program, None, holds)
    if len(rounds) > 1:
        return None
    what = rounds[0] if rounds else None
    found: list[tuple[Bundles, dict[str, list[Any]]]] = []
    for part in _calls(units(step)):
        among = Together(step, [i for unit in part for i in unit])
        if what is not None:
            compute = functools.partial(computed, step, what, part, among)
            among.note(what, compute() if holds is not None else where_asked(step, what, among, compute))
        found.append((part, call_of(step, p, part, among)))
    return functools.partial(store, step, found)


def computed(step: Step, what: Round, part: Bundles, among: Together) -> list[list[Any]]:
    """The wanted values of a round, of the leaves of some buckets, by shape."""
    inputs = range(len(what.inputs))
    new = call_of(step, filling(what, tuple(inputs)), part, among) if inputs else {}
    return among.run(what, [new[f"w{j}"] for j in inputs])


def where_asked(
    step: Step, what: Round, among: Together, compute: Callable[[], list[list[Any]]]
) -> list[list[Any]]:
    """The same, computed only if a condition of the rule holds for one of these leaves, where without
    one it is not read; else 0.
    """
    guards = step.program.guards
    if not guards or operations(step.program, None, (False,) * len(guards)):
        return compute()
    asked = [jnp.any(step.scalars.of_leaves(g)[np.array(among.leaves)]) for g in guards]
    among.ahead(what)
    for e in filling(what, tuple(range(len(what.inputs)))).scalars if what.inputs else ():
        step.scalars.near.get(e)
    forms = jax.eval_shape(compute)
    return jax.lax.cond(functools.reduce(operator.or_, asked), compute, lambda: jax.tree.map(_zeros, forms))


def _zeros(form: Any) -> Any:
    return jnp.zeros(form.shape, form.dtype)


def takes(step: Step, p: Pass) -> bool:
    """Whether a pass can be evaluated element by element on whole buckets of this step."""
    slots = all(s.shape is None for s in step.program.slots)
    whole = all(_held(slot) == len(slot) for slot in step.slots)
    return slots and whole and not step.program.choices and (not p.free or step.kind.kernels)


def calls_kernels(step: Step) -> bool:
    """Whether kernels of the CPU may run: not inside a map over shards, where arrays are smaller than `setup`
    saw and sums go over all shards.
    """
    whole = all(math.prod(s) == n for s, n in zip(step.shapes, step.sizes.tolist(), strict=True))
    cut = any(map(library.shards.is_cut, step.xs))  # seen in a transform only where sharding is explicit
    return step.kind.kernels and whole and not cut and not ffi.refusal()


def units(step: Step) -> Bundles:
    """The leaves of each bucket, in order."""
    buckets = [slot for slot in step.slots if isinstance(slot, Bucketed)]
    if not buckets:
        return [[i] for i in range(step.leaves)]
    found: dict[int, list[int]] = {}
    for i, b in enumerate(buckets[0].places.buffer.tolist()):
        found.setdefault(b, []).append(i)
    return list(found.values())


def call_of(step: Step, p: Pass, part: Bundles, among: Together) -> dict[str, list[Any]]:
    """The new arrays behind each name, of the leaves of some buckets."""
    table, row = step.scalars.near.symbols(p.scalars)
    leaves = among.leaves
    stored = [name for name, _ in p.stores]
    held = {name: arrays_of(step, name, part, among) for name in dict.fromkeys([*p.loads, *stored])}
    names = [*p.loads, *(f"f{j}" for j in range(len(p.free)))]
    held |= {f"f{j}": among.spread(e) for j, e in enumerate(p.free)}
    given = [a for name in names for a in held[name]]
    counts = [len(held[name]) for name in names]
    kinds = tuple((name, [(a.shape, a.dtype) for a in held[name]]) for name in stored)
    single, each = among.alone.counts(names, counts), among.alone.kinds(kinds)
    plain: Any = functools.partial(
        _evaluated, p, step.wide, names, single, each, row, part, leaves, step.shapes
    )
    if p.free or p.fills:
        plain = functools.partial(among.alone.evaluated, plain, names, counts, stored)
    out = iter(fast(step, p, row, part, among, held, plain)([table, *given]))
    return {name: [next(out) for _ in like] for name, like in kinds}


def arrays_of(step: Step, name: str, part: Bundles, among: Together) -> list[Any]:
    """The arrays behind a name: parameters and gradients leaf by leaf, state by buffer, stacks by shape."""
    if name == "x":
        return [step.xs[i] for i in among.leaves]
    if name.startswith("d"):
        return [step.grads[number_of(name)][i] for i in among.leaves]
    if name.startswith("w"):
        return among.forms()
    slot = step.slots[number_of(name)]
    return [slot.buffers[_buffer(slot, unit[0])] for unit in part]


def store(step: Step, found: list[tuple[Bundles, dict[str, list[Any]]]]) -> None:
    """Note new arrays."""
    for part, arrays in found:
        for name, new in arrays.items():
            if name == "x":
                step.new.update(zip((i for unit in part for i in unit), new, strict=True))
                continue
            slot = step.out[number_of(name)]
            for unit, a in zip(part, new, strict=True):
                slot.buffers[_buffer(slot, unit[0])] = a


def fast(
    step: Step,
    p: Pass,
    row: Indices,
    part: Bundles,
    among: Together,
    held: dict[str, list[Any]],
    plain: Callable[[list[Any]], list[Any]],
) -> Callable[[list[Any]], list[Any]]:
    """The kernel where there is one, else the evaluation."""
    leaves = among.leaves
    source = _source(
        step.program, p, library.type_name(step.kind.dtype), _gradient(step.grads, leaves, step.kind.dtype)
    )
    if source is None or not calls_kernels(step):
        return plain
    read = [*p.loads, *(f"f{j}" for j in range(len(p.free)))]
    first, count = _firsts({name: len(held[name]) for name in read})
    stored = {name: len(held[name]) for name, _ in p.stores}
    written, _ = _firsts(stored)
    aliases = {
        first[name] + k: written[name] + k for name in stored if name in first for k in range(stored[name])
    }
    base = {name: first.get(name, count + written.get(name, 0)) for name in columns(p, inplace=True)}
    options = {
        "outputs": [jax.ShapeDtypeStruct(a.shape, a.dtype) for name in stored for a in held[name]],
        "aliases": aliases,
        "places": buffers_of(step, base, part, among),
        "row": np.asarray(row)[leaves],
        "sizes": np.asarray(step.sizes)[leaves],
    }
    return ffi.with_fallback(functools.partial(_launched, source, options), plain)


def buffers_of(step: Step, base: dict[str, int], part: Bundles, among: Together) -> Any:
    """(buffer, byte offset) of the arrays of a kernel for every leaf; `base`: first buffer of each."""
    leaves = among.leaves
    found = np.zeros((len(base), len(leaves), 2), np.int64)
    position = {i: k for k, i in enumerate(leaves)}
    for c, (name, first) in enumerate(base.items()):
        if name == "x" or name.startswith("d"):
            found[c, :, 0] = first + np.arange(len(leaves))
            continue
        if name.startswith(("f", "w")):
            found[c] = among.places(first)
            continue
        slot = step.slots[number_of(name)]
        for u, unit in enumerate(part):
            at = [position[i] for i in unit]
            found[c, at, 0] = first + u
            if isinstance(slot, Bucketed):
                found[c, at, 1] = slot.places.offset[unit] * slot.dtype.itemsize
    return found


def reduce(step: Step, level: int, wanted: tuple[bool, ...]) -> dict[Expr, Any] | None:
    """Reductions of whole arrays in one call of the kernel, for all leaves."""
    p = reduce_pass(step.program, level, wanted)
    if p is None or p.free or len(p.reductions) != sum(wanted) or not takes(step, p):
        return None
    leaves = list(range(step.leaves))
    gradient = _gradient(step.grads, leaves, step.kind.dtype)
    source = _source(step.program, p, library.type_name(step.kind.dtype), gradient)
    if source is None or not calls_kernels(step):
        return None
    part = units(step)
    among = Together(step, leaves)
    held = {name: arrays_of(step, name, part, among) for name in p.loads}
    table, row = step.scalars.near.symbols(p.scalars)
    first, _ = _firsts({name: len(held[name]) for name in p.loads})
    ops = [r.op for r in p.reductions]
    options = {
        "outputs": [],
        "aliases": {},
        "places": buffers_of(step, {name: first[name] for name in columns(p, inplace=True)}, part, among),
        "row": np.asarray(row),
        "sizes": np.asarray(step.sizes),
        "sums": len(ops),
        "ops": ops,
    }
    counts = [len(held[name]) for name in p.loads]
    plain = functools.partial(_reduced, p, step.wide, list(p.loads), counts, row, part, step.shapes)
    run = ffi.with_fallback(functools.partial(_launched, source, options), plain)
    (sums,) = run([table, *(a for name in p.loads for a in held[name])])
    return dict(zip(p.reductions, sums, strict=True))


OPERATIONS = Engine(
    NAME, lambda _: "", interpret.begin, reduce, prepare, interpret.spans, otherwise=interpret.ENGINE
)
"""Leaves of one group whose arrays are replaced, in operations of XLA."""

KERNELS = dataclasses.replace(OPERATIONS, name=numba.NAME, refusal=refusal)
"""The same steps, where a kernel of the CPU takes the place of XLA's operations."""


def _launched(source: str, options: dict[str, Any], given: Any) -> list[Any]:
    table, *arrays = given
    return ffi.launch(source, arrays, table=table, **options)


def _firsts(counts: dict[str, int]) -> tuple[dict[str, int], int]:
    """(the number of the first buffer of each name, how many there are)."""
    first: dict[str, int] = {}
    at = 0
    for name, n in counts.items():
        first[name] = at
        at += n
    return first, at


def _held(slot: Any) -> int:
    """How many arrays of a slot may be stepped buffer by buffer: of vectors, all or none."""
    if isinstance(slot, Bucketed):
        whole = int(sum(slot.places.lengths)) == int(slot.places.sizes.sum())
        return len(slot) if whole else -1
    return len(slot) if isinstance(slot, Separate) else -1


def _buffer(slot: Any, leaf: int) -> int:
    return int(slot.places.buffer[leaf] if isinstance(slot, Bucketed) else slot.places.number[leaf])


def _calls(units: list[list[int]]) -> list[list[list[int]]]:
    """Bundles, so many at a time as one call takes."""
    calls: list[list[list[int]]] = []
    size = 0
    for unit in units:
        if not calls or size + len(unit) > CALL:
            calls.append([])
            size = 0
        calls[-1].append(unit)
        size += len(unit)
    return calls


def _gradient(grads: Any, leaves: list[int], dtype: Any) -> str:
    """The element type of the gradients of some leaves; empty if they differ."""
    kinds = {library.type_name(g[i].dtype) for g in grads for i in leaves}
    return kinds.pop() if len(kinds) == 1 else "" if kinds else library.type_name(dtype)


@cached
def _source(program: Program, p: Pass, dtype: str, gradient: str) -> str | None:
    """The kernel of a pass in place; None where there is none."""
    if numba.unprintable(program, dtype) or not gradient:
        return None
    if ("complex" in gradient) != ("complex" in dtype):
        return None
    try:
        return numba.sources(program, p, text.kinds_of(program, p, dtype, gradient), dtype, inplace=True)
    except (Unprintable, KeyError):
        return None


# -- the same in operations of XLA ---------------------------------------------------------------------------


def _unpacked(names: list[str], counts: list[int], given: list[Any]) -> tuple[Any, dict[str, list[Any]]]:
    """(the scalar table, the arrays behind each name) of what a call is given in one list."""
    table, *arrays = given
    it = iter(arrays)
    return table, {name: [next(it) for _ in range(n)] for name, n in zip(names, counts, strict=True)}


def _evaluated(
    p: Pass,
    wide: Any,
    names: list[str],
    counts: list[int],
    kinds: Any,
    row: Indices,
    units: list[list[int]],
    leaves: list[int],
    every: list[tuple[int, ...]],
    given: list[Any],
) -> list[Any]:
    """What a pass stores, from the scalar table and the arrays it reads."""
    table, held = _unpacked(names, counts, given)
    position = {i: k for k, i in enumerate(leaves)}
    shapes = [every[i] for i in leaves]
    rows = [int(row[i]) for i in leaves]
    found: dict[str, list[Any]] = {name: [] for name, _ in kinds}
    for u, unit in enumerate(units):
        at = [position[i] for i in unit]
        values = _of_unit(p, wide, held, u, at, table, rows, shapes)
        for name, like in kinds:
            by_leaf = name == "x" or name.startswith("w")
            found[name] += _cut(values[name], [like[k] for k in at] if by_leaf else [like[u]])
    return [a for name, _ in kinds for a in found[name]]


def _of_unit(
    p: Pass,
    wide: Any,
    held: dict[str, list[Any]],
    unit: int,
    at: list[int],
    table: Any,
    rows: list[int],
    shapes: list[tuple[int, ...]],
) -> dict[str, Any]:
    """What a pass stores of the leaves of one unit, as one vector, or the array of the only leaf; those of
    one row of scalars at once.
    """
    parts = [at] if len({rows[k] for k in at}) == 1 else [[k] for k in at]
    own = [shapes[k] for k in at] if len(at) > 1 else []
    pieces: list[dict[str, Any]] = []
    start = 0
    for part in parts:
        inputs = {name: _part(name, held[name], unit, part, start, own, at, len(at) > 1) for name in held}
        size = sum(math.prod(shapes[k]) for k in part)
        shape = (size,) if len(at) > 1 else shapes[part[0]]
        pieces.append(_pass(p, wide, inputs, table[rows[part[0]]], shape))
        start += size
    if len(pieces) == 1:
        return pieces[0]
    return {name: jnp.concatenate([piece[name] for piece in pieces]) for name, _ in p.stores}


def _cut(vector: Any, kinds: list[tuple[tuple[int, ...], Any]]) -> list[Any]:
    """The arrays that lie one after the other in a vector, in these shapes and types."""
    if len(kinds) == 1:
        return [_rounded(vector, *kinds[0])]
    ends = np.cumsum([math.prod(shape) for shape, _ in kinds]).tolist()
    return [
        _rounded(vector[end - math.prod(shape) : end], shape, dtype)
        for end, (shape, dtype) in zip(ends, kinds, strict=True)
    ]


def _reduced(
    p: Pass,
    wide: Any,
    names: list[str],
    counts: list[int],
    row: Indices,
    units: list[list[int]],
    every: list[tuple[int, ...]],
    given: list[Any],
) -> list[Any]:
    """The reductions of a pass for every leaf, in operations of XLA."""
    table, held = _unpacked(names, counts, given)
    found: list[list[Any]] = [[] for _ in p.reductions]
    kind = jax.dtypes.canonicalize_dtype(np.float64)
    for u, unit in enumerate(units):
        start = 0
        for i in unit:
            size = int(np.prod(every[i]))
            inputs = {
                name: held[name][i]
                if name == "x" or name.startswith("d")
                else held[name][u].reshape(-1)[start : start + size].reshape(every[i])
                for name in names
            }
            start += size
            values = _values(p, wide, inputs, table[int(row[i])], every[i])
            for out, r, term in zip(found, p.reductions, p.terms, strict=True):
                out.append(jnp.asarray(library.operations[r.op](values[id(term)]), kind))
    return [jnp.stack([jnp.stack(column) for column in found])]


def _rounded(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    x = jnp.asarray(x).astype(dtype)
    return x.reshape(shape) if x.size == int(np.prod(shape)) else jnp.broadcast_to(x, shape)


def _part(
    name: str,
    held: list[Any],
    unit: int,
    part: list[int],
    start: int,
    shapes: list[Any],
    at: list[int],
    bucket: bool,
) -> Any:
    """What a pass reads for some leaves of one bucket: a vector, or the array of the only leaf."""
    if name == "x" or name.startswith(("d", "f")):
        return jnp.concatenate([held[k].reshape(-1) for k in part]) if bucket else held[part[0]]
    if not bucket:
        return held[unit]
    length = sum(int(np.prod(shapes[at.index(k)])) for k in part)
    return held[unit] if len(part) == len(at) else held[unit][start : start + length]


def _pass(p: Pass, wide: Any, inputs: dict[str, Any], scalars: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The values that a pass stores, in the type of the arithmetic."""
    values = _values(p, wide, inputs, scalars, shape)
    return {name: values[id(e)] for name, e in p.stores}


def _values(p: Pass, wide: Any, inputs: dict[str, Any], scalars: Any, shape: tuple[int, ...]) -> Values:
    """The value of every node of a pass, from its inputs, of this shape, and its row of scalars."""
    real = real_of(library, wide)
    column = {id(e): scalars[j] for j, e in enumerate(p.scalars)}
    spread = [e for e in p.body if e.op == "spread"]

    def given(e: Expr) -> Any:
        return inputs[e.value] if e.op == "load" else column[id(e.value)].astype(real)

    def operation(name: str) -> Callable[..., Any]:
        function = library.operations[name]
        if name != "random_word":
            return function
        return functools.partial(function, jax.ShapeDtypeStruct(shape, real))

    found = {id(e): inputs[f"f{j}"] for j, e in enumerate(spread)}
    return evaluate([*p.terms, *(e for _, e in p.stores)], given, library, wide, found, operation)
