"""Where tensors lie, and where results are written."""

import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable, Iterator

import torch

Step = Callable[[], object]


SCALE = 1024.0
"""By which the gradients of the recipe are too large."""


CHECKED = 4
"""Steps after which all ways must have the same numbers."""


WARM = 3
"""Steps before a step is noted in a CUDA graph."""


NEEDS = "needs a device"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where tensors lie: on a device, or on the CPU in a rehearsal."""

    name: str

    @property
    def rehearse(self) -> bool:
        return self.name == "cpu"

    @property
    def engine(self) -> str | None:
        """What `setup` is asked for; a device has the kernels without asking."""
        return "triton" if self.rehearse else None

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    def wait(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def free(self) -> float:
        """Bytes of memory that nobody has."""
        if self.rehearse:
            return math.inf
        gc.collect()
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])

    @contextlib.contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Here torch raises for whatever waits for the device."""
        if self.rehearse:
            yield
            return
        self.wait()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
