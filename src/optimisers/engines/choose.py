"""Which engine runs a group? The fused one where it can, else the interpreter; the reason is kept for
`explain`.
"""

import dataclasses
import functools
import importlib
from typing import Any

from optimisers.engines import interpret
from optimisers.engines.job import Task
from optimisers.errors import BadSetting
from optimisers.store import Group


@dataclasses.dataclass(frozen=True)
class Choice:
    """The engine of a group."""

    name: str
    task: type[Task]
    reason: str
    """Why it is not a faster one; empty if it is the fastest."""


NAMES = ("numba", interpret.NAME)


@functools.cache
def fused() -> Any:
    """The module of the fused engine, imported when the first state is made: `import optimisers` stays
    light.
    """
    return importlib.import_module("optimisers.engines.numba")


SYMBOLIC = {"jax": "optimisers.engines.xla"}
"""Array library -> the module with its own task for steps whose values nobody may look at."""


@functools.cache
def _symbolic(name: str) -> Any:
    return importlib.import_module(SYMBOLIC[name])


def symbolic_task(library: Any) -> type[Task]:
    """What computes a step that somebody follows."""
    return _symbolic(library.NAME).Xla if library.NAME in SYMBOLIC else interpret.Interpreter


OWN = {"cupy": "optimisers.engines.fusion"}
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
    if wanted not in (None, *NAMES):
        raise BadSetting(f"engine={wanted!r}; it takes {' or '.join(map(repr, NAMES))}, or None to choose")
    if wanted == interpret.NAME:
        return Choice(interpret.NAME, interpret.Interpreter, "asked for")
    kind = group.kind
    if kind.name in SYMBOLIC:
        module = _symbolic(kind.name)
        why = module.refusal(group)
        return Choice(module.NAME if why else fused().NAME, module.Xla, why or "")
    if kind.name in OWN and wanted is None:
        module = _own(kind.name)
        why = module.refusal(group)
        return (
            Choice(interpret.NAME, interpret.Interpreter, why)
            if why
            else Choice(module.NAME, module.Fusion, "")
        )
    reason = "state in arrays that each stand for themselves" if group.loose or kind.loose else None
    reason = reason or fused().refusal(
        group.program, kind.name, kind.device, kind.library.type_name(kind.dtype)
    )
    if reason is None:
        return Choice(fused().NAME, fused().Fused, "")
    if wanted is not None:
        raise BadSetting(f"engine='numba' cannot run this model: {reason}")
    return Choice(interpret.NAME, interpret.Interpreter, reason)
