"""How is a state shared out to processes that hold the same parameters (ZeRO-1)? Each keeps the state of its
part of every parameter and steps that; then all give each other what they have stepped.

What a process reads and writes are views of the parameters and gradients that are there: nothing is copied
but what is sent.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast, final

import numpy as np
import torch
import torch.distributed as dist

from optimisers.arrays.torch_shards import answered, share, spread
from optimisers.errors import BadSetting, BadState, ProcessLost
from optimisers.state.store import Store
from optimisers.step.update import update_listed

BUCKET = 1 << 25
"""Bytes that travel together: the next begin to, before these are waited for."""


GATHER: Any = vars(dist).get("all_gather_single") or vars(dist)["all_gather_into_tensor"]
"""What gathers equal parts; PyTorch 2.13 has renamed it."""


class Bucket(NamedTuple):
    """Parameters of one type whose parts travel together."""

    members: list[int]
    width: int
    """Elements that each process sends: as many as the one with most has."""


@final
class Shares:
    """How parameters are shared out to the processes of a group."""

    def __init__(self, group: object) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise BadSetting(
                f"TorchOptimizer was given shard={group!r}; it takes a group of processes: write "
                "shard=torch.distributed.group.WORLD"
            )
        self.group, self.count, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.mesh: Any = None
        self.buckets: tuple[list[int], list[Bucket]] = [], []
        """(parameters, what they were put into) of the last step."""
        self.whole: dict[Any, dict[str, Any]] = {}
        """The entries of each parameter put together, until the next step, where that was asked for."""
        self.torn = ""
        """Why the parameters here are partly those of another step; empty if they are not."""

    # -- who has what ----------------------------------------------------------------------------------------

    def axis(self, shape: Sequence[int]) -> int | None:
        """The axis along which arrays of a shape are cut: the first, if all have some of it, else the
        longest; None for single numbers, which every process steps.
        """
        if not len(shape):
            return None
        return 0 if shape[0] >= self.count else int(np.argmax(shape))

    def pieces(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The part of each process, as views."""
        axis = self.axis(x.shape)
        if axis is None:
            return [x] * self.count
        parts = [share(x.shape[axis], self.count, rank) for rank in range(self.count)]
        return [x.narrow(axis, part.start, part.stop - part.start) for part in parts]

    def spread(self, x: torch.Tensor) -> Any:
        """A whole array as one that is spread over the processes, on the memory that it has.

        Raises BadSetting for one that is spread already.
        """
        import torch.distributed.tensor as tensors

        if spread(x) is not None:
            raise BadSetting(
                f"shard= was given with a parameter of shape {tuple(x.shape)} that is a DTensor: its state "
                "is spread as it is; leave shard out"
            )
        if self.mesh is None:
            self.mesh = dist.device_mesh.DeviceMesh.from_group(self.group, x.device.type)
        x = x if x.layout is torch.strided else x.to_dense()
        axis = self.axis(x.shape)
        place = tensors.Replicate() if axis is None else tensors.Shard(axis)
        local = self.pieces(x.detach())[self.rank]
        return tensors.DTensor.from_local(
            local, self.mesh, [place], run_check=False, shape=x.shape, stride=x.stride()
        )

    # -- a step ----------------------------------------------------------------------------------------------

    def step(
        self,
        store: Store,
        xs: Sequence[Any],
        orders: Sequence[Sequence[Any]],
        loss: object,
        after: Callable[[], object],
    ) -> None:
        """A step in place of whole parameters by whole gradients, which are the same on all processes.

        Raises BadState, on every process, where they disagree about gradients, numbers or clocks, and
        ProcessLost where one does not answer; then nothing has changed, but for one that is lost while new
        parameters travel.
        """
        self.refuse_torn()
        self.whole = {}
        stepped = [
            i
            for i, (g, frozen) in enumerate(zip(orders[0], store.frozen, strict=True))
            if g is not None and not frozen
        ]

        def finish() -> None:
            try:
                self.gather(stepped, xs)
            except ProcessLost as error:
                self.torn = str(error)
                raise
            finally:
                after()

        given: list[Sequence[Any]] = [
            [self.given(store, leaf, x) for leaf, x in enumerate(values)] for values in (xs, *orders)
        ]
        update_listed(
            store,
            store.layout.root,
            given[0],
            given[1:],
            loss=loss,
            ready=lambda: self.agree(store, stepped),
            after=finish,
        )

    def given(self, store: Store, leaf: int, x: torch.Tensor | None) -> Any:
        """An array as the engine of its leaf takes it: whole, or as one that is spread."""
        if x is None or store.group_of[leaf] < 0 or store.where(leaf)[0].spread:
            return x
        return self.spread(x)

    def consolidate(self, state: Mapping[Any, Any], to: int) -> None:
        """Put the entries of all parameters together, in the memory of the host of one process."""
        self.whole = {}
        for p, entries in state.items():
            held = {k: v for k, v in entries.items() if isinstance(v, torch.Tensor) and spread(v) is not None}
            with answered(self.group, "put a state together"):
                full = {k: cast("Any", v).full_tensor() for k, v in held.items()}
            if self.rank == to:
                self.whole[p] = {k: v.cpu() for k, v in full.items()}

    def refuse_torn(self) -> None:
        """Raise BadState where parameters are partly those of another step."""
        if self.torn:
            raise BadState(
                f"a process was lost while new parameters travelled ({self.torn}): those here are partly of "
                "the step before, and the state is of the step after; load both from a checkpoint"
            )

    def agree(self, store: Store, stepped: Sequence[int]) -> None:
        """Wait until all processes are ready to write; raises BadState, on all, where they disagree."""
        leaves = len(store.shapes)
        mask = np.zeros(leaves)
        mask[list(stepped)] = 1
        numbers = [zlib.crc32(np.ascontiguousarray(a).tobytes()) for a in _numbers(store)]
        own = np.array([*mask, *numbers], np.float64)
        sent = torch.from_numpy(np.concatenate([own, -own])).to(self.device)
        with answered(self.group, "agreed on a step"):
            dist.all_reduce(sent, dist.ReduceOp.MAX, group=self.group)
        highest, lowest = np.split(sent.cpu().numpy(), 2)
        odd = np.flatnonzero(highest != -lowest).tolist()
        if odd and odd[0] < leaves:
            raise BadState(
                f"processes disagree: {store.layout.paths[odd[0]].code('grads')} is stepped on some of them "
                "only; a parameter has a gradient on all of them or on none"
            )
        if odd:
            what = ("settings or counters", "numbers of steps")[odd[0] - leaves]
            raise BadState(
                f"processes disagree: the {what} of their states differ; set and load the same on all of them"
            )

    @property
    def device(self) -> Any:
        """Where the group sends from."""
        return torch.device(self.mesh.device_type)

    def gather(self, stepped: Sequence[int], xs: Sequence[Any]) -> None:
        """Give all processes what each has stepped."""
        pieces = {i: self.pieces(xs[i]) for i in stepped if self.axis(xs[i].shape) is not None}
        waiting: Callable[[], object] = tuple
        for bucket in self.packed(list(pieces), xs):
            finish = self.send(bucket, [pieces[i] for i in bucket.members])
            waiting()
            waiting = finish
        waiting()

    def packed(self, members: list[int], xs: Sequence[Any]) -> list[Bucket]:
        """Parameters in buckets; the same ones as long as the same are stepped."""
        if self.buckets[0] != members:
            kinds: dict[Any, list[list[int]]] = {}
            for i in members:
                open_ = kinds.setdefault(xs[i].dtype, [[]])
                if sum(xs[k].nbytes for k in open_[-1]) >= BUCKET:
                    open_.append([])
                open_[-1].append(i)
            lists = [some for several in kinds.values() for some in several]
            self.buckets = members, [Bucket(some, self.width([xs[i] for i in some])) for some in lists]
        return self.buckets[1]

    def width(self, xs: Sequence[Any]) -> int:
        """Elements that each process sends of some parameters."""
        return max(sum(p.numel() for p in parts) for parts in zip(*map(self.pieces, xs), strict=True))

    def send(self, bucket: Bucket, pieces: Sequence[Sequence[Any]]) -> Callable[[], object]:
        """Send the own parts of some parameters to all; what comes back waits for those of the others and
        writes them.
        """
        like = pieces[0][0]
        every = torch.empty(self.count, bucket.width, dtype=like.dtype, device=like.device)
        torch._foreach_copy_(*self._laid(every, pieces, self.rank))
        flat, own = every.view(-1).view(torch.uint8), every[self.rank].clone().view(torch.uint8)
        with answered(self.group, "sent new parameters"):
            work = GATHER(flat, own, self.group, async_op=True)

        def finish() -> None:
            with answered(self.group, "waited for new parameters"):
                work.wait()
            for rank in range(self.count):
                if rank != self.rank:
                    there, here = self._laid(every, pieces, rank)
                    torch._foreach_copy_(here, there)

        return finish

    def _laid(
        self, every: torch.Tensor, pieces: Sequence[Sequence[Any]], rank: int
    ) -> tuple[list[Any], list[Any]]:
        """(where they travel, where they lie) of the parts of one process."""
        lie = [parts[rank] for parts in pieces if parts[rank].numel()]
        ends = np.cumsum([0, *(x.numel() for x in lie)]).tolist()
        row = every[rank]
        return [row[at : at + x.numel()].view(x.shape) for at, x in zip(ends, lie, strict=False)], lie


def shares_of(group: object, *, capturable: bool) -> Shares | None:
    """How parameters are shared out to a group, where one is given."""
    if group is None:
        return None
    if capturable:
        raise BadSetting("a graph of a device holds no collectives: leave capturable or shard out")
    return Shares(group)


def _numbers(store: Store) -> tuple[Any, Any]:
    """(settings and counters, clocks) of all leaves."""
    tables = [group.table for group in store.groups]
    values = [np.asarray(t.arrays()[0])[t.row].reshape(-1) for t in tables]
    clocks = [np.asarray(t.arrays()[1])[t.row] for t in tables]
    return np.concatenate(values), np.concatenate(clocks)
