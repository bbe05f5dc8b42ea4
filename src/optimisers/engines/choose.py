"""Which engine runs a group? The first of its library that does not refuse; every refusal is kept for
`explain`.
"""

import dataclasses
import importlib
import importlib.util

from optimisers.engines import interpret
from optimisers.engines.task import Engine
from optimisers.errors import BadSetting
from optimisers.state.group import Group


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


@dataclasses.dataclass(frozen=True)
class Plug:
    """Where an engine is found: its module is imported when a group may need it."""

    name: str
    """What users call it."""
    module: str
    value: str = "ENGINE"
    devices: tuple[str, ...] = ("",)
    """How the names of its devices begin."""
    needs: tuple[str, str] | None = None
    """(a package without which its module cannot be imported, what is said then)."""

    @property
    def loaded(self) -> Engine:
        """The engine itself."""
        return getattr(importlib.import_module(self.module), self.value)

    def refusal(self, group: Group) -> str:
        """Why it does not take a group; empty if it does."""
        if self.needs is not None and importlib.util.find_spec(self.needs[0]) is None:
            return self.needs[1]
        return self.loaded.refusal(group)

    def serves(self, group: Group) -> bool:
        """Whether it is made for the device of a group."""
        return group.kind.device.startswith(self.devices)


NUMBA = Plug("numba", "optimisers.engines.cpu.task", devices=("cpu",))
TRITON = Plug(
    "triton",
    "optimisers.engines.cuda.task",
    devices=("cuda",),
    needs=("torch", "Triton is driven through PyTorch, which is not installed"),
)

ENGINES: dict[str, tuple[Plug, ...]] = {
    "numpy": (NUMBA,),
    "torch": (NUMBA, TRITON),
    "cupy": (TRITON, Plug("cupy.fuse", "optimisers.engines.cupy")),
    "jax": (
        Plug("numba", "optimisers.engines.xla.task", "KERNELS"),
        Plug("xla", "optimisers.engines.xla.task", "OPERATIONS"),
    ),
}
"""Array library -> its engines, the fastest first; the interpreter comes last for all."""

SYMBOLIC = {"jax": ENGINES["jax"][-1]}
"""Array library -> its engine for steps that somebody follows."""

FUSED = {plug.name: plug for plug in (NUMBA, TRITON)}
"""The engines that print kernels, by name."""

NAMES = (*FUSED, interpret.NAME)


def choice_for(group: Group, wanted: str | None) -> Choice:
    """The engine for leaves of one group; remembered by the group."""
    found = group.memo.choice
    if not isinstance(found, Choice):
        found = group.memo.choice = _choose(group, wanted)
    return found


def engine_for(group: Group, wanted: str | None, *, symbolic: bool) -> Engine:
    """The engine of a step; where somebody follows it, one that only uses functions of the array library."""
    if not symbolic:
        return choice_for(group, wanted).engine
    plug = SYMBOLIC.get(group.kind.name)
    return interpret.ENGINE if plug is None else plug.loaded


def _choose(group: Group, wanted: str | None) -> Choice:
    if wanted not in (None, *NAMES):
        raise BadSetting(f"engine={wanted!r}; it takes {', '.join(map(repr, NAMES))}, or None to choose")
    if group.kind.capturable:
        return _captured(group, wanted)
    if wanted == interpret.NAME:
        return Choice(interpret.ENGINE, (("", "asked for"),))
    if wanted is not None and group.kind.name != "jax":
        return _wanted(group, wanted)
    refusals: list[tuple[str, str]] = []
    for plug in ENGINES.get(group.kind.name, ()):
        if plug.serves(group):
            why = plug.refusal(group)
            if not why:
                return Choice(plug.loaded, tuple(refusals))
            refusals.append((plug.name, why))
    return Choice(interpret.ENGINE, tuple(refusals))


def _wanted(group: Group, wanted: str) -> Choice:
    """The engine that was asked for; raises BadSetting if it does not take the group."""
    plug = FUSED[wanted]
    if why := plug.refusal(group):
        raise BadSetting(f"engine={wanted!r} cannot run this model: {why}")
    return Choice(plug.loaded, ())


def _captured(group: Group, wanted: str | None) -> Choice:
    """The engine for a state that lives on its device; raises BadSetting if it does not take the group."""
    why = TRITON.refusal(group) if wanted in (None, TRITON.name) else f"engine={wanted!r}"
    if why:
        raise BadSetting(
            f"capturable=True cannot run this model: {why}; it takes float16, bfloat16, float32 and float64 "
            "on a CUDA device, and the engine 'triton'"
        )
    return Choice(TRITON.loaded, ())
