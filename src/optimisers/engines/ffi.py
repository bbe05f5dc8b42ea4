"""How do our kernels run inside computations of XLA on CPUs? In place, through its foreign function interface.

XLA makes several passes over memory where one is enough, and keeps an array of its own for each leaf. A call
to one of our kernels reads and writes the buffers of the computation where they lie, on the threads of XLA.
Nothing about a process stands in the call: compiled computations may be kept on disk.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays.pack import Indices
from optimisers.engines import cache, threads
from optimisers.engines.addresses import Chunks

OPS = ("sum", "max", "min")
"""Reductions, by their number in a plan."""


# -- whether it works here -----------------------------------------------------------------------------------


@functools.cache
def available() -> bool:
    """Whether kernels run inside computations of this JAX; tried once in every process."""
    if any(importlib.util.find_spec(name) is None for name in ("jax", "jaxlib", "numba")):
        return False
    try:
        return _tried()
    except Exception:  # noqa: BLE001 whatever does not fit, computations do without
        return False


TRIAL = '''"""Halves an array, times a number of its own."""
from numba import njit

from optimisers.engines.support import claim, loader, storer

load = loader("float32", 0, 1)
store = storer("float32", 0, 1)


@njit("void(i8, i8[::1], i8[:,::1], i8[:,::1], f8[:,::1], i8[::1])",
      nogil=True, error_model="numpy", cache=True)
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


def _tried() -> bool:
    """Whether a small step gives the numbers of NumPy, on several threads and in a buffer of two leaves."""
    import jax

    cpu = jax.devices("cpu")[0]
    packed, alone = np.arange(70000, dtype=np.float32), np.ones((3, 5), np.float32)
    table = np.array([[2.0], [0.5]], np.float32)
    places = np.array([[[2, 0], [3, 0], [2, 4 * 69000]]])
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (packed, alone)]

    def step(table: Any, packed: Any, alone: Any) -> list[Any]:
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

_targets: dict[str, str] = {}
_loading = threading.Lock()


def target(source: str, *, sums: bool) -> str:
    """The name under which XLA knows the kernel of a source; it is loaded when it is first asked for.

    Raises OSError where the interface of this jaxlib is not the one that handlers were written for.
    """
    with _loading:
        if source not in _targets:
            _targets[source] = _registered(source, sums=sums)
        return _targets[source]


def _registered(source: str, *, sums: bool) -> str:
    import jax

    from optimisers.engines import xla_ffi

    _load_handle()
    name = "optimisers_" + cache.name_of(source + xla_ffi.edition())
    module = cache.load(source + xla_ffi.task(name, sums=sums))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(module.handler.ctypes), platform="cpu", api_version=1)
    return name
