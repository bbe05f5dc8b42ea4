"""What is a kernel of a program made of? Its passes, the types of what it touches, and what its text says."""

from collections.abc import Callable, Sequence
from typing import Any

from optimisers.arrays import registry
from optimisers.engines.cpu import printer as kernels
from optimisers.engines.cpu.maths import ARITHMETIC, Unprintable
from optimisers.engines.task import Step
from optimisers.graph.passes import Pass, reduce_pass, stages, store_pass
from optimisers.graph.trace import Program


def sample_passes(program: Program) -> list[Pass]:
    """The passes of a step in which every condition of the rule holds."""
    found = [
        reduce_pass(program, k, (True,) * len(stage.reductions)) for k, stage in enumerate(stages(program))
    ]
    found.append(store_pass(program, (True,) * len(program.guards)))
    return [p for p in found if p is not None]


def printable(program: Program, dtype: str, printed: Callable[..., str]) -> str | None:
    """Why a program cannot be printed as kernels; None if it can."""
    try:
        for p in sample_passes(program):
            printed(program, p, dtype, inplace=True)
    except Unprintable as reason:
        return str(reason)
    return None


def kinds_of(program: Program, p: Pass, dtype: str, gradient: str) -> dict[str, str]:
    """The element type of every array that the kernel of a pass may touch."""
    kinds = {"x": dtype, "dx": gradient, **{f"dx{i}": gradient for i in range(2, 10)}}
    kinds |= {s.name: s.dtype for s in program.slots}
    kinds |= {f"new {name}": kind for name, kind in kinds.items()}
    real = arithmetic_of(program, dtype)
    whole = {"float32": "complex64", "float64": "complex128"}.get(real, real)
    stacks = {name: whole if e.type == "complex" else real for name, e in p.stores if name.startswith("w")}
    kinds |= stacks | {f"new {name}": kind for name, kind in stacks.items()}
    return kinds | {f"f{j}": whole if e.type == "complex" else real for j, e in enumerate(p.free)}


def types_of(step: Step) -> tuple[str, str]:
    """The element types of parameters and gradients."""
    return step.library.type_name(step.kind.dtype), step.library.type_name(step.work.gradient)


def titled(p: Pass, dtype: str, *, inplace: bool) -> str:
    """What the text of a kernel says of itself."""
    what = "sums" if p.reductions else "in place" if inplace else "into new arrays"
    return f"One pass over all parameters ({what}), {dtype}."


def arithmetic_of(program: Program, dtype: str) -> str:
    """The real type of the maths: float32 at least, and no narrower than the parameters and the state."""
    wide = any(s.dtype in ("float64", "complex128") for s in program.slots)
    return "float64" if wide else ARITHMETIC.get(dtype, dtype)


def traffic(program: Program, p: Pass, dtype: str, itemsize: int) -> int:
    """Bytes that a pass moves per parameter (see `kernels.traffic`)."""
    return kernels.traffic(p, kinds_of(program, p, dtype, dtype), itemsize)


def labels_of(program: Program) -> dict[str, str]:
    """Names of the state arrays for the reader of a kernel: the last key of their path, where that is one's
    own.
    """
    last = [str(s.path[-1]) if s.path and isinstance(s.path[-1], str) else s.name for s in program.slots]
    return {
        s.name: name if last.count(name) == 1 else s.name for s, name in zip(program.slots, last, strict=True)
    }


def common_dtype(library: Any, grads: Sequence[Sequence[Any]], dtype: Any, wide: Any) -> Any:
    """The element type in which kernels read the gradients: their own if they agree, else that of the
    arithmetic.
    """
    kinds = {g.dtype if registry.library_of(type(g)) is library else wide for order in grads for g in order}
    if kinds == {dtype} or not kinds:
        return dtype
    kind = kinds.pop()
    if kinds:
        return wide
    name, own = library.type_name(kind), library.type_name(dtype)
    readable = name in ARITHMETIC and name != "int16" and ("complex" in name) == ("complex" in own)
    return kind if readable else wide
