"""How do our kernels run inside computations of XLA on CPUs? In place, as its foreign functions.

XLA makes several passes over memory where one is enough, and keeps an array of its own for each leaf. A call
to one of our kernels reads and writes the buffers of the computation where they lie, on the threads of XLA.
Nothing about a process stands in the call: compiled computations may be kept on disk.
"""

import functools
import hashlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.engines import cache
from optimisers.engines.addressed.chunks import Chunks
from optimisers.engines.cpu import limits, threads
from optimisers.state.buffers import Indices

LOG = logging.getLogger("optimisers")

OPS = ("sum", "max", "min", "norm2")
"""Reductions, by their number in a plan."""


# -- whether it works here -----------------------------------------------------------------------------------


@functools.cache
def refusal() -> str:
    """Why kernels do not run inside computations of this JAX; empty if they do: tried once in every process.

    What this JAX and this system lack is no error; a mistake in our own text is one, and is raised.
    """
    missing = [name for name in ("jax", "jaxlib", "numba") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    import jax

    if reason := cache.switched_off():
        return reason
    if not hasattr(jax, "ffi"):
        reason = "it has no jax.ffi"
    else:
        try:
            reason = "" if _tried(jax.devices("cpu")[0]) else "a trial gave other numbers"
        except (OSError, RuntimeError) as error:  # another interface, no CPU, or a call that XLA refuses
            reason = str(error).partition("\n")[0] or type(error).__name__
    if reason:
        LOG.warning("JAX %s runs no kernels of ours, steps are computed by XLA: %s", jax.__version__, reason)
    return reason


TRIAL = '''"""Multiplies every array by a number of its own."""
from optimisers.engines.cpu.kernel import compiled
from optimisers.engines.cpu.intrinsics import claim, loader, storer

load = loader("float32", 0, 1, "float32")
store = storer("float32", 0, 1, "float32")


@compiled(kept=True)
def kernel(counter, spans, chunks, addresses, table, row):
    while True:
        s = claim(counter)
        if s + 1 >= spans.size:
            return
        for c in range(spans[s], spans[s + 1]):
            k = chunks[c, 0]
            at = addresses[0, k] + 4 * chunks[c, 1]
            for i in range(chunks[c, 2]):
                store(at, i, load(at, i) * table[row[k], 0])
'''


def _tried(cpu: Any) -> bool:
    """Whether a small step gives the numbers of NumPy, on several threads and in a buffer of two leaves."""
    import jax

    packed, alone = np.arange(70000, dtype=np.float32), np.ones((3, 5), np.float32)
    table = np.array([[2.0], [0.5]], np.float32)
    places = np.array([[[2, 0], [3, 0], [2, 4 * 69000]]])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (packed, alone)]

    def step(table: object, packed: object, alone: object) -> list[Any]:
        return launch(
            TRIAL,
            [packed, alone],
            outputs=shapes,
            aliases={0: 0, 1: 1},
            table=table,
            places=places,
            row=np.array([0, 1, 1]),
            sizes=np.array([69000, 15, 1000]),
            helpers=3,
        )

    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"), jax.default_device(cpu):
        found = [np.asarray(x) for x in jax.jit(step)(table, packed, alone)]
    packed[:69000] *= 2
    packed[69000:] /= 2
    return np.array_equal(found[0], packed) and np.array_equal(found[1], alone / 2)


# -- targets -------------------------------------------------------------------------------------------------


def target(source: str) -> str:
    """The name by which XLA knows the kernel of this source; loaded when it is first asked for.

    Raises OSError where the interface of this jaxlib is not the one that handlers were written for.
    """
    with cache.lock():
        return _registered(source)


@functools.cache
def _registered(source: str) -> str:
    import jax

    from optimisers.engines.xla import c_api

    handle = _handle().handle.address
    known = hashlib.sha256(f"{c_api.edition()} {source}".encode()).hexdigest()
    name = f"optimisers_{known[:24]}"
    handler = c_api.handler(handle, cache.lasting(source).kernel.address)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu", api_version=1)
    return name


