"""The CPU engine: one compiled kernel per pass, over the addresses of all leaves of a group."""

from collections.abc import Callable
from typing import Any

import numpy as np

from optimisers.engines import cache
from optimisers.engines.addressed.pointers import LOOKS, Chunks
from optimisers.engines.addressed.task import Addressed, arithmetic_of, kinds_of, labels_of, printable, titled
from optimisers.engines.cpu import printer as kernels
from optimisers.engines.cpu import threads
from optimisers.graph.memo import kept
from optimisers.graph.passes import Pass
from optimisers.graph.trace import Program
from optimisers.state.buffers import Indices

NAME = "numba"


# -- which groups it takes -----------------------------------------------------------------------------------


def refusal(program: Program, library: str, device: str, dtype: str) -> str | None:
    """Why this engine does not take a group; None if it does."""
    if library not in LOOKS:
        return f"arrays of {library}"
    if device != "cpu":
        return f"arrays on {device}"
    if dtype not in kernels.ARITHMETIC:
        return f"element type {dtype}"
    return cache.switched_off() or printable(program, dtype, printed)


def printed(program: Program, p: Pass, dtype: str, *, inplace: bool) -> str:
    """The source of one pass for gradients of the type of the parameters; raises Unprintable."""
    return sources(program, p, kinds_of(program, p, dtype, dtype), dtype, inplace=inplace)


def sources(program: Program, p: Pass, kinds: dict[str, str], dtype: str, *, inplace: bool) -> str:
    """The source of one pass; raises Unprintable."""
    real, title = arithmetic_of(program, dtype, p), titled(p, dtype, inplace=inplace)
    return kernels.source(p, kinds, real, labels_of(program), title, inplace=inplace)


# -- the task ------------------------------------------------------------------------------------------------


class Fused(Addressed):
    """Leaves of one group, on their way through compiled kernels."""

    def reductions(self, p: Pass) -> list[Any]:
        partial = np.empty((len(p.reductions), len(self.chunks.leaf)))
        self.launch(p, self.chunks, None, {}, partial)
        leaves = len(self.job.row)
        return [
            gathered(r.op, parts, self.chunks.leaf, leaves)
            for r, parts in zip(p.reductions, partial, strict=True)
        ]

    def launch(self, p: Pass, chunks: Chunks, members: Any, new: dict[str, Indices], *partial: Any) -> None:
        """Run the kernel of a pass over these chunks; `new` has the addresses of the arrays that are written
        anew.
        """
        table, row = self.scalars.table(p.scalars)
        rows, row = self.addressed(p, members, new, row)
        addresses = self.scratch.array("addresses", (len(rows), len(row)), np.int64)
        for i, r in enumerate(rows):
            addresses[i] = r
        kernel = self.kernel(p)
        counter = np.zeros(1, np.int64)
        at = counter.ctypes.data
        row = np.ascontiguousarray(row, np.int64)

        def run(
            _held: object = (counter, self),
        ) -> None:  # whoever runs this keeps what lies at the addresses
            kernel(at, chunks.spans, chunks.table, addresses, table, row, *partial)

        threads.together(run, chunks.elements)

    def kernel(self, p: Pass) -> Callable[..., None]:
        """The compiled kernel of a pass."""
        names = (self.job.library.type_name(t) for t in (self.job.dtype, self.gradient))
        return kernel_of(self.job.program, p, *names, inplace=self.job.inplace)


@kept
def kernel_of(program: Program, p: Pass, dtype: str, gradient: str, *, inplace: bool) -> Callable[..., None]:
    """The compiled kernel of a pass."""
    kinds = kinds_of(program, p, dtype, gradient)
    return cache.load(sources(program, p, kinds, dtype, inplace=inplace)).kernel


def gathered(op: str, partial: Any, leaf: Indices, leaves: int) -> Any:
    """The reduction of every leaf from those of its chunks, in their fixed order."""
    if op == "sum":
        return np.bincount(leaf, partial, leaves) if len(leaf) else np.zeros(leaves)
    out = np.full(leaves, -np.inf if op == "max" else np.inf)
    (np.maximum if op == "max" else np.minimum).at(out, leaf, partial)
    return out
