"""Which engine runs a group? The first of its library that does not refuse; every refusal is kept for
`explain`.
"""

import dataclasses
import importlib.util
import logging

from optimisers.arrays import registry
from optimisers.arrays.registry import TRITON, Plug
from optimisers.engines import interpret
from optimisers.engines.task import Engine
from optimisers.errors import BadSetting
from optimisers.graph.expr import order
from optimisers.state.group import Group

LOG = logging.getLogger("optimisers")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The engine of a group."""

    engine: Engine
    refusals: tuple[tuple[str, str], ...]
    """(engine, why it does not take the group) of every faster one."""

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def reason(self) -> str:
        """Why it is not the next faster one; empty if there is none."""
        return self.refusals[-1][1] if self.refusals else ""


def plugs(group: Group) -> tuple[Plug, ...]:
    """The engines of the library of a group, the fastest first."""
    return registry.BACKENDS[group.kind.name].engines


def named() -> dict[str, Plug]:
    """Those that users may ask for, by name; of several libraries' engines of one name the first."""
    found: dict[str, Plug] = {}
    for backend in registry.BACKENDS.values():
        for plug in backend.engines:
            if plug.asked:
                found.setdefault(plug.name, plug)
    return found


def engine_of(plug: Plug) -> Engine:
    """The engine itself, imported now."""
    found = registry.load(plug.engine) if isinstance(plug.engine, str) else plug.engine
    assert isinstance(found, Engine)
    return found


def refusal(plug: Plug, group: Group) -> str:
    """Why an engine does not take a group; empty if it does."""
    if plug.needs is not None and importlib.util.find_spec(plug.needs[0]) is None:
        return plug.needs[1]
    return engine_of(plug).refusal(group)


def choice_for(group: Group, wanted: str | None) -> Choice:
    """The engine for leaves of one group; remembered by the group."""
    found = group.cache.choice
    if not isinstance(found, Choice):
        found = group.cache.choice = _choose(group, wanted)
        LOG.info(
            "%s: %d arrays of %s in %s on %s go to the engine %s%s",
            group.program.title,
            len(group.leaves),
            group.kind.name,
            group.kind.dtype,
            group.kind.device,
            found.name,
            "".join(f"; {name} {why}" for name, why in found.refusals if name),
        )
    return found


def engine_for(group: Group, wanted: str | None, *, traced: bool) -> Engine:
    """The engine of a step; of a traced one, an engine that only uses functions of the array library."""
    if not traced:
        return choice_for(group, wanted).engine
    found = [p for p in plugs(group) if p.traced]
    return engine_of(found[0]) if found else interpret.ENGINE


def _choose(group: Group, wanted: str | None) -> Choice:
    names = (*named(), interpret.NAME)
    if wanted not in (None, *names):
        raise BadSetting(f"engine={wanted!r}; it takes {', '.join(map(repr, names))}, or None to choose")
    if group.kind.capturable:
        return _captured(group, wanted)
    if wanted == interpret.NAME:
        return Choice(interpret.ENGINE, (("", "asked for"),))
    if wanted is not None:
        return _wanted(group, wanted)
    refusals: list[tuple[str, str]] = []
    for plug in plugs(group):
        if group.kind.device.startswith(plug.devices):
            why = refusal(plug, group)
            if not why:
                return Choice(engine_of(plug), tuple(refusals))
            refusals.append((plug.name, why))
    return Choice(interpret.ENGINE, tuple(refusals))


def _wanted(group: Group, wanted: str) -> Choice:
    """The engine that was asked for; raises BadSetting if it does not take the group."""
    own = {p.name: p for p in plugs(group)}
    plug = own.get(wanted) or named()[wanted]
    if why := refusal(plug, group):
        raise BadSetting(f"engine={wanted!r} cannot run this model: {why}")
    return Choice(engine_of(plug), ())


def _captured(group: Group, wanted: str | None) -> Choice:
    """The engine for a state that lives on its device; raises BadSetting if it does not take the group."""
    why = refusal(TRITON, group) if wanted in (None, TRITON.name) else f"engine={wanted!r}"
    if why:
        raise BadSetting(
            f"capturable=True cannot run this model: {why}; it takes float16, bfloat16, float32 and float64 "
            "on a CUDA device, and the engine 'triton'"
        )
    nodes = order(group.program.roots, guards=True)
    if group.program.choices and any(e.domain == "free" for e in nodes):
        raise BadSetting(
            f"capturable=True cannot run this model: {type(group.rule).__name__} computes with matrices at "
            "some steps alone, and a captured graph leaves nothing out; leave capturable out, capture the "
            "forward and the backward pass, and call update_ after each replay"
        )
    return Choice(engine_of(TRITON), ())
