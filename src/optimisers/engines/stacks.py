"""What the array library computes for all leaves of a shape at once: products and other values of another
shape, on stacks of matrices.

A round of the plan (see `graph.plan`) reads stacks that a pass has written, one matrix after the other, and
goes through its operations block by block, so that a block stays in the cache of the processor from its first
product to its last. Buffers belong to the group and are used again: a warm step allocates none. What the
array library cannot do on a stack it does leaf by leaf.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.products import product
from optimisers.arrays.types import real_of
from optimisers.engines import batched
from optimisers.engines.exchange import Exchange, Wave
from optimisers.engines.task import Step
from optimisers.engines.workspace import Batch, Bucket, Found, Workspace
from optimisers.errors import TraceError
from optimisers.graph.expr import Expr
from optimisers.graph.passes import Pass, number_of
from optimisers.graph.plan import Round, filling
from optimisers.graph.recipe import Operand, Operation, Recipe, Shape, recipe
from optimisers.ops.dispatch import OPERATIONS
from optimisers.ops.state import MADE
from optimisers.state.buffers import Indices

BLOCK = 1 << 21
"""Bytes of the matrices that go through a round together: they and what is made of them stay in a cache."""

Take = Callable[["Stacks", Round, Indices | None], None]
"""Notes the reductions of a round along an axis, of some leaves."""


class Stacks:
    """The values of another shape that a step of a job needs, each computed once."""

    def __init__(
        self,
        step: Step,
        workspace: Workspace,
        fill: Callable[[Pass, Indices | None, list[Indices]], None],
        given: Callable[[str, int], Any],
        take: "Take | None" = None,
    ) -> None:
        self.step, self.scalars, self.workspace = step, step.scalars, workspace
        self.fill, self.given, self.take = fill, given, take
        self.library, self.wide = step.library, step.wide
        self.real = real_of(self.library, self.wide)
        self.found: dict[int, list[Found]] = {}
        self.sums: dict[int, Any] = {}
        self.known: dict[tuple[int, int], Any] = {}
        self.readings: dict[tuple[int, bytes], Any] = {}
        """How passes read what is found row by row."""
        self.calls = 0
        self.exchange = None if step.spread is None else Exchange(self, step.spread)
        self.waves: list[Wave] = []
        """How the leaves travel whose values were computed last."""

    def kind(self, e: Expr) -> Any:
        return self.wide if e.type == "complex" else self.real

    # -- what is asked for --

    def addresses(self, e: Expr) -> Indices:
        """Where a value of each leaf lies, spread to the shape and layout of x; 0 where it is not known."""
        at = np.zeros(self.step.leaves, np.int64)
        for found in self.known_of(e):
            if found.at is None:
                far = self.exchange
                found.at = self.spread(e, found) if far is None else far.addresses(e, found)
            at = np.maximum(at, found.at)
        return at

    def known_of(self, e: Expr) -> list[Found]:
        """What is known of a value; of one of several results, where they are known."""
        if e.op == "item" and id(e.args[0]) in self.found:
            mine, index = self.found.setdefault(id(e), []), dict(e.options)["index"]
            for whole in self.found[id(e.args[0])][len(mine) :]:
                stacks = [(bucket, several[index]) for bucket, several in whole.stacks]
                mine.append(Found(stacks, borrowed=whole.borrowed, waves=whole.waves))
        return self.found.get(id(e), [])

    def value(self, e: Expr, leaf: int) -> Any:
        """A value of one leaf."""
        for found in self.known_of(e):
            for bucket, stack in found.stacks:
                where = np.flatnonzero(bucket.leaves == leaf)
                if len(where):
                    value = batched.each(operator.itemgetter(int(where[0])), stack)
                    return batched.each(self.library.duplicate, value) if found.borrowed else value
        raise LookupError(f"{e.op} is not known yet")

    def spread(self, e: Expr, found: Found) -> Indices:
        """Addresses of a value in the layout of x; where it lies otherwise, of a copy."""
        library, kind = self.library, self.kind(e)
        at = np.zeros(self.step.leaves, np.int64)
        for bucket, stack in found.stacks:
            n, each = len(bucket.leaves), math.prod(bucket.shape)
            laid = tuple(s * kind.itemsize for s in (each, *bucket.strides))
            whole = stack
            if (
                found.borrowed
                or tuple(stack.shape) != (n, *bucket.shape)
                or stack.dtype != kind
                or (library.memory.layout(stack)[1] != laid and n * each > 0)
            ):
                self.calls += 1
                whole = self.buffer(("spread", self.calls), (n, *bucket.shape), kind, laid=bucket)
                library.assign(whole, self.widened(bucket, stack))
            found.hold = (found.hold, whole)
            at[bucket.leaves] = library.memory.address(whole) + kind.itemsize * each * np.arange(n)
        return at

    def widened(self, bucket: Bucket, stack: Any) -> Any:
        """A stack in the shape of x; raises TraceError if it does not broadcast."""
        n, missing = len(bucket.leaves), len(bucket.shape) - stack.ndim + 1
        if tuple(stack.shape) == (n, *bucket.shape):
            return stack
        try:
            wide = stack.reshape(n, *(1,) * missing, *stack.shape[1:])
            return self.library.broadcast(wide, (n, *bucket.shape))
        except (ValueError, RuntimeError, TypeError):
            raise TraceError(
                f"{type(self.step.job.group.rule).__name__} combined an array of shape "
                f"{tuple(stack.shape[1:])} with parameters of shape {bucket.shape}, at "
                f"{self.step.code(int(bucket.leaves[0]), 'model')}"
            ) from None

    def reduced(self, r: Expr) -> Any:
        """A reduction of a value to one number, of every leaf, as a vector of the array library."""
        if self.exchange is not None:
            return self.exchange.reduced(r, self.sums.get(id(r), []))
        parts = self.sums[id(r)]
        if len(parts) == 1:
            return parts[0][1]
        leaves = np.concatenate([leaves for leaves, _ in parts])
        return self.library.scalars.joined([v for _, v in parts])[np.argsort(leaves).tolist()]

    # -- a round --

    def run(self, rounds: Sequence[Round], members: Indices | None) -> None:
        """Compute the values of rounds, one after the other, for some leaves (None for all)."""
        for what in rounds:
            if what.chooses is not None:
                self.choose(what, what.chooses, members)
            elif not what.only or self.asked(what.only, members).any():
                for e, stacks in zip(what.wanted, self.computed(what, members), strict=True):
                    self.note(e, stacks)

    def choose(self, what: Round, e: Expr, members: Indices | None) -> None:
        """Take the new results of a choice where its condition holds, and else the old ones."""
        assert what.otherwise is not None
        holds = self.asked(what.only, members)
        leaves = np.arange(self.step.leaves) if members is None else members
        for side, chosen in ((what, holds), (what.otherwise, ~holds)):
            if chosen.any():
                found = zip(*self.computed(side, members if chosen.all() else leaves[chosen]), strict=True)
                self.note(e, [(parts[0][0], tuple(stack for _, stack in parts)) for parts in found])
                nodes = set(map(id, side.nodes))
                self.found[id(e)][-1].borrowed = any(id(w) not in nodes for w in side.wanted)

    def asked(self, only: Sequence[Expr], members: Indices | None) -> Any:
        """Whether all of these conditions hold, of each leaf."""
        self.scalars.fetch(only)
        holds = np.all([self.scalars.of_leaves(c) for c in only], axis=0)
        return holds if members is None else holds[members]

    def computed(self, what: Round, members: Indices | None) -> list[list[tuple[Bucket, Any]]]:
        """The wanted values of a round, each as stacks."""
        if self.exchange is not None:
            return self.exchange.computed(what, members)
        batch = self.batch(members)
        self.calls += 1
        if what.along:
            assert self.take is not None
            self.take(self, what, members)
        flats = self.filled(what, batch, members)
        held: list[list[tuple[Bucket, Any]]] = [[] for _ in what.wanted]
        for bucket in batch.buckets:
            stacks = [self.input(e, flats.get(j), bucket) for j, e in enumerate(what.inputs)]
            for at, stack in zip(held, self.bucket(what, bucket, stacks), strict=True):
                at.append((bucket, stack))
        return held

    def note(self, e: Expr, stacks: list[tuple[Bucket, Any]]) -> None:
        """Keep a value of some leaves, for passes and later rounds."""
        self.found.setdefault(id(e), []).append(Found(stacks, waves=self.waves))

    def batch(self, members: Indices | None) -> Batch:
        """How these leaves lie in stacks; None for all."""
        return self.workspace.batch(members, self.step.shapes, self.step.job.subset.places.strides)

    def filled(self, what: Round, batch: Batch, members: Indices | None) -> dict[int, Any]:
        """Have a pass write the inputs of a round, but for arrays that are stacks as they are."""
        where = [[self.lying(e, b) is not None for b in batch.buckets] for e in what.inputs]
        which = tuple(j for j, found in enumerate(where) if not all(found))
        flats: dict[int, Any] = {}
        at: list[Indices] = []
        for j in which:
            kind = self.kind(what.inputs[j])
            purpose = ("w", self.calls, j)
            flats[j] = self.workspace.flat(self.library, purpose, batch.size, kind, self.step.kind.device)
            at.append(self.library.memory.address(flats[j]) + kind.itemsize * batch.at)
        if which:
            self.fill(filling(what, which), members, at)
        return flats

    def input(self, e: Expr, flat: Any, bucket: Bucket) -> Any:
        """An input of a round for the leaves of a bucket; `flat` is what a pass wrote, if it did."""
        if flat is None:
            return self.lying(e, bucket)
        stack = self.viewed(flat, bucket, bucket.offset)
        return stack != 0 if e.type == "bool" else stack

    def lying(self, e: Expr, bucket: Bucket) -> Any:
        """A value that lies in memory as a stack already, in the right type; None for any other."""
        if self.exchange is not None:
            return self.exchange.state(e, bucket)
        if e.op != "input" or e.type == "bool":
            return None
        one = self.given(e.value, int(bucket.leaves[0]))
        if one.dtype != self.kind(e):
            return None
        if len(bucket.leaves) == 1:
            return batched.plain(one)[None]
        return self.step.slots[number_of(e.value)].stacked(bucket.leaves) if e.value[0] == "s" else None

    def viewed(self, flat: Any, bucket: Bucket, offset: int) -> Any:
        """The part of a buffer that holds the matrices of a bucket."""
        n, each = len(bucket.leaves), math.prod(bucket.shape)
        return self.library.memory.view(flat, offset, (n, *bucket.shape), (each, *bucket.strides))

    def buffer(
        self, purpose: tuple[object, ...], shape: Shape, dtype: Any, laid: Bucket | None = None
    ) -> Any:
        """An array of the workspace."""
        n = math.prod(shape)
        flat = self.workspace.flat(self.library, purpose, n, dtype, self.step.kind.device)
        if laid is not None:
            return self.viewed(flat, laid, 0)
        return self.library.memory.view(flat, 0, shape, contiguous_strides(shape))

    def bucket(self, what: Round, bucket: Bucket, stacks: list[Any]) -> list[Any]:
        """The wanted values of a bucket, block by block."""
        todo = recipe(what, bucket.shape)
        n, each = len(bucket.leaves), max(1, math.prod(bucket.shape)) * self.real.itemsize
        still = n > 1 and not todo.operations  # what is known already is handed on
        blocks = 1 if self.step.job.traced or still else -(-n // max(1, BLOCK // each))
        step = -(-n // blocks)
        run = _Run(self, todo, what, bucket, n, still=still)
        for low in range(0, n, step):
            run.block(stacks, low, min(n, low + step))
        for r, parts in run.sums.items():
            joined = parts[0] if len(parts) == 1 else self.library.scalars.joined(parts)
            self.sums.setdefault(r, []).append((bucket.leaves, joined))
        return [run.out[j] for j in range(len(what.wanted))]

    def of_bucket(self, e: Expr, bucket: Bucket) -> Any:
        """A scalar of every leaf of a bucket; one number where they agree and it is known."""
        key = (id(e), id(bucket))
        if key not in self.known:
            self.known[key] = self.looked_up(e, bucket), e, bucket
        return self.known[key][0]

    def looked_up(self, e: Expr, bucket: Bucket) -> Any:
        kind = self.kind(e)
        values = e.value if e.op == "const" else self.scalars.of_leaves(e)
        if e.op == "const" or isinstance(values, np.ndarray):
            values = np.full(1, values) if e.op == "const" else values[bucket.leaves]
            if len(values) and (values == values[0]).all():
                one = values[0].item()
                return np.bool_(one) if e.type == "bool" else self.library.scalars.number(one, kind)
        whole = np.array_equal(bucket.leaves, np.arange(self.step.leaves))
        return _Vector(values if whole or isinstance(values, np.ndarray) else values[bucket.leaves.tolist()])


@dataclasses.dataclass(frozen=True, eq=False)
class _Vector:
    """A number of every leaf of a bucket."""

    values: Any


class _Run:
    """One bucket on its way through a recipe."""

    def __init__(
        self, stacks: Stacks, todo: Recipe, what: Round, bucket: Bucket, n: int, *, still: bool
    ) -> None:
        self.s, self.todo, self.what, self.bucket, self.n = stacks, todo, what, bucket, n
        self.library = stacks.library
        self.out: dict[int, Any] = {}
        self.sums: dict[int, list[Any]] = {}
        self.direct = {
            o.value: j for j, (_, o) in enumerate(todo.outputs) if not o.turned and o.constant is None
        }
        self.narrow: set[int] = set()
        """Values that may be of another type than that of the arithmetic."""
        self.pure = still or stacks.step.job.traced or self.library.immutable

    def block(self, stacks: list[Any], low: int, high: int) -> None:
        self.low, self.high = low, high
        self.values: dict[int, Any] = {}
        for number, stack in zip(self.todo.inputs, stacks, strict=True):
            self.values[number] = stack[low:high]
        for e, number in self.todo.older:
            self.values[number] = self.old(e)
        made: set[int] = set()
        for op in self.todo.operations:
            if op.kind == "reduce":
                self.reduce(op)
                continue
            target = self.target(op)
            found = self.compute(op, target)
            if target is not None and found is not target:
                self.library.assign(target, found)
                found = target
            self.values[op.out] = found
            if op.dtype is not None and op.node.type == "real":
                self.narrow.add(op.out)
            if target is not None and self.direct.get(op.out, -1) in self.out:
                made.add(self.direct[op.out])
        for j, (_, o) in enumerate(self.todo.outputs):
            if j not in made:
                self.keep(j, self.read(o))

    # -- where values lie --

    def old(self, e: Expr) -> Any:
        """A value of an earlier round, or an array of the state."""
        s, leaves = self.s, self.bucket.leaves[self.low : self.high]
        if known := s.known_of(e):
            for f in known:
                for bucket, stack in f.stacks:
                    if bucket is self.bucket:
                        return batched.each(operator.itemgetter(slice(self.low, self.high)), stack)
            return batched.stack_of(self.library, [s.value(e, int(i)) for i in leaves])
        lying = None if s.step.job.traced else s.lying(e, self.bucket)
        if lying is not None:
            return lying[self.low : self.high]
        arrays = [self.library.cast(s.given(e.value, int(i)), s.kind(e)) for i in leaves]
        return batched.stack_of(self.library, arrays)

    def target(self, op: Operation) -> Any:
        """Where an operation writes its value; None where the library decides."""
        if op.shape is None or op.node.type != "real" or self.pure or op.is_free:
            return None
        kind, count = self.kind_of(op), self.high - self.low
        if op.register < 0 and kind != self.s.real:
            return None
        if op.register < 0:
            j = self.direct[op.out]
            if j not in self.out:
                shape, laid = op.shape, self.bucket if op.shape == self.bucket.shape else None
                purpose = ("f", self.s.calls, j, self.bucket.offset)
                self.out[j] = self.s.buffer(purpose, (self.n, *shape), kind, laid)
            return self.out[j][self.low : self.high]
        return self.s.buffer(("t", op.register), (count, *op.shape), kind)

    def kind_of(self, op: Operation) -> Any:
        """The type of the real numbers that an operation gives: that of the arithmetic, but for products."""
        real, device = self.s.real, self.s.step.kind.device
        return real if op.dtype is None else self.library.stacks.product_type(real, op.dtype, device)

    def keep(self, j: int, value: Any) -> None:
        """Note a wanted value of this block."""
        if self.pure:
            self.out[j] = value
        elif isinstance(value, tuple):
            parts = [
                self.placed((j, k), self.out[j][k] if j in self.out else None, v) for k, v in enumerate(value)
            ]
            self.out[j] = tuple(parts)
        else:
            self.out[j] = self.placed((j,), self.out.get(j), value)

    def placed(self, number: tuple[int, ...], out: Any, value: Any) -> Any:
        """The array of a wanted value, made for the first block, after that of this block was written."""
        if out is None:
            shape, dtype = tuple(value.shape[1:]), value.dtype
            laid = self.bucket if shape == self.bucket.shape else None
            purpose = ("f", self.s.calls, *number, self.bucket.offset)
            out = self.s.buffer(purpose, (self.n, *shape), dtype, laid)
        self.library.assign(out[self.low : self.high], value)
        return out

    def read(self, o: Operand, kind: Any = None) -> Any:
        """The value of an operand: a stack, or a number. Real numbers are of the type of the arithmetic, or
        of the `kind` that a product takes.
        """
        if o.scalar is not None:
            return self.number(o.scalar)
        if o.constant is not None:
            one = batched.written(self.library, o.constant.value, self.s.step.xs[0], self.s.real)
            value = batched.stack_of(self.library, [one] * (self.high - self.low))
        else:
            value = self.values[o.value]
        if kind is not None or o.value in self.narrow:
            value = self.library.cast(value, kind or self.s.real)
        return self.library.operations["transpose"](value) if o.turned else value

    def number(self, e: Expr) -> Any:
        """A scalar: a number, or a vector of those of this block."""
        value = self.s.of_bucket(e, self.bucket)
        if not isinstance(value, _Vector):
            return value
        part = value.values[self.low : self.high]
        if isinstance(part, np.ndarray) and self.library.name != "numpy":
            beside = next(iter(self.values.values()))
            part = self.library.scalars.constant(part.astype(float) if e.type == "bool" else part, beside)
            part = part != 0 if e.type == "bool" else part
        return part if e.type == "bool" else self.library.cast(part, self.s.kind(e))

    # -- what is computed --

    def compute(self, op: Operation, target: Any) -> Any:
        try:
            if op.kind == "product":
                return self.multiplied(op, target)
            return self.applied(op, target)
        except (ValueError, RuntimeError, TypeError) as error:
            if op.node.op == "call":  # what a user's function raises is the user's
                raise
            step, leaf = self.s.step, int(self.bucket.leaves[self.low])
            args = [self.read(o) for o in op.args]
            shapes = " and ".join(str(tuple(np.shape(a))[1:]) for a in args)
            raise TraceError(
                f"{type(step.job.group.rule).__name__}: {op.node.op} of arrays of shape {shapes}: "
                f"{error}, at {step.code(leaf, 'model')}"
            ) from error

    def multiplied(self, op: Operation, target: Any) -> Any:
        kind = None if op.dtype is None or op.node.type != "real" else self.kind_of(op)
        a, b, *rest = (self.read(o, kind) for o in op.args)
        rank = max(a.ndim, b.ndim) - 1
        alpha, beta = self.factor(op.alpha, op.signs[0], rank), self.factor(op.beta, op.signs[1], rank)
        a, b = batched.raised(a, rank), batched.raised(b, rank)

        def spare() -> Any:
            return None if target is None else self.s.buffer(("t", op.spare), target.shape, target.dtype)

        return product(self.library, a, b, target, rest[0] if rest else None, alpha, beta, spare)

    def factor(self, scalars: tuple[Expr, ...], sign: int, rank: int) -> Any:
        """The product of some scalars, shaped to multiply matrices in arrays of this many axes."""
        value: Any = float(sign)
        for e in scalars:
            value = value * batched.shaped(self.number(e), rank)
        return value

    def applied(self, op: Operation, target: Any) -> Any:
        e, s = op.node, self.s
        args = [self.read(o) for o in op.args]
        args = batched.counted(self.library, e, args, s.real)
        if OPERATIONS[e.op].family == "elementwise":
            return self.elementwise(e, args, target)
        if e.op in MADE:
            return self.made(e)
        found = batched.batched(self.library, e, args)
        return batched.leaf_by_leaf(self.library, e, args, self.high - self.low) if found is None else found

    def made(self, e: Expr) -> Any:
        """The same new array for every leaf."""
        like, count = self.s.step.xs[0], self.high - self.low
        one = self.library.operations[e.op](like, dtype=self.s.real, **dict(e.options))
        return self.library.broadcast(one, (count, *one.shape))

    def elementwise(self, e: Expr, args: list[Any], target: Any) -> Any:
        numbers = [n.domain == "scalar" for n in e.args]
        rank = max(a.ndim - 1 for a, n in zip(args, numbers, strict=True) if not n and np.ndim(a) > 0)
        args = [
            (batched.shaped if n else batched.raised)(a, rank) for a, n in zip(args, numbers, strict=True)
        ]
        if e.op in ("add", "multiply"):
            args.sort(key=np.ndim, reverse=True)  # a number alone comes last
        if target is not None and e.op in self.library.stacks.into and self.are_plain(e, args):
            return self.library.stacks.into[e.op](*args, out=target)
        return self.library.operations[e.op](*args, **dict(e.options))

    def are_plain(self, e: Expr, args: list[Any]) -> bool:
        """Whether the arguments are arrays of the type of the arithmetic, with numbers after them."""
        kinds = {a.dtype for a in args if np.ndim(a)}
        return np.ndim(args[0]) > 0 and kinds == {self.s.real} and all(n.type == "real" for n in e.args)

    def reduce(self, op: Operation) -> None:
        """A reduction of every matrix to one number."""
        (o,) = op.args
        value = self.read(o)
        if op.node.args[0].type == "bool":
            value = self.library.cast(value, self.s.real)
        found = self.library.operations[op.node.op](value.reshape(value.shape[0], -1), axis=1)
        self.sums.setdefault(id(op.node), []).append(found)
