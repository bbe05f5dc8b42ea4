"""How do tensors lie that are spread over processes (DTensor)? Each process holds a part, a plain tensor."""

# pyright: reportPrivateUsage=false

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast, final

import numpy as np
import torch
from torch import Tensor

from optimisers.arrays.layout import contiguous_strides
from optimisers.arrays.parts import HostArray, Part, Piece, Pieces, Shape, Shards, Strides
from optimisers.errors import BadState, ProcessLost

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def spread(x: Any) -> "DTensor | None":
    """A tensor that is spread over processes, as that; None for anything else."""
    found: Any = sys.modules.get("torch.distributed.tensor")  # who holds such a tensor has imported it
    kind = getattr(found, "DTensor", None)
    return x if kind is not None and isinstance(x, kind) else None


def here(x: "DTensor") -> Tensor:
    """The part that this process holds; one that is still on its way is waited for."""
    local = x._local_tensor
    if type(local) is Tensor:
        return local
    with torch.no_grad():
        return x.to_local()


def from_start(x: Tensor) -> Tensor:
    """The same memory as a tensor that begins where its storage does: torch.save refuses DTensors of others,
    and of these it writes their own elements only.
    """
    if not x.storage_offset():
        return x
    if not x.numel():
        return torch.empty_like(x)
    last = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    first, size = x.storage_offset(), x.element_size()
    own = x.untyped_storage()[first * size : (last + 1) * size]
    return x.new_empty(0).set_(cast("Any", own), 0, x.shape, x.stride())


def beside(target: Tensor, value: Tensor) -> Tensor:
    """A value that is written into a tensor: all of it, if it is spread over processes and that is not."""
    held = spread(value)
    return value if held is None or spread(target) is not None else held.full_tensor()


def _refuse_another(saved: Any, mesh: Any) -> None:
    """Raise BadState for an array that another process has saved, of which the part here is not known."""
    if saved == mesh and saved.get_coordinate() != mesh.get_coordinate():
        raise BadState(
            f"this is the part that process {saved.get_coordinate()} has saved of an array, and process "
            f"{mesh.get_coordinate()} loads it; save with torch.distributed.checkpoint, or call "
            "consolidate_state_dict() on all processes before one saves state_dict()"
        )


