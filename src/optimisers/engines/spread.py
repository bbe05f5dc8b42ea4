"""How does a step go where every process holds a part of every array? Each steps its own part, as plain
memory; what rules sum over whole arrays is summed over the processes, all sums of a level at once, and what
they compute with whole matrices is computed by the owner of each (`exchange`).
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.owners import cost_of, owners
from optimisers.arrays.parts import HostArray, Part
from optimisers.errors import BadState, TreeMismatch
from optimisers.graph.expr import Expr
from optimisers.state.buffers import FlatBuffers, Indices, Separate, Spread, spread_out
from optimisers.state.group import is_free

if TYPE_CHECKING:
    from optimisers.engines.exchange import Exchange
    from optimisers.engines.task import Step

SMALLEST, LARGEST = 1e-130, 1e130
"""Between these the square of a norm is exact to rounding."""


@final
class SpreadStep:
    """What is spread over processes in a step, which sees the parts that lie here."""

    def __init__(self, step: "Step") -> None:
        group, members = step.job.group, step.job.subset.members
        self.step, self.count = step, len(group.leaves)
        self.members = np.arange(self.count) if members is None else members
        self.across = group.parts[0]
        """Sums over the processes that hold the other parts."""
        self.parts: list[Part[Any]] = [group.parts[i] for i in self.members.tolist()]
        step.whole_sizes = np.array([math.prod(part.of) for part in self.parts], np.int64)
        step.xs = [self._parameter(i, x) for i, x in enumerate(step.xs)]
        step.grads = tuple(
            [self._gradient(i, g, f"grads{order + 1 if order else ''}") for i, g in enumerate(given)]
            for order, given in enumerate(step.grads)
        )
        self.owner = np.zeros(step.leaves, np.int64)
        """The process that computes with the whole of each array."""
        self.exchange: Exchange | None = None
        """How they come there, where a step computes with any."""
        self.slots = [slot for slot in step.slots if isinstance(slot, Spread)]
        """The state as users see it."""
        step.slots = tuple(slot.local() for slot in step.slots)
        step.out = tuple(slot.local() for slot in step.out)

    def _parameter(self, leaf: int, x: Any) -> Any:
        found = self.parts[leaf].local(x)
        if found is None:
            raise TreeMismatch(
                f"{self.step.code(leaf, 'model')} is not spread over processes as `setup` saw it; call "
                "`setup` again for another model"
            )
        return found

    def _gradient(self, leaf: int, g: Any, root: str) -> Any:
        part, library = self.parts[leaf], self.step.library
        found = part.local(g)
        if found is not None or registry.library_of(type(g)) is not library:
            return g if found is None else found
        if tuple(g.shape) != part.of:
            raise TreeMismatch(
                f"gradient of shape {tuple(g.shape)} for parameters of shape {part.of}, at "
                f"{self.step.code(leaf, root)}"
            )
        if library.device(g) == part.device:
            raise TreeMismatch(
                f"{self.step.code(leaf, root)} is a plain array; the parameters are spread over processes: "
                "spread it as they are"
            )
        return part.cut(g)

    def results(self, new: dict[int, Any]) -> dict[int, Any]:
        """New parameters as arrays of the kind of the old ones."""
        like, xs = self.step.library.like, self.step.job.xs
        return {i: like(xs[i], self.parts[i].whole(x)) for i, x in new.items()}

    def full(self, values: Any, neutral: float) -> HostArray:
        """A number for every leaf of the group: of those that are not stepped, one that changes nothing."""
        found = np.full(self.count, neutral, np.float64)
        found[self.members] = values
        return found


@final
class WholeStep:
    """A step of whole arrays where the engine knows no parts: every process computes all of it, and keeps its
    parts of what comes.
    """

    def __init__(self, step: "Step") -> None:
        group = step.job.group
        self.step, self.across, self.count = step, group.parts[0], len(group.leaves)
        members = step.job.subset.members
        self.members = np.arange(self.count) if members is None else members
        self.parts: list[Part[Any]] = [group.parts[i] for i in self.members.tolist()]
        _agree([self])
        given = (step.xs, *step.grads)
        step.xs, *grads = ([p.gathered(x) for p, x in zip(self.parts, xs, strict=True)] for xs in given)
        step.grads = tuple(grads)
        step.slots = tuple(map(_whole_slot, step.slots))
        step.whole_sizes = np.array([math.prod(part.of) for part in self.parts], np.int64)

    def store(self) -> None:
        """Write the parts that lie here of the new parameters."""
        for part, old, new in zip(self.parts, self.step.job.xs, self.step.xs, strict=True):
            self.step.library.assign(part.local(old), part.cut(new))

    def results(self, new: dict[int, Any]) -> dict[int, Any]:
        """New parameters as arrays of the kind of the old ones."""
        like, xs, parts = self.step.library.like, self.step.job.xs, self.parts
        return {i: like(xs[i], parts[i].whole(parts[i].cut(x))) for i, x in new.items()}


def _whole_slot(slot: FlatBuffers) -> Separate:
    """The arrays of a slot, each as the whole of it."""
    assert isinstance(slot, Spread)
    arrays = [part.gathered(x) for part, x in zip(slot.held, slot, strict=True)]
    return Separate(slot.name, slot.dtype, slot.device, spread_out(slot.held), arrays)


def shared_out(steps: Sequence["Step"]) -> None:
    """Say which process computes with each whole matrix of these steps, by what it costs: so that all have
    about as much to do.

    Raises BadState, on every process, where they disagree about which parameters are stepped.
    """
    kinds: dict[Any, list[SpreadStep]] = {}
    for step in steps:
        if step.spread is not None and is_free(step.program):
            kinds.setdefault(step.spread.across.among, []).append(step.spread)
    for found in kinds.values():
        _agree(found)
        for spread, mine in zip(found, shares([spread.parts for spread in found]), strict=True):
            spread.owner = mine


def shares(parts: Sequence[Sequence[Part[Any]]]) -> list[Indices]:
    """The process that computes with each whole array of some groups, which lie over the same processes."""
    every = [part for some in parts for part in some]
    pieces = every[0].pieces if every else None
    count = 1 if pieces is None else len(pieces.all)
    found = owners([cost_of(part.of) for part in every], count)
    return np.split(found, np.cumsum([len(some) for some in parts])[:-1])


def _agree(found: "Sequence[SpreadStep | WholeStep]") -> None:
    """Raise BadState where not all processes step the same parameters."""
    step = found[0].step
    library, device = step.library, step.kind.device
    masks = [np.ones(1), *(np.isin(np.arange(far.count), far.members).astype(float) for far in found)]
    sent = library.scalars.on_device(np.concatenate(masks), device)
    added = _split(library.to_numpy(found[0].across.added(sent)), masks)
    count = next(added)[0]
    for spread in found:
        _refuse_difference(spread, next(added), count)


def joined(found: Sequence[tuple["Step", Sequence[Expr]]]) -> None:
    """Put the reductions that these steps have made of their parts together, over all processes.

    Raises BadState, on every process, where they disagree about which parameters are stepped.
    """
    kinds: dict[Any, list[tuple[Step, Sequence[Expr]]]] = {}
    for step, reductions in found:
        if step.spread is not None:
            kinds.setdefault(step.spread.across.across, []).append((step, reductions))
    for given in kinds.values():
        _join(given)


def _join(found: Sequence[tuple["Step", Sequence[Expr]]]) -> None:
    local = [
        (s, r, np.array(s.scalars.of_leaves(r)))
        for s, reductions in found
        for r in reductions
        if r.args[0].domain != "free"  # these are of whole matrices
    ]
    across = _spread(found[0][0]).across
    sums = [np.ones(1), *(_spread(s).full(1, 0) for s, _ in found)]
    sums += [_spread(s).full(v, 0) for s, r, values in local for v in _addends(r, values)]
    tops = [
        _spread(s).full(values if r.op == "max" else -values, -np.inf)
        for s, r, values in local
        if r.op in ("max", "min")
    ]
    added = _split(across.joined(np.concatenate(sums), "sum"), sums)
    highest = _split(across.joined(np.concatenate(tops), "max"), tops) if tops else iter(())
    count = next(added)[0]
    for step, _ in found:
        _refuse_difference(_spread(step), next(added), count)
    for step, r, values in local:
        spread = _spread(step)
        total = [next(added)[spread.members] for _ in _addends(r, values)]
        new = next(highest)[spread.members] if r.op in ("max", "min") else None
        step.scalars.put(r, _whole(r, spread, values, total, new), of_leaf=True)


def _whole(r: Expr, spread: SpreadStep, values: HostArray, added: list[HostArray], highest: Any) -> HostArray:
    """A reduction over all processes: what its addends came to, or the highest of its values."""
    if r.op == "norm2":
        return _norm(spread, values) if added[1].any() else np.sqrt(added[0])
    if r.op == "sum":
        return added[0] + 1j * added[1] if len(added) > 1 else added[0]
    return np.where(added[0] > 0, np.nan, highest if r.op == "max" else -highest)


def _spread(step: "Step") -> SpreadStep:
    assert step.spread is not None
    return step.spread


def _addends(r: Expr, values: HostArray) -> list[HostArray]:
    """What is added over processes for a reduction: the parts of a sum; of a norm its square, and whether it
    has none; of a maximum whether it is NaN.
    """
    if r.op == "norm2":
        fits = (values == 0) | ~np.isfinite(values) | ((values > SMALLEST) & (values < LARGEST))
        return [values * values, (~fits).astype(float)]
    if r.op == "sum":
        return [np.real(values), np.imag(values)] if np.iscomplexobj(values) else [values]
    return [np.isnan(values).astype(float)]


def _norm(spread: SpreadStep, values: HostArray) -> HostArray:
    """Norms whose squares overflow or vanish."""
    across, members = spread.across, spread.members
    top = across.joined(spread.full(values, 0), "max")[members]
    scale = np.where((top > 0) & np.isfinite(top), top, 1.0)
    return scale * np.sqrt(across.joined(spread.full((values / scale) ** 2, 0), "sum")[members])


def _split(values: HostArray, like: Sequence[HostArray]) -> Iterator[HostArray]:
    return iter(np.split(values, np.cumsum([len(v) for v in like])[:-1]))


def _refuse_difference(spread: "SpreadStep | WholeStep", stepped: HostArray, count: float) -> None:
    """Raise BadState where not all processes step the same parameters."""
    odd = np.flatnonzero((stepped > 0) & (stepped < count))
    if len(odd):
        job = spread.step.job
        name = job.paths[int(job.group.leaves[odd[0]])].code("grads")
        raise BadState(
            f"processes disagree: {name} is there on {int(stepped[odd[0]])} of {int(count)}; a parameter "
            "has a gradient on all of them or on none"
        )
