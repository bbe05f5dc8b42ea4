"""Leaves that share a program, each slot of their state in packed arrays, and a table of their scalars.

The scalars of a leaf (hyper-parameters, then counters) are a row of the table of its group. Leaves that were
always stepped together share a row; one that is adjusted, frozen or skipped gets its own, copied when they
part.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.parts import Part
from optimisers.errors import BadSetting, BadState, ShapeError
from optimisers.graph.cached import cached
from optimisers.graph.expr import Expr, is_full_reduction, order
from optimisers.graph.trace import Program, of_changes, trace
from optimisers.nest import flatten, form, unflatten, values
from optimisers.rule import Rule, needed, refuse_shape
from optimisers.settings import fill, numbers, skeleton
from optimisers.state.buffers import Bucketed, FlatBuffers, Indices, Places, Separate, Spread, spread_out
from optimisers.state.cache import Cache, Subset
from optimisers.state.table import ScalarTable, as_kind, table_of
from optimisers.tree.path import KeyPath


@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
    """What `setup` saw of one leaf's parameters."""

    name: str
    """The array library."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Those of its state arrays, in elements."""
    dtype: Any
    device: str
    opaque: bool
    """Whether it is no plain memory: its state is kept in separate arrays, which are replaced."""

    packed: bool = False
    """Whether small ones of them share a vector all the same, since the user wanted that."""
    kernels: bool = True
    """Whether compiled kernels may run: nothing else was asked for. Whether they can is seen where a step is
    compiled.
    """
    part: Part[Any] | None = None
    """How the part that lies here belongs to the whole; None where it is no part."""
    capturable: bool = False
    """Whether the numbers of its state live on its device, each leaf's in a row of their own. They stay at
    their address, as the arrays do: a graph that was captured reads and writes them there.
    """

    @classmethod
    def of(
        cls, x: Any, engine: str | None = None, *, packed: bool = False, capturable: bool = False
    ) -> "Shape":
        library = registry.library(x)
        strides, opaque = library.memory.dense_strides(x), library.is_opaque(x)
        packed = packed and opaque and library.immutable
        return cls(
            library.name,
            tuple(x.shape),
            strides,
            x.dtype,
            library.device(x),
            opaque,
            packed,
            engine in (None, "numba"),
            None if capturable else library.shards.part(x),
            capturable,
        )

    @property
    def library(self) -> Any:
        return registry.named(self.name)

    def of_wholes(self) -> "Shape":
        """The same, where steps are given whole arrays of which these are parts."""
        return self if self.part is None else dataclasses.replace(self, part=self.part.of_wholes())

    @property
    def key(self) -> Any:
        """What leaves of one group share of it."""
        return self.dtype, self.name, self.device, self.opaque, self.packed, self.capturable

    def stand_in(self) -> Any:
        """An array of this kind that takes no memory, to be looked at only."""
        return self.library.stand_in(self.shape, self.dtype)


