"""Stacks of matrices inside a computation of XLA: leaves of one call of the kernel, sorted by shape.

A pass writes its stacks into buffers of the computation, one for each shape; XLA multiplies; and the last
pass reads the results where they lie. Where the kernel cannot run, the same leaf by leaf.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimisers.arrays.layout import contiguous_strides
from optimisers.engines import batched
from optimisers.engines.stacks import Stacks
from optimisers.engines.task import Step
from optimisers.engines.workspace import Batch, Found, Workspace
from optimisers.engines.xla import mesh
from optimisers.graph.expr import Expr
from optimisers.graph.plan import Round
from optimisers.graph.recipe import recipe
from optimisers.state.buffers import Indices


class Together:
    """Some leaves of a job, and the values of another shape that are known of them."""

    def __init__(self, step: Step, leaves: list[int]) -> None:
        self.leaves = leaves
        self.leaf_of = step.job.subset.leaves
        self.batch = Batch.of(leaves, step.shapes, [contiguous_strides(s) for s in step.shapes])
        self.stacks = Stacks(step, Workspace(), _never, _never)
        position = {i: k for k, i in enumerate(leaves)}
        self.alone = Alone([[position[i] for i in b.leaves.tolist()] for b in self.batch.buckets])

    def run(self, what: Round, inputs: list[list[Any]]) -> list[list[Any]]:
        """The wanted values of a round, whose inputs a pass has written: of each shape, all of them."""
        found: list[list[Any]] = []
        for b, bucket in enumerate(self.batch.buckets):
            stacks = [each[b] for each in inputs]
            stacks = [s != 0 if e.type == "bool" else s for s, e in zip(stacks, what.inputs, strict=True)]
            leaf = int(self.leaf_of[bucket.leaves[0]]) if len(bucket.leaves) else -1
            share = mesh.share_of(len(bucket.leaves), leaf) if stacks and len(bucket.shape) > 1 else None
            if share is None:
                found.append(self.stacks.bucket(what, bucket, stacks))
                continue
            more = dataclasses.replace(bucket, leaves=np.resize(bucket.leaves, share.count))
            values = self.stacks.bucket(what, more, [share.there(s) for s in stacks])
            found.append([batched.each(functools.partial(share.back, shape=bucket.shape), v) for v in values])
        return found

    def note(self, what: Round, values: list[list[Any]]) -> None:
        """Keep the wanted values of a round, for the pass that reads them."""
        for k, e in enumerate(what.wanted):
            stacks = [(b, own[k]) for b, own in zip(self.batch.buckets, values, strict=True)]
            self.stacks.found[id(e)] = [Found(stacks)]

    def ahead(self, what: Round) -> None:
        """Compute the scalars of a round, which are remembered: not inside a branch that may not run."""
        for bucket in self.batch.buckets:
            for op in recipe(what, bucket.shape).operations:
                for e in (*op.alpha, *op.beta, *(o.scalar for o in op.args)):
                    if e is not None:
                        self.stacks.of_bucket(e, bucket)

    def forms(self) -> list[Any]:
        """The stacks that a pass writes, one for each shape."""
        real = self.stacks.real
        return [jax.ShapeDtypeStruct((len(b.leaves), *b.shape), real) for b in self.batch.buckets]

    def spread(self, e: Expr) -> list[Any]:
        """A value as stacks of the shape of x."""
        (found,) = self.stacks.found[id(e)]
        return [self.stacks.widened(bucket, stack) for bucket, stack in found.stacks]

    def places(self, first: int) -> Indices:
        """(buffer, byte in it) of every leaf, in stacks of which the first is this buffer."""
        found = np.zeros((len(self.leaves), 2), np.int64)
        for b, (bucket, at) in enumerate(zip(self.batch.buckets, self.alone.at, strict=True)):
            each = math.prod(bucket.shape) * self.stacks.real.itemsize
            found[at, 0] = first + b
            found[at, 1] = each * np.arange(len(at))
        return found


class Alone:
    """The way between stacks and arrays of single leaves; it holds no array that is traced."""

    def __init__(self, at: list[list[int]]) -> None:
        self.at = at

    def counts(self, names: list[str], counts: list[int]) -> list[int]:
        """How many arrays stand behind each name, leaf by leaf where it is one of stacks."""
        total = sum(map(len, self.at))
        return [total if name.startswith("f") else n for name, n in zip(names, counts, strict=True)]

    def kinds(self, kinds: Sequence[tuple[str, list[Any]]]) -> tuple[tuple[str, list[Any]], ...]:
        """(shape, type) of the arrays behind each name, leaf by leaf where it is one of stacks."""
        return tuple(
            (name, self.parted([[(s[1:], dtype)] * s[0] for s, dtype in like]) if name[0] == "w" else like)
            for name, like in kinds
        )

    def parted(self, stacks: Sequence[Any]) -> list[Any]:
        """What stacks hold, leaf by leaf."""
        found: list[Any] = [None] * sum(map(len, self.at))
        for at, stack in zip(self.at, stacks, strict=True):
            for k, i in enumerate(at):
                found[i] = stack[k]
        return found

    def evaluated(
        self,
        plain: Callable[[list[Any]], list[Any]],
        names: list[str],
        counts: list[int],
        stored: list[str],
        given: list[Any],
    ) -> list[Any]:
        """What a pass stores, by a function that knows no stacks."""
        table, *arrays = given
        parts: list[Any] = [table]
        start = 0
        for name, n in zip(names, counts, strict=True):
            held = arrays[start : start + n]
            parts += self.parted(held) if name.startswith("f") else held
            start += n
        out = plain(parts)
        if not any(name.startswith("w") for name in stored):
            return out
        total = sum(map(len, self.at))
        each = [out[j * total : (j + 1) * total] for j in range(len(stored))]
        return [jnp.stack([arrays[i] for i in at]) for arrays in each for at in self.at]


def _never(*_: Any) -> Any:
    raise NotImplementedError