@functools.cache
def _handle() -> Any:
    """The compiled code that all kernels share; raises OSError where it would not understand XLA."""
    import jax

    from optimisers.engines.xla import c_api

    c_api.provide_system()
    return cache.lasting(c_api.handler_text(jax.ffi.include_dir()))


# -- calls ---------------------------------------------------------------------------------------------------


def launch(
    source: str,
    inputs: Sequence[Any],
    *,
    outputs: Sequence[Any],
    aliases: dict[int, int],
    table: object,
    places: Indices,
    row: Indices,
    sizes: Indices,
    sums: int = 0,
    ops: Sequence[str] = (),
    helpers: int | None = None,
) -> list[Any]:
    """Run a kernel over buffers of a computation; the outputs, and the reductions of every leaf if there are
    any.

    `inputs` and `outputs`, the forms of results, are buffers of any types. `aliases` has the number of an
    input -> that of the output which takes its place: such an input is written where it lies if its buffer is
    given away, else XLA copies it first. `places` says of every column of the kernel and leaf (the number of
    the buffer, outputs counted after inputs; the byte in it where the leaf begins), `row` has the row of
    `table` of each leaf, `sizes` its elements. A kernel of `sums` reductions, which are `ops`, gives an
    array [sums, leaves] after the outputs: in float64 if JAX has it, gathered in a fixed order in float64
    anyway. `helpers` is how many threads help at most; unless given, as many as the elements are worth.
    Raises ValueError for a place that is not there.
    """
    import jax
    import jax.numpy as jnp

    table = jnp.asarray(table)
    if table.dtype not in (jnp.float32, jnp.float64):
        table = table.astype(jnp.float32)
    real = jnp.result_type(float)
    chunks = Chunks(np.asarray(sizes, np.int64))
    if helpers is None:
        helpers = min(limits.MOST, 1 + chunks.elements // threads.SERIAL_BELOW) - 1
    ops = ops or ("sum",) * sums
    results = [*outputs, *([jax.ShapeDtypeStruct((sums, len(sizes)), real)] if sums else [])]
    checked(places, row, sizes, [*inputs, *outputs], table.shape)
    head = [
        *places.shape[:2],
        len(chunks.spans),
        len(chunks.leaf),
        *table.shape,
        table.dtype == jnp.float64,
        len(inputs),
        sums,
        real == jnp.float64,
        min(helpers, len(chunks.spans) - 2),
    ]
    parts = [head, places, row, chunks.spans, chunks.table, [OPS.index(op) for op in ops]]
    plan = np.concatenate([np.ravel(np.asarray(p, np.int64)) for p in parts])
    call = jax.ffi.ffi_call(
        target(source),
        alike(results, varying([table, *inputs])),
        input_output_aliases={1 + i: o for i, o in aliases.items()},
    )
    return list(call(*varied([table, *inputs]), plan=plan))


def checked(places: Indices, row: Indices, sizes: Indices, buffers: Sequence[Any], table: Any) -> None:
    """Raise ValueError if a kernel would look outside its buffers or its table of numbers."""
    nbytes = np.array([b.size * b.dtype.itemsize for b in buffers] or [0], np.int64)
    itemsize = np.array([b.dtype.itemsize for b in buffers] or [1], np.int64)
    number, first = places[..., 0], places[..., 1]
    if places.shape[1:] != (len(sizes), 2) or len(row) != len(sizes):
        raise ValueError(f"places {places.shape} and {len(row)} rows for {len(sizes)} leaves")
    if number.size and not (number.min() >= 0 and number.max() < len(buffers) and first.min() >= 0):
        raise ValueError(f"a place is in none of the {len(buffers)} buffers")
    if (first + sizes * itemsize[number] > nbytes[number]).any():
        raise ValueError("a leaf ends outside its buffer")
    if len(row) and not (row.min() >= 0 and row.max() < table[0]):
        raise ValueError(f"a leaf has none of the {table[0]} rows of scalars")


def varying(arrays: Sequence[Any]) -> frozenset[Any]:
    """The axes of `shard_map` along which any of these arrays differs from device to device."""
    from optimisers.arrays.jax import varying as axes_of

    return frozenset[Any]().union(*(axes_of(a) for a in arrays))


def varied(arrays: Sequence[Any]) -> list[Any]:
    """The arrays, all of them taken to differ where any does: a call to foreign code takes no mixture."""
    import jax

    axes = varying(arrays)
    missing = [tuple(sorted(axes - varying([a]))) for a in arrays]
    return [jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]


def alike(forms: Sequence[Any], axes: frozenset[Any]) -> list[Any]:
    """The forms of results that differ along these axes of `shard_map`."""
    import jax
    import jax.numpy as jnp

    def differing(form: Any) -> Any:
        return jax.lax.pcast(jnp.zeros(form.shape, form.dtype), tuple(sorted(axes)), to="varying")

    return [jax.eval_shape(functools.partial(differing, f)) if axes else f for f in forms]


# -- where they cannot run -----------------------------------------------------------------------------------


def with_fallback(
    fast: Callable[[list[Any]], list[Any]], plain: Callable[[list[Any]], list[Any]]
) -> Callable[[Sequence[Any]], list[Any]]:
    """A function of a list of arrays: `fast` on CPUs; `plain` elsewhere, under vmap, and where it is
    differentiated.

    Both take and give the same forms, and look at no traced array but those in their list. `plain` is traced
    only where it is needed: for a thousand leaves, tracing is most of what a compilation takes.
    """
    import jax
    import jax.numpy as jnp

    def stepped(arrays: Sequence[Any]) -> list[Any]:
        given = varied([jnp.asarray(a) for a in arrays])
        traced = jax.make_jaxpr(lambda *a: fast(list(a)))(*given)
        return list(_step().bind(*given, fast=traced, plain=plain))

    return stepped


@functools.cache
def _step() -> Any:
    """The primitive of JAX that stands for a step with two ways."""
    import jax
    from jax.experimental import jet
    from jax.extend.core import Primitive, jaxpr_as_fun
    from jax.interpreters import ad, batching, mlir

    step = Primitive("optimisers_step")
    step.multiple_results = True

    def by_fast(*arrays: object, fast: object, **_: object) -> list[Any]:
        return jaxpr_as_fun(fast)(*arrays)

    def by_plain(*arrays: Any, plain: Any, **_: object) -> list[Any]:
        return list(plain(list(arrays)))

    def now(*arrays: Any, **ways: object) -> list[Any]:
        devices = {d for a in arrays for d in a.devices()}
        alone = len(devices) == 1 and all(d.platform == "cpu" for d in devices)
        return (by_fast if alone else by_plain)(*arrays, **ways)

    def by_machine(context: Any, *arrays: object, **ways: object) -> Any:
        """The kernel on one device, and on each inside `shard_map`; else XLA shares out the operations."""
        chosen = by_plain if _shared_out(context.module_context.axis_context) else by_fast
        return mlir.lower_fun(chosen, multiple_results=True)(context, *arrays, **ways)

    def forms(*_: object, fast: Any, **__: object) -> Any:
        return fast.out_avals

    def mapped(arrays: Any, axes: Any, **ways: Any) -> Any:
        found = jax.vmap(functools.partial(by_plain, **ways), in_axes=tuple(axes))(*arrays)
        return found, [0] * len(found)

    def differentiated(arrays: Any, tangents: Any, **ways: Any) -> Any:
        changes = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(functools.partial(by_plain, **ways), tuple(arrays), tuple(changes))

    def expanded(arrays: Any, series: Any, *, plain: Any, **_: object) -> Any:
        return jet.jet(lambda *a: plain(list(a)), arrays, series, factorial_scaled=False)

    step.def_impl(now)
    step.def_abstract_eval(forms)
    mlir.register_lowering(step, mlir.lower_fun(by_plain, multiple_results=True))
    mlir.register_lowering(step, by_machine, platform="cpu")
    batching.primitive_batchers[step] = mapped
    ad.primitive_jvps[step] = differentiated
    jet.jet_rules[step] = expanded
    return step


def _shared_out(context: Any) -> bool:
    """Whether XLA partitions a computation over several devices: known only while it is lowered."""
    mesh = getattr(context, "mesh", None)
    if mesh is not None:
        return frozenset(mesh.axis_names) != frozenset(context.manual_axes)
    return getattr(context, "num_devices", 1) > 1