@dataclasses.dataclass(eq=False)
class Group:
    """Leaves with one rule structure, element type and device."""

    rule: Rule
    """A rule of the right structure; the numbers of each leaf are in the table."""
    program: Program
    programs: dict[int, Program]
    """The programs for updates with one, two, ... gradients; `program` is that for as few as the rule
    needs.
    """
    kind: Shape
    leaves: Indices
    places: Places
    slots: tuple[FlatBuffers, ...]
    types: tuple[type, ...]
    """Python types of the counters, for those who look."""
    table: ScalarTable
    parts: tuple[Part[Any], ...] = ()
    """How each parameter is spread over processes, where every process steps the parts that it holds."""
    whole: Shape | None = None
    """The kind of these parameters; `kind` is that of the parts."""
    shared: bool = False
    """Whether another store may hold the same arrays: then they are copied before they are written."""
    changes: bool = False
    """Whether its programs give what is to be added to the parameters in place of new ones."""
    cache: Cache = dataclasses.field(default_factory=Cache)
    """What engines remember of this group."""

    def owned(self) -> "Group":
        """This group, its arrays no other store's: they may be written."""
        if self.shared:
            self.slots = tuple(p.copy() for p in self.slots)
            self.shared = False
        return self

    def fork(self) -> "Group":
        """The same leaves and arrays with a table of their own; what a graph may write is not shared."""
        if self.kind.capturable:
            return self.duplicate()
        self.shared = True
        return dataclasses.replace(self)

    def duplicate(self) -> "Group":
        """The same leaves with arrays and a table of their own."""
        slots = tuple(p.copy() for p in self.slots)
        return dataclasses.replace(
            self,
            table=self.table.copy(),
            slots=slots,
            shared=False,
            cache=Cache() if self.kind.capturable else self.cache,
        )

    def successor(self, *, whole: bool, traced: bool) -> "Group":
        """A group for the state after a step: new arrays, not yet written where the `whole` of it is
        stepped; those of a traced step are replaced, not written.
        """
        slots = tuple(p.separated() if traced else p.empty() if whole else p.copy() for p in self.slots)
        turned = traced and not all(isinstance(p, Separate) for p in self.slots)
        kind = self.whole if traced and self.whole is not None else self.kind
        return dataclasses.replace(
            self,
            table=self.table.copy(),
            slots=slots,
            shared=False,
            kind=kind,
            places=spread_out(self.parts) if turned and self.parts else self.places,
            parts=() if turned else self.parts,
            cache=Cache() if turned else self.cache,
        )

    @property
    def captured(self) -> bool:
        """Whether a graph that was captured holds a step of some of the leaves."""
        return self.cache.captured

    def subset(self, members: Indices | None) -> Subset:
        """All leaves of this group, or some members, with what engines remember of them."""
        if members is None:
            return self.cache.all_of(self.leaves, self.places, self.slots)
        return self.cache.some_of(members, self.leaves, self.places, self.slots)

    @property
    def spread(self) -> bool:
        """Whether every process steps the parts that it holds, which are plain memory."""
        return bool(self.parts)

    def wholes(self, subset: Subset) -> list[tuple[int, ...]]:
        """The shapes of the parameters of some members, with the parts that other processes hold."""
        if not self.parts:
            return subset.places.shapes
        return (
            [p.of for p in self.parts]
            if subset.members is None
            else [self.parts[i].of for i in subset.members]
        )

    @property
    def opaque(self) -> bool:
        """Whether the arrays of the state are separate ones."""
        return any(isinstance(p, Separate) for p in self.slots)

    def program_for(self, gradients: int) -> Program:
        """The program for updates with this many gradients; raises TraceError if the rule needs more."""
        if gradients not in self.programs:
            state = self.stand_in(self.program.template)
            made = program_of(self.rule, state, self.kind, gradients - 1)
            self.programs[gradients] = of_changes(made) if self.changes else made
        return self.programs[gradients]

    def stand_in(self, template: Any) -> Any:
        """A state of the form of a template, whose arrays have types and shapes alone: the numbers may be
        traced.
        """
        arrays = iter([p.library.stand_in(p.shape(0), p.dtype) for p in self.slots])
        return unflatten(
            template, iter([next(arrays) if registry.isarray(v) else v for _, v in flatten(template)])
        )

    def of_changes(self) -> "Group":
        """The same leaves, whose steps give what is to be added to the parameters."""
        programs = {n: of_changes(p) for n, p in self.programs.items()}
        return dataclasses.replace(self, program=of_changes(self.program), programs=programs, changes=True)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what can be made again: programs, and the tables of engines."""
        kept = {k: v for k, v in vars(self).items() if k not in ("program", "programs", "cache")}
        return kept | {"template": self.program.template}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        template = kept.pop("template")
        vars(self).update(kept, cache=Cache())
        self.program = program_of(self.rule, self.stand_in(template), self.kind)
        self.programs = {needed(self.rule) + 1: self.program}

    def rule_of(self, i: int) -> Rule:
        """The rule of leaf i of this group."""
        like, given = numbers(self.rule), self.table.read_hypers(i)
        return fill(self.rule, iter([as_kind(type(old), v) for old, v in zip(like, given, strict=True)]))

    def state_of(self, i: int) -> Any:
        """The state of leaf i: arrays are views (read-only where other stores share them), numbers are
        copies.
        """
        known = self.table.read_counters(i)[: len(self.types)]
        counters = iter([as_kind(t, v) for t, v in zip(self.types, known, strict=True)])
        arrays = iter([slot.library.seen(slot[i], read_only=self.shared) for slot in self.slots])
        leaves = [
            next(arrays) if registry.isarray(v) else next(counters) for _, v in flatten(self.program.template)
        ]
        return unflatten(self.program.template, iter(leaves))

    def entry(self, i: int) -> "Entry":
        """All that is known of leaf i of this group."""
        steps = tuple(self.table.read_counters(i)[len(self.types) :])
        return Entry(int(self.leaves[i]), self.rule_of(i), self.state_of(i), self.table.read_clock(i), steps)


class Entry(NamedTuple):
    """A leaf on its way into a group."""

    leaf: int
    rule: Rule
    state: Any
    clock: Any = 0
    steps: tuple[Any, ...] = ()
    """How many steps were taken under each condition of the rule."""


# -- making groups -------------------------------------------------------------------------------------------


def grouped(
    entries: Sequence[Any],
    shapes: Sequence[Shape | None],
    programs: dict[Any, Program] | None = None,
    paths: Sequence[KeyPath] = (),
    *,
    alone: bool = False,
) -> list[Group]:
    """Groups for entries, or (leaf, rule, state): one for each rule structure, form of state, type and
    device; or for each leaf, where each is stepped `alone`. `programs` are those that were made before, to be
    taken again; `paths` those of all leaves, for messages.
    """
    kinds: dict[Any, tuple[Program, list[Entry]]] = {}
    programs = {} if programs is None else programs
    skeletons: dict[int, Any] = {}
    for given in entries:
        entry = Entry(*given)
        rule, state = entry.rule, entry.state
        kind = shapes[entry.leaf]
        assert kind is not None
        if id(rule) not in skeletons:
            skeletons[id(rule)] = skeleton(rule)
        key = skeletons[id(rule)], form(state), _arrays(state, kind), kind.key
        path = paths[entry.leaf] if paths else None
        if key not in programs:
            programs[key] = program_of(rule, state, kind, path=path)
        if programs[key].shape_read:
            key = (*key, kind.shape)
            if key not in programs:
                programs[key] = program_of(rule, state, kind, path=path)
        kinds.setdefault((key, entry.leaf if alone else None), (programs[key], []))[1].append(entry)
    return [_group(items, program, shapes) for program, items in kinds.values()]


def _arrays(state: Any, kind: Shape) -> Any:
    """The types of the arrays of a state, and whether they have the shape of the parameters."""
    return tuple((v.dtype, tuple(v.shape) == kind.shape) for v in values(state) if registry.isarray(v))


def program_of(
    rule: Rule, state: Any, kind: Shape, more: int | None = None, path: KeyPath | None = None
) -> Program:
    """The program for parameters of one kind, with as many further gradients as are given, or else needed;
    `path` is the place of the first of them, for messages.
    """
    try:
        return trace(rule, state, kind.stand_in(), needed(rule) if more is None else more)
    except ShapeError as error:
        if path is None:
            raise
        raise ShapeError(f"{error}, at {path.code('model')}") from error


def _group(items: list[Entry], program: Program, shapes: Sequence[Shape | None]) -> Group:
    kinds = [k for e in items if (k := shapes[e.leaf]) is not None]
    first, rule = kinds[0], items[0].rule
    cut, whole = _cut(kinds, program), first
    if cut:
        first = dataclasses.replace(first, device=cut[0].device, opaque=False)
    places = _laid(cut or kinds, together=is_free(program))
    columns = zip(*([v for v in values(e.state) if registry.isarray(v)] for e in items), strict=True)
    slots = [
        _slot([first, *kinds[1:]], places if slot.shape is None else None, list(arrays), cut)
        for slot, arrays in zip(program.slots, columns, strict=True)
    ]
    return Group(
        rule=rule,
        program=program,
        programs={needed(rule) + 1: program},
        kind=first,
        leaves=np.array([e.leaf for e in items], np.int64),
        places=places,
        slots=tuple(slots),
        types=tuple(type(v) for v in _counters(items[0].state)),
        table=table_of(
            _rows(items, program),
            [e.clock for e in items],
            program.hypers,
            first.library,
            first.device,
            captured=first.capturable,
            apart=any(map(depends_on_leaf, program.new_counters)),
        ),
        parts=cut,
        whole=whole if cut else None,
    )


def _laid(arrays: Sequence[Shape | Part[Any]], *, together: bool) -> Places:
    """The places of arrays of such shapes."""
    return Places.of([a.shape for a in arrays], [a.strides for a in arrays], together=together)


@cached
def is_free(program: Program) -> bool:
    """Whether some values have another shape than the parameters."""
    return any(e.domain == "free" for e in order(program.roots, guards=True))


def _cut(kinds: Sequence[Shape], program: Program) -> tuple[Part[Any], ...]:
    """How parameters are spread over processes, where each may step its parts, and bring whole matrices to
    their owners; () elsewhere.
    """
    cut = tuple(k.part for k in kinds if k.part is not None)
    if not is_free(program):
        return cut
    return tuple(part.in_order() for part in cut) if all(part.pieces is not None for part in cut) else ()


def _slot(
    kinds: Sequence[Shape], places: Places | None, arrays: list[Any], cut: tuple[Part[Any], ...]
) -> FlatBuffers:
    """One array of the state of each leaf: at the places of the parameters, or, for None, at its own; those
    that are spread over processes are `cut`.
    """
    first, library = kinds[0], kinds[0].library
    if first.packed and places is not None:
        bucketed = Places.bucketed([k.shape for k in kinds], [k.strides for k in kinds])
        return Bucketed.of(library, first.device, bucketed, arrays)
    if cut and places is None:
        cut = tuple(part.like(tuple(a.shape)) for part, a in zip(cut, arrays, strict=True))
        places = _laid(cut, together=True)
    there = _places(arrays) if places is None else places
    if first.opaque:
        return Separate(first.name, arrays[0].dtype, first.device, there, arrays)
    slot = FlatBuffers.zeros(library, arrays[0].dtype, first.device, there)
    _fill(slot, [part.cut(a) for part, a in zip(cut, arrays, strict=True)] if cut else arrays)
    return Spread(**vars(slot), parts=cut) if cut else slot


def _fill(slot: FlatBuffers, arrays: Sequence[Any]) -> None:
    """Write arrays into a slot of zeros, which are left as the system gives them."""
    held, filled = list(slot), [i for i, a in enumerate(arrays) if slot.library.any_set(a)]
    if filled:
        slot.library.assign_many([held[i] for i in filled], [arrays[i] for i in filled])


def _rows(items: list[Entry], program: Program) -> list[list[Any]]:
    """The scalars of each leaf: hyper-parameters, counters of the state, steps under conditions."""
    known = {id(rule): numbers(rule) for rule in {id(e.rule): e.rule for e in items}.values()}
    return [[*known[id(e.rule)], *_counters(e.state), *_steps(e, program)] for e in items]


def _counters(state: Any) -> list[Any]:
    """The numbers in a state."""
    return [v for v in values(state) if not registry.isarray(v)]


def _steps(entry: Entry, program: Program) -> tuple[Any, ...]:
    """How many steps a leaf has taken under each condition of a program; of new ones, every update so far."""
    known = entry.steps[: program.hidden]
    return (*known, *[entry.clock] * (program.hidden - len(known)))


def depends_on_leaf(e: Expr) -> bool:
    """Whether a counter comes to differ from leaf to leaf: then each has a row of scalars at once, where
    a change of structure compiles anew.
    """
    return any(is_full_reduction(node) or node.op == "size" for node in order([e]))


def _places(arrays: list[Any]) -> Places:
    strides = [contiguous_strides(tuple(a.shape)) for a in arrays]
    return Places.of([tuple(a.shape) for a in arrays], strides, together=True)


def started(rule: Rule, x: Any, path: KeyPath) -> Any:
    """The state that a rule wants for the array at a path; raises BadState for what is no rule, BadSetting
    for an array that the rule does not take.
    """
    if not isinstance(rule, Rule):
        hint = f"; write {rule.__name__}()" if isinstance(rule, type) and issubclass(rule, Rule) else ""
        raise BadState(f"the rule for {path.code()} is {rule!r}; it takes a rule, such as Adam(){hint}")
    try:
        refuse_shape(rule, tuple(x.shape))
        state = rule.init(x)
    except BadSetting as e:
        raise BadSetting(f"{path.code()}: {e}") from e
    if x.shape != ():
        return state
    # Arithmetic turns 0-d arrays of NumPy into its numbers; beside a 0-d parameter they are its state arrays.
    as_array = registry.library(x).scalar_array
    return unflatten(state, iter([v if (a := as_array(v)) is None else a for _, v in flatten(state)]))
