"""Tensors from arrays of NumPy and back, and tensors that lie oddly in memory."""

from typing import Any

import ml_dtypes
import numpy as np
import torch


def tensor(a: Any) -> torch.Tensor:
    """A copy of an array of NumPy, bfloat16 included."""
    a = np.array(a, order="C")
    if a.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def array(t: torch.Tensor) -> Any:
    """A copy of a tensor as an array of NumPy, bfloat16 included."""
    t = t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    if t.dtype is torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def number_of(value: Any) -> Any:
    """What stands in a state, as NumPy has it."""
    return array(value) if isinstance(value, torch.Tensor) else np.asarray(value)


def with_gaps(t: torch.Tensor) -> torch.Tensor:
    return torch.full((*t.shape, 2), 7.0, dtype=t.dtype)[..., 0].copy_(t)


def misaligned(t: torch.Tensor) -> torch.Tensor:
    buffer = bytearray((t.numel() + 1) * t.itemsize + 1)
    return torch.frombuffer(buffer, dtype=t.dtype, offset=1)[: t.numel()].view(t.shape).copy_(t)


def turned(t: torch.Tensor) -> torch.Tensor:
    """The same values with the axes in memory the other way round."""
    axes = tuple(reversed(range(t.ndim)))
    return t.permute(axes).contiguous().permute(axes)
