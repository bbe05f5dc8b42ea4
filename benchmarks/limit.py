"""How fast could any optimiser be here? As fast as a kernel that only reads and writes the same arrays.

It reads x, dx, m and v and writes x, m and v, with one addition for each, through the same address tables,
chunks and threads as the steps of AdamW.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from optimisers.engines import cache
from optimisers.engines.addressed.chunks import Chunks
from optimisers.engines.cpu import threads
from optimisers.state.leaf import parts

SOURCE = '''"""Reads and writes the arrays of a step, with one addition for each that is written.

Addresses, in order: {about}.
"""
from numba import njit

from optimisers.engines.cpu.intrinsics import claim, loader, storer

{words}


@njit("void(i8, i8[::1], i8[:,::1], i8[:,::1])", nogil=True, error_model="numpy", cache=True)
def kernel(counter, spans, chunks, addresses):
    while True:
        s = claim(counter)
        if s + 1 >= spans.size:
            return
        for c in range(spans[s], spans[s + 1]):
            k = chunks[c, 0]
            first = chunks[c, 1]
            n = chunks[c, 2]
            {places}
            for i in range(n):
                dx = load_dx(at_dx, i)
                {body}
'''


def source(slots: int, kind: str, itemsize: int) -> str:
    """The text of the kernel for a state of so many arrays for each parameter."""
    stored = ["x", *(f"s{j}" for j in range(slots))]
    names = ["x", "dx", *stored[1:]]
    words = [f'load_{a} = loader("{kind}", {j}, {len(names)}, "{kind}")' for j, a in enumerate(names)]
    words += [f'store_{a} = storer("{kind}", {names.index(a)}, {len(names)}, "{kind}")' for a in stored]
    places = [f"at_{a} = addresses[{j}, k] + {itemsize} * first" for j, a in enumerate(names)]
    body = [f"store_{a}(at_{a}, i, load_{a}(at_{a}, i) + dx)" for a in stored]
    return SOURCE.format(
        about=", ".join(names),
        words="\n".join(words),
        places=("\n" + 12 * " ").join(places),
        body=("\n" + 16 * " ").join(body),
    )


def limit(state: Any, model: dict[str, Any], grads: dict[str, Any]) -> Callable[[], None]:
    """The limit for one step of a flat dict model whose leaves are one group."""
    (group,) = parts(state)[0].groups
    return _step(model, grads, [pack.addresses for pack in group.slots])


def limit_of(model: dict[str, Any], grads: dict[str, Any], slots: list[dict[str, Any]]) -> Callable[[], None]:
    """The same for arrays of NumPy that are given: `slots` in the place of a state."""
    held = [*slots]  # they live as long as the step
    return _step(model, grads, [_addresses(slot) for slot in held], held)


def _addresses(arrays: dict[str, Any]) -> Any:
    return np.array([x.ctypes.data for x in arrays.values()], np.int64)


def _step(
    model: dict[str, Any], grads: dict[str, Any], slots: list[Any], held: object = None
) -> Callable[[], None]:
    """A step that only reads and writes. The tables are made here, once: the limit is that of memory."""
    arrays, dx = ({k: _numpy(x) for k, x in each.items()} for each in (model, grads))
    kind = next(iter(arrays.values())).dtype
    sizes = np.array([x.size for x in arrays.values()])
    addresses = np.stack([_addresses(arrays), _addresses(dx), *slots])
    chunks = Chunks(sizes)
    kernel = cache.load(source(len(slots), kind.name, kind.itemsize)).kernel
    counter = np.zeros(1, np.int64)
    at = counter.ctypes.data

    def step(_held: object = (model, grads, held)) -> None:
        counter[0] = 0
        threads.together(lambda: kernel(at, chunks.spans, chunks.table, addresses), chunks.elements)

    return step


def _numpy(x: Any) -> Any:
    return x if isinstance(x, np.ndarray) else x.numpy()