def share(size: int, count: int, number: int) -> slice:
    """What one of some processes has of an axis, cut as DTensor cuts it: equal parts, but for the last."""
    part = -(-size // count)
    return slice(min(number * part, size), min((number + 1) * part, size))


@contextlib.contextmanager
def answered(group: Any, what: str) -> Generator[None]:
    """Raise ProcessLost where a collective in this block fails, since a process of the group has died, or its
    time limit has run out; `what` is what the processes did.
    """
    import torch.distributed as dist

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        rank, count = dist.get_rank(group), dist.get_world_size(group)
        reason = str(error).strip().split("\n")[0]
        raise ProcessLost(
            f"process {rank} of {count} {what}, and another one did not answer: it has died, or is later "
            f"than the time limit of the group allows ({reason})"
        ) from error


@final
@dataclasses.dataclass(frozen=True, eq=False)
class TorchPart(Part[Tensor]):
    """The part of a tensor that this process holds, with the mesh and the placements of the whole."""

    shape: Shape
    strides: Strides
    of: Shape
    device: str
    mesh: Any
    placements: tuple[Any, ...]
    stride: Strides
    """The strides of the whole."""
    inside: tuple[slice, ...] | None = None

    def of_wholes(self) -> "TorchPart":
        at = [slice(None)] * len(self.of)
        for axis, placement in enumerate(self.placements):
            if placement.is_shard():
                size, rank = self.mesh.size(axis), self.mesh.get_local_rank(axis)
                at[placement.dim] = share(self.of[placement.dim], size, rank)
        return dataclasses.replace(self, inside=tuple(at))

    def local(self, x: Tensor) -> Tensor | None:
        held = spread(x)
        if held is None and self.inside is not None and tuple(x.shape) == self.of:
            return (x if x.layout is torch.strided else x.to_dense())[self.inside]
        if held is None or held.shape != self.of or held.placements != self.placements:
            return None
        return here(held) if held.device_mesh == self.mesh else None

    def cut(self, x: Tensor) -> Tensor:
        held = spread(x)
        if held is not None:
            _refuse_another(held.device_mesh, self.mesh)
        if (found := self.local(x)) is not None:
            return found
        distributed: Any = sys.modules["torch.distributed.tensor"]
        with torch.no_grad():
            if held is not None and held.device_mesh == self.mesh:
                return here(held.redistribute(self.mesh, self.placements))
            whole = x if held is None else held.full_tensor()
            if tuple(whole.shape) != self.of:
                return x  # what takes it says that it does not fit
            return here(distributed.distribute_tensor(whole, self.mesh, self.placements, src_data_rank=None))

    def whole(self, local: Tensor) -> Tensor:
        kind: Any = sys.modules["torch.distributed.tensor"].DTensor
        with torch.no_grad():
            return kind.from_local(
                from_start(local),
                self.mesh,
                self.placements,
                run_check=False,
                shape=torch.Size(self.of),
                stride=self.stride,
            )

    @property
    def across(self) -> object:
        return self.mesh, tuple(p.is_shard() for p in self.placements)

    def joined(self, values: HostArray, how: str) -> HostArray:
        cut = [axis for axis, placement in enumerate(self.placements) if placement.is_shard()]
        return self._reduced(values, how, cut)

    def _reduced(self, values: HostArray, how: str, axes: Iterable[int]) -> HostArray:
        """Numbers of all processes joined along some axes of the mesh."""
        import torch.distributed as dist

        by = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
        sent = torch.from_numpy(values).to(self.mesh.device_type)
        for axis in axes:
            group = self.mesh.get_group(axis)
            with answered(group, "joined what all parts give"):
                dist.all_reduce(sent, by, group=group)
        return sent.cpu().numpy()

    @property
    def processes(self) -> tuple[int, ...]:
        return tuple(sorted(self.mesh.mesh.flatten().tolist()))

    @property
    def first(self) -> bool:
        return self.mesh.get_rank() == self.processes[0]

    def largest(self, values: HostArray) -> HostArray:
        return self._reduced(values, "max", range(self.mesh.ndim))

    def gathered(self, x: Tensor) -> Tensor:
        if (held := spread(x)) is None:
            return x
        with torch.no_grad(), answered(group_of(self.mesh), "put an array together"):
            return held.full_tensor()

    @property
    def among(self) -> object:
        return self.mesh

    @property
    def pieces(self) -> Pieces | None:
        return pieces_of(self.of, self.mesh, self.placements)

    @property
    def before(self) -> int | None:
        pieces = self.pieces
        if pieces is None or not all(piece.is_run(self.of) for piece in pieces.all):
            return None
        before = zip(pieces.all[pieces.here].start, contiguous_strides(self.of), strict=True)
        return sum(at * stride for at, stride in before)

    def numbers(self) -> Tensor:
        pieces = self.pieces
        if pieces is None:
            return self.cut(torch.arange(math.prod(self.of), device=self.device).view(self.of))
        found = torch.zeros(self.shape, dtype=torch.int64, device=self.device)
        for axis, stride in enumerate(contiguous_strides(self.of)):
            at = torch.arange(self.shape[axis], device=self.device) + pieces.all[pieces.here].start[axis]
            found += (at * stride).view(-1, *[1] * (len(self.of) - axis - 1))
        return found

    def like(self, shape: Shape) -> "TorchPart":
        kinds: Any = sys.modules["torch.distributed.tensor"]
        along = kinds.Shard(shape.index(max(shape))) if shape else kinds.Replicate()
        placements = tuple(along if p.is_shard() else p for p in self.placements)
        with torch.no_grad():
            whole = torch.empty(shape, device="meta")
        found = pieces_of(tuple(shape), self.mesh, placements)
        assert found is not None
        local = found.all[found.here].shape
        return TorchPart(
            local, contiguous_strides(local), tuple(shape), self.device, self.mesh, placements, whole.stride()
        )

    def in_order(self) -> "TorchPart":
        return dataclasses.replace(self, strides=contiguous_strides(self.shape))

    def added(self, x: Tensor) -> Tensor:
        import torch.distributed as dist

        group = group_of(self.mesh)
        with answered(group, "summed over all"):
            dist.all_reduce(x, group=group)
        return x

    def exchanged(
        self, out: Tensor, received: Sequence[int], given: Tensor, sent: Sequence[int]
    ) -> Callable[[], object]:
        import torch.distributed as dist

        kind = torch.view_as_real if out.is_complex() else None
        if kind is not None:  # collectives know no complex numbers
            out, given = kind(out).view(-1), kind(given).view(-1)
            received, sent = [2 * n for n in received], [2 * n for n in sent]
        group, mine, theirs = group_of(self.mesh), given[: sum(sent)], out[: sum(received)]
        with answered(group, "sent parts of matrices"):
            work = dist.all_to_all_single(
                theirs, mine, list(received), list(sent), group=group, async_op=True
            )
        assert work is not None

        def wait() -> None:
            with answered(group, "waited for parts of matrices"):
                work.wait()

        return wait


def group_of(mesh: Any) -> Any:
    """The group of all processes of a mesh."""
    import torch.distributed as dist

    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh._flatten().get_group()


@functools.lru_cache(1024)
def pieces_of(shape: Shape, mesh: Any, placements: tuple[Any, ...]) -> Pieces | None:
    """What each process of a mesh holds of an array, in the order of their group; None where that is not one
    block each.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import _utils as places

    if any(p.is_partial() for p in placements):
        return None
    ranks = dist.get_process_group_ranks(group_of(mesh))
    at = {int(r): tuple(c) for c, r in np.ndenumerate(mesh.mesh.cpu().numpy())}
    teams: dict[Any, int] = {}
    found: list[Piece] = []
    mine: list[int] = []
    for rank in ranks:
        local, start = places._compute_local_shape_and_global_offset(
            shape, tuple(mesh.shape), list(at[rank]), placements
        )
        found.append(Piece(tuple(map(int, start)), tuple(map(int, local))))
        copy = tuple(c for c, p in zip(at[rank], placements, strict=True) if not p.is_shard())
        mine.append(teams.setdefault(copy, len(teams)))
    first = [p for p, team in zip(found, mine, strict=True) if team == 0]
    if not tiles(first, shape):
        return None
    return Pieces(tuple(found), tuple(mine), ranks.index(dist.get_rank()))


def tiles(pieces: Sequence[Piece], shape: Shape) -> bool:
    """Whether some pieces are the whole of an array, every element once."""
    held = [p for p in pieces if p.size]
    if sum(p.size for p in held) != math.prod(shape):
        return False
    for axis in range(len(shape)):  # cuts go through the whole array: pieces along an axis are all the same
        ends = sorted({(p.start[axis], p.start[axis] + p.shape[axis]) for p in held})
        if any(a[1] != b[0] for a, b in itertools.pairwise(ends)):
            return False
    return True


@final
class TorchShards(Shards[Tensor]):
    """Tensors on a mesh of processes."""

    def part(self, x: Tensor) -> TorchPart | None:
        held = spread(x)
        if held is None or any(p.is_partial() for p in held.placements):
            return None
        local = here(held)
        if type(local) is not Tensor or local.layout is not torch.strided or local.device.type == "meta":
            return None
        dense = torch.empty_like(local, device="meta", memory_format=torch.preserve_format).stride()
        return TorchPart(
            tuple(local.shape),
            tuple(dense),
            tuple(held.shape),
            str(local.device),
            held.device_mesh,
            tuple(held.placements),
            held.stride(),
        )


SHARDS = TorchShards()
