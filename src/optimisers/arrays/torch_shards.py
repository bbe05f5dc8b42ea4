"""How do tensors lie that are spread over processes (DTensor)? Each process holds a part, a plain tensor."""

# pyright: reportPrivateUsage=false

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from optimisers.arrays.parts import HostArray, Part, Shape, Shards, Strides

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

    def local(self, x: Tensor) -> Tensor | None:
        held = spread(x)
        if held is None or held.shape != self.of or held.placements != self.placements:
            return None
        return here(held) if held.device_mesh == self.mesh else None

    def cut(self, x: Tensor) -> Tensor:
        if (found := self.local(x)) is not None:
            return found
        distributed: Any = sys.modules["torch.distributed.tensor"]
        held = spread(x)
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
                local,
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
        import torch.distributed as dist

        by = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
        sent = torch.from_numpy(values).to(self.mesh.device_type)
        for axis, placement in enumerate(self.placements):
            if placement.is_shard():
                dist.all_reduce(sent, by, group=self.mesh.get_group(axis))
        return sent.cpu().numpy()

    @property
    def processes(self) -> tuple[int, ...]:
        return tuple(sorted(self.mesh.mesh.flatten().tolist()))

    @property
    def first(self) -> bool:
        return self.mesh.get_rank() == self.processes[0]

    def largest(self, values: HostArray) -> HostArray:
        import torch.distributed as dist

        sent = torch.from_numpy(values).to(self.mesh.device_type)
        for axis in range(self.mesh.ndim):
            dist.all_reduce(sent, dist.ReduceOp.MAX, group=self.mesh.get_group(axis))
        return sent.cpu().numpy()

    def gathered(self, x: Tensor) -> Tensor:
        held: Any = x
        with torch.no_grad():
            return held.full_tensor()


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
