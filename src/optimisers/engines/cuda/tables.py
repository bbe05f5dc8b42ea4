"""Tables on the device: they go over when they change, in one copy."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from optimisers.engines.addressed.chunks import Chunks
from optimisers.state.buffers import Indices


def lasting(shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
    """Memory on a device for more than one step, in whatever mode that is taken."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def staging(n: int, device: Any) -> Any:
    """Memory of the host from which a device copies by itself."""
    with torch.inference_mode(False):
        return torch.empty(n, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


class ArgumentBuffer:
    """What one launch is told: a table of scalars in float64, addresses, row of each leaf and whether its
    arrays are aligned; in one buffer, so that one copy brings all.
    """

    def __init__(self, device: object, numbers: int, columns: int, leaves: int, owner: object = None) -> None:
        self.owner = owner  # named by its identity, which nothing else must take meanwhile
        self.numbers = numbers + numbers % 2
        room = leaves + leaves % 2
        parts = [self.numbers, columns * room, room, room]
        self.host = np.zeros(max(1, sum(parts)), np.int64)
        self.sent: Any = None
        self.memory = lasting((len(self.host),), torch.int64, device)
        self.staged: Any = None
        at = np.cumsum([0, *parts]).tolist()
        views = [self.memory[a:b] for a, b in itertools.pairwise(at)]
        self.table, (self.addresses, self.row, self.aligned) = views[0].view(torch.float64), views[1:]
        table, addresses, row, aligned = (self.host[a:b] for a, b in itertools.pairwise(at))
        self.to_table = table.view(np.float64)[:numbers]
        self.to_addresses = addresses[: columns * leaves].reshape(columns, leaves)
        self.to_row, self.to_aligned = row[:leaves], aligned[:leaves]

    def pinned(self) -> "ArgumentBuffer":
        """This buffer with pinned memory to copy from: while a graph is captured, none can be had."""
        self.staged = staging(len(self.host), self.memory.device)
        return self

    def send(self, table: Any, rows: Sequence[Indices], row: Any) -> None:
        """Bring over what has changed."""
        if len(self.to_table):
            self.to_table[:] = table.reshape(-1)
        for to, given in zip(self.to_addresses, rows, strict=True):
            to[:] = given
        self.to_row[:] = row
        host, sent, n = self.host, self.sent, self.numbers
        if sent is None or (host[n:] != sent[n:]).any():
            if rows:
                self.to_aligned[:] = (np.bitwise_or.reduce(self.to_addresses, axis=0) & 15) == 0
            copy_over(self.memory, host, len(host), self.staged)
            self.sent = host.copy()
        elif (host[:n] != sent[:n]).any():
            copy_over(self.memory, host, n, self.staged)
            sent[:n] = host[:n]


class Fixed:
    """A vector of whole numbers of the host, and what the device has of it."""

    def __init__(self, device: object, n: int) -> None:
        self.memory = lasting((max(1, n),), torch.int64, device)
        self.sent: Any = None

    def of(self, values: Indices) -> Any:
        if self.sent is None or not np.array_equal(self.sent, values):
            self.sent = np.array(values, np.int64)
            copy_over(self.memory, self.sent, len(self.sent), None)
        return self.memory


def copy_over(memory: Any, host: Any, count: int, staged: Any) -> None:
    """Copy the first words of a vector to the device, without waiting."""
    if memory.device.type == "cpu":
        memory.numpy()[:count] = host[:count]
        return
    if staged is None:
        staged = staging(count, memory.device)
    staged.numpy()[:count] = host[:count]
    memory[:count].copy_(staged[:count], non_blocking=True)


def placed(chunks: Chunks, name: str, device: Any) -> Any:
    """A table of chunks on a device."""
    key = (name, str(device))
    if key not in chunks.placed:
        with torch.inference_mode(False):
            memory = torch.from_numpy(np.ascontiguousarray(getattr(chunks, name)).reshape(-1))
            chunks.placed[key] = memory.to(device, copy=True)
    return chunks.placed[key]
