"""How is a kernel launched? What Triton is told, where kernels run, and what a captured graph keeps."""

import contextlib
import functools
import os
from collections.abc import Generator
from typing import Any

import torch

from optimisers.engines import cache
from optimisers.engines.task import Step
from optimisers.graph.cached import cached

CHUNK = 4096
"""Elements of one chunk, which one program of a launch steps: small enough that the last ones to finish do
not keep the device waiting, large enough that looking up tables costs nothing.
"""

BLOCK = 1024
"""Elements that a program holds in registers."""

TAIL = 256
"""The same where elements are taken one by one, each at an address of its own."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True, "enable_reflect_ftz": False}
"""How Triton compiles a pass: products and sums may become one operation, as on the CPU, and the smallest
numbers are not taken for 0.
"""

NARROW = OPTIONS | {"maxnreg": 168}
"""The same for elements of two bytes beside wider state: left to itself, the assembler would spill a register
or two to fit in one more block of threads.
"""

EXACT = {"num_warps": 4, "enable_fp_fusion": False}
"""How it compiles scalars: as the host computes them."""

LANES = 128
"""Leaves whose scalars one program computes."""


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def reaches(device: str) -> bool:
    """Whether kernels of this process run where these arrays are."""
    return device == "cpu" if interpreted() else device.startswith("cuda") and torch.cuda.is_available()


def home(device: str) -> Any:
    """Where the tables of a device are."""
    return torch.device(device)


@functools.cache
def available() -> bool:
    """Whether a Triton is installed that has what is needed."""
    try:
        support()
    except ImportError:
        return False
    return True


@functools.cache
def support() -> Any:
    """Kernels written by hand; their module needs Triton."""
    from optimisers.engines.cuda import device_functions

    return device_functions


def capturing(step: Step) -> bool:
    """Whether what is launched now is noted in a graph, to be replayed."""
    return step.library.graphs.capturing(step.kind.device)


def launched(step: Step, kernel: Any, programs: int, given: tuple[Any, ...], **options: Any) -> None:
    """Launch a kernel; what a graph that is captured reads and writes is kept as long as the state."""
    if capturing(step):
        step.job.subset.captured.append(given)
    kernel[(programs,)](*given, **options)


def loaded(text: str) -> Any:
    """The kernel of a text; it holds its module."""
    module = cache.load(text)
    kernel = module.kernel
    kernel.module_ = module
    return kernel


@cached
def compiled(kernel: Any, kinds: tuple[Any, ...], device: Any, **options: Any) -> None:
    """Have a kernel compiled for arguments of some types, once."""
    if support().INTERPRETED:
        return
    with contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        kernel.warmup(*kinds, grid=(1,), **options)


def options_of(itemsize: int) -> dict[str, Any]:
    """How a pass over parameters of so many bytes is compiled."""
    return {"BLOCK": BLOCK, "TAIL": TAIL, **(NARROW if itemsize == 2 else OPTIONS)}


@contextlib.contextmanager
def _entered(device: Any, stream: Any) -> Generator[None]:
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


def on(library: Any, device: Any) -> Any:
    """The device, and the stream on which an array library works there, as the place of launches."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    handle = library.graphs.stream(str(device))
    if handle is not None and handle != torch.cuda.current_stream(device).cuda_stream:
        stream = torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)
        return _entered(device, stream)
    if torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
