"""Which engine runs a group? The fused one where it can, else the interpreter; the reason is kept for
`explain`.
"""

import dataclasses
import functools
import importlib
import importlib.util
from typing import Any

from optimisers.engines import interpret
from optimisers.engines.task import Task
from optimisers.errors import BadSetting
from optimisers.state.group import Group


@dataclasses.dataclass(frozen=True)
class Choice:
    """The engine of a group."""

    name: str
    task: type[Task]
    reason: str
    """Why it is not a faster one; empty if it is the fastest."""


FUSED = {"numba": "optimisers.engines.cpu.task", "triton": "optimisers.engines.cuda.task"}
"""Fused engine -> its module."""

NAMES = (*FUSED, interpret.NAME)


@functools.cache
def fused(name: str) -> Any:
    """The module of a fused engine, imported when the first state is made: `import optimisers` stays
    light.
    """
    return importlib.import_module(FUSED[name])


SYMBOLIC = {"jax": "optimisers.engines.xla.task"}
"""Array library -> the module with its own task for steps whose values nobody may look at."""


@functools.cache
def _symbolic(name: str) -> Any:
    return importlib.import_module(SYMBOLIC[name])


def symbolic_task(library: Any) -> type[Task]:
    """What computes a step that somebody follows."""
    return _symbolic(library.NAME).Xla if library.NAME in SYMBOLIC else interpret.Interpreter


OWN = {"cupy": "optimisers.engines.cupy"}
"""Array library -> the module that steps its arrays with the library's own compiler."""


@functools.cache
def _own(name: str) -> Any:
    return importlib.import_module(OWN[name])


def choice_for(group: Group, wanted: str | None, memo: dict[str, Any]) -> Choice:
    """The engine for leaves of one group; remembered in `memo`."""
    if "engine" not in memo:
        memo["engine"] = _choose(group, wanted)
    return memo["engine"]


def task_for(group: Group, wanted: str | None, memo: dict[str, Any]) -> type[Task]:
    return choice_for(group, wanted, memo).task


def _choose(group: Group, wanted: str | None) -> Choice:
    kind = group.kind
    if wanted not in (None, *NAMES):
        raise BadSetting(f"engine={wanted!r}; it takes {', '.join(map(repr, NAMES))}, or None to choose")
    if wanted == interpret.NAME and not kind.capturable:
        return Choice(interpret.NAME, interpret.Interpreter, "asked for")
    if kind.name in SYMBOLIC:
        module = _symbolic(kind.name)
        why = module.refusal(group)
        return Choice(module.NAME if why else "numba", module.Xla, why or "")
    name = wanted or ("triton" if kind.device.startswith("cuda") or kind.capturable else "numba")
    reason = _refusal(group, name)
    if not reason:
        return Choice(name, fused(name).Fused, "")
    if kind.capturable:
        raise BadSetting(
            f"capturable=True cannot run this model: {reason}; it takes float16, bfloat16, float32 and "
            "float64 on a CUDA device, and the engine 'triton'"
        )
    if kind.name in OWN and wanted is None:
        module = _own(kind.name)
        reason = module.refusal(group) or ""
        if not reason:
            return Choice(module.NAME, module.Fusion, "")
    if wanted is not None:
        raise BadSetting(f"engine={wanted!r} cannot run this model: {reason}")
    return Choice(interpret.NAME, interpret.Interpreter, reason)


def _refusal(group: Group, name: str) -> str:
    """Why an engine does not take a group; empty if it does."""
    kind = group.kind
    if kind.capturable and name != "triton":
        return f"engine={name!r}"
    if group.loose or kind.loose:
        return "state in arrays that each stand for themselves"
    if name == "triton" and importlib.util.find_spec("torch") is None:
        return "Triton is driven through PyTorch, which is not installed"
    why = fused(name).refusal(group.program, kind.name, kind.device, kind.library.type_name(kind.dtype))
    return why or ""
