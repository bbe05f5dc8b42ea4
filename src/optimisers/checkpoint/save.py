"""Saving and loading, as users call them."""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from optimisers.arrays import registry
from optimisers.arrays.memory import laid_out
from optimisers.arrays.protocol import HostArray
from optimisers.checkpoint import files
from optimisers.checkpoint.about import About, parted, plainly, rules_of, ties_of, understood, written
from optimisers.checkpoint.entries import (
    Kept,
    Modelled,
    form_of,
    in_numpy,
    kept_of,
    modelled,
    part_of,
    tree_of,
    whole,
)
from optimisers.checkpoint.files import File, Reader
from optimisers.checkpoint.fit import Fitted, Names, Plan, fitted
from optimisers.checkpoint.format import Form, elements, ordered
from optimisers.checkpoint.put import Given, placed, refuse_read_only
from optimisers.checkpoint.together import Gathered, agreed, by_first, compared, team_of
from optimisers.errors import BadFile, TreeMismatch, deprecated
from optimisers.state.leaf import parts
from optimisers.tree.path import KeyPath

S = TypeVar("S")
M = TypeVar("M")


# -- saving --------------------------------------------------------------------------------------------------


def save(
    file: File,
    state: object,
    model: object = None,
    *,
    max_shard_size: int | str | None = None,
    **more: object,
) -> None:
    """Save a state, the model beside it, and whatever else training needs to go on, in one file.

    `opt.save("run.safetensors", state, model, epoch=3)`. The file has the format of safetensors, which every
    framework reads: parameters, buffers and statistics under their paths, `enc.0.weight`, and what the rule
    keeps as `enc.0.weight/m`; the rules with their settings can be read in its header. Nothing in it is run.
    `state` is what `setup` returns, a part of it (with that part of the model), or a `TorchOptimizer`. `more`
    may be arrays, numbers, text, and lists and dicts of numbers and text.

    The file comes into the place of an old one when all of it is on the disk: whoever kills the process, the
    old checkpoint or the new one is there. Arrays are written one by one. With `max_shard_size`, bytes or
    text such as "5GB", a larger checkpoint is several files beside `FILE.index.json`; `load` takes it by the
    same name.

    Where arrays are spread over processes (DTensor), each of these calls `save`: they are put together one by
    one, and the first process writes them, with `more` of its own. What goes wrong there is raised by all.

    Raises BadState for a state inside a transform, for arrays that are shared out over several processes of
    JAX, and where two arrays would have one name; BadSetting for what `more` does not take.
    """
    limit = files.size_of(max_shard_size)
    kept = kept_of(state, "save")
    beside = None if model is None else modelled(model, _path(state))
    plain, arrays = parted(more)
    values = whole(kept, beside) | arrays
    about = About(rules_of(kept), ties_of(kept, beside), plain, _groups(state))
    forms = {name: form_of(name, value) for name, value in values.items()}
    data, said = Elements(values, forms), written(about)
    if (team := team_of(values)) is None:
        files.write(file, forms, said, data, limit)
        return
    names = ordered(forms)
    compared(team, names, forms)
    gathered = Gathered([name for name in names if part_of(values[name])], data)
    by_first(team, lambda parts: files.write(file, forms, said, parts, limit), gathered)


def _path(state: object) -> KeyPath:
    """Where in the model the part is whose state this is."""
    tree = tree_of(state)
    return KeyPath() if isinstance(tree, tuple) and not tree else parts(tree)[2]


def _groups(state: object) -> list[dict[str, Any]] | None:
    """The groups of an optimiser of torch, as JSON holds them; None for a state."""
    shown = getattr(state, "groups_to_save", None)
    if shown is None:
        return None
    return [{key: plainly(v, f"{key!r} of a group") for key, v in group.items()} for group in shown()]


class Elements(Mapping[str, Any]):
    """What is written of arrays and numbers: each is made when it is asked for."""

    def __init__(self, values: Mapping[str, Any], forms: Mapping[str, Form]) -> None:
        self.values_of, self.forms = values, forms

    def __getitem__(self, name: str) -> Any:
        return elements(in_numpy(self.values_of[name]), self.forms[name].type)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)


# -- looking -------------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What a checkpoint holds."""

    more: dict[str, Any]
    """What was given to `save` besides state and model: numbers and text, and arrays as those of NumPy."""
    rules: dict[str, str]
    """The rule of each array of parameters, with its settings."""
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    """Type and shape of every array, by name."""


def saved(file: File) -> Saved:
    """What a checkpoint holds, after all of it was checked: `opt.saved(file).more["epoch"]`.

    Raises BadFile for a file that is none, or is damaged; FileNotFoundError where there is none.
    """
    with Reader(file) as reader:
        return saved_in(reader)


def saved_in(reader: Reader) -> Saved:
    """What an open checkpoint holds."""
    about = _about(reader)
    more = {**about.more, **{n[1:]: reader.read(n) for n in reader.forms if n[:1] == "@"}}
    rules = {name: ruled.rule for ruled in about.rules for name in ruled.names}
    return Saved(more, rules, {name: (form.type, form.shape) for name, form in reader.forms.items()})


def _about(reader: Reader) -> About:
    try:
        return understood(reader.about)
    except BadFile as error:
        raise BadFile(f"{reader.path}: {error}") from error


# -- loading -------------------------------------------------------------------------------------------------


class InFile:
    """A checkpoint as what is loaded."""

    typed = True

    def __init__(self, reader: Reader, *, typed: bool) -> None:
        self.reader, self.about, self.typed = reader, _about(reader), typed
        self.forms, self.rules, self.ties = reader.forms, self.about.structures, self.about.ties
        self.groups = self.about.groups

    def read(self, name: str) -> Any:
        """An array, as one of NumPy."""
        return self.reader.read(name)

    def view(self, name: str) -> Any:
        """An array where it lies in the file; bfloat16 as whole numbers of its bits."""
        return self.reader.view(name)

    def fill(self, targets: Sequence[tuple[str, HostArray]]) -> None:
        """Read arrays into memory."""
        self.reader.fill(targets)


@overload
def load(file: File, state: S, model: None = None, *, strict: bool = True, names: Names = None) -> S: ...
@overload
def load(file: File, state: S, model: M, *, strict: bool = True, names: Names = None) -> tuple[S, M]: ...
def load(
    file: File, state: object, model: object = None, *, strict: bool = True, names: Names = None
) -> object:
    """The state as it was saved, or (state, model) where the model is given too: go on with what comes back.

    `state` and `model` are new ones, as `setup` and the model's constructor make them; arrays find their
    place by name. As in `update_`, arrays that can be written are, where they lie; those of JAX come back in
    a new state and a new model, and the old ones stay as they were. Where arrays are spread over processes
    (DTensor), each of these calls `load` and takes its parts, however they were spread when they were saved.
    What else was saved is `saved(file).more`.

    All of the file is looked through and checked before the first array is written; then each array is read
    to where it belongs, so that no memory is taken beside it, or room for one where it is converted, turned
    or sent to another device. Raises BadFile for one that is
    damaged or none of ours, and TreeMismatch, naming the first thing that does not fit, for other rules,
    names, shapes or types. With `strict=False` what fits is taken, types are converted, and a warning says
    what was left. A part of a state, with that part of the model, takes its part of the file.

    `names` says what parameters of the file are called here, and in which order their axes stand here: a
    table, `{"dense.kernel": ("dense.weight", (1, 0))}`, or a function of name and shape that gives such a
    value, or a list of several of which the first that is here counts: `opt.from_flax` and `opt.from_torch`.
    The state is turned with its parameters; where that cannot be, it is refused by name.
    """
    return taken(file, state, model, names=names, strict=strict)[0]


def taken(
    file: File, state: object, model: object, *, names: Names = None, strict: bool = True
) -> tuple[Any, Saved]:
    """(what `load` gives, what else the file holds), of a file that is opened once."""
    target = _target(state, model, "load")
    with contextlib.ExitStack() as stack:
        try:
            with agreed(team_of(whole(target.kept, target.beside))):
                reader = stack.enter_context(Reader(file))
                source, held = InFile(reader, typed=strict), saved_in(reader)
                plan = _planned(source, target, names=names, strict=strict, depth=4)
            return _put(source, target, plan), held
        except TreeMismatch as error:
            raise TreeMismatch(f"{file}: {error}") from error


class Target(NamedTuple):
    """What is loaded into."""

    state: Any
    model: Any
    path: KeyPath
    """Where in the whole model this part is."""
    kept: list[Kept]
    beside: Modelled | None
    optimizer: Any
    """The state, if it is a TorchOptimizer."""


def _target(state: object, model: object, what: str) -> Target:
    path, kept = _path(state), kept_of(state, what)
    beside = None if model is None else modelled(model, path)
    return Target(state, model, path, kept, beside, state if hasattr(state, "load_named") else None)


def _planned(source: Any, target: Target, *, names: Names, strict: bool, depth: int) -> Plan:
    """What is taken over, all of which fits; a warning to the caller so many calls above says what does
    not.
    """
    if names is not None:
        source.groups = None
    plan = fitted(
        source,
        target.kept,
        target.beside,
        below=str(target.path),
        names=names,
        strict=strict,
        ruled=target.optimizer is None or source.groups is None,
    )
    if plan.left:
        warnings.warn(f"not loaded: {'; '.join(plan.left)}", stacklevel=depth)
    refuse_read_only(target.beside, plan)
    return plan


def _put(source: Any, target: Target, plan: Plan, *, forked: bool = False) -> Any:
    """The state, or (state, model), with what was saved; `forked` leaves the old state as it was."""
    new = target.optimizer
    if new is not None:
        new.load_named({each.kept.name: _entries(each, source) for each in plan.leaves}, source.groups)
        plan = plan._replace(leaves=[])
    tree = copy.copy(tree_of(target.state)) if forked and plan.leaves else tree_of(target.state)
    tree, made = placed(tree, target.beside, plan, source)
    new = tree if new is None else new
    return new if target.model is None else (new, made)


def _entries(each: Fitted, source: Any) -> dict[str, Any]:
    """What is loaded of one leaf, by the names of its entries."""
    slots = each.kept.slots
    counters = iter(each.counters)
    found: dict[str, Any] = {
        entry: next(counters) if where is None else where.view(source)
        for entry, where in zip(slots.names, each.arrays, strict=True)
    }
    return found | each.progress | {"settings": each.settings, "frozen": each.frozen}


# -- arrays, for other tools ---------------------------------------------------------------------------------


def arrays(state: object, model: object = None) -> dict[str, Any]:
    """Everything that `save` writes of a state, and of the model if it is given, as a dict of names to
    arrays: each a copy, all of the library of their parameters, so that any other tool can hold them.

    `torch.save` and `torch.load` with `weights_only=True`, safetensors, Orbax and `numpy.savez` take it. Of
    the parameters at `layers.0.w` there are `layers.0.w/m` for what the rule keeps (shaped as the rule keeps
    it), and scalars in float64, or the widest type that there is: `layers.0.w@step`, how many updates have
    covered it; `@settings`, the numbers of its rule in their order; `@frozen`, 0 or 1. Rules themselves are
    not among them: `from_arrays` takes the dict into a state that `setup` has made with the same rules.
    """
    kept = kept_of(state, "arrays")
    found: dict[str, Any] = {}
    for leaf in kept:
        library, kind = leaf.group.kind.library, leaf.group.kind
        for name, value in whole([leaf], None).items():
            if not registry.isarray(value):
                found[name] = _scalars(library, value)
            elif library.is_opaque(value):
                found[name] = library.copied(value, value.dtype)
            else:
                found[name] = laid_out(library, value, value.dtype, None, kind.device)
    values = whole(kept, None if model is None else modelled(model, _path(state)))
    return {
        name: found[name] if name in found else registry.library(x).copied(x, x.dtype)
        for name, x in values.items()
    }


def _scalars(library: Any, value: Any) -> Any:
    """A number, or a list of them, as an array of a library."""
    row = library.scalars.table(np.array(value, np.float64).reshape(1, -1))[0]
    return row if isinstance(value, list) else row.reshape(())


@overload
def from_arrays(
    state: S, arrays: Mapping[str, Any], model: None = None, *, strict: bool = True, names: Names = None
) -> S: ...
@overload
def from_arrays(
    state: S, arrays: Mapping[str, Any], model: M, *, strict: bool = True, names: Names = None
) -> tuple[S, M]: ...
def from_arrays(
    state: object,
    arrays: Mapping[str, Any],
    model: object = None,
    *,
    strict: bool = True,
    names: Names = None,
) -> object:
    """The state with everything that `arrays` gave, or (state, model) where the model is given too.

    The old state stays as it was, unless it is a `TorchOptimizer`, which goes on itself; a model is written
    as `load` writes it. The arrays may be of another library than the parameters, and of other types. Raises
    TreeMismatch, naming the first entry that does not fit, where the state is one of another model or of
    other rules; `strict` and `names` are those of `load`.
    """
    given, target = Given(dict(arrays)), _target(state, model, "from_arrays")
    return _put(given, target, _planned(given, target, names=names, strict=strict, depth=3), forked=True)


def state_dict(state: object) -> dict[str, Any]:
    """The former name of `arrays`."""
    deprecated("opt.state_dict(state) is called opt.arrays(state) now", since="0.2.0", depth=2)
    return arrays(state)


def load_state_dict(state: S, saved: Mapping[str, Any]) -> S:
    """The former name of `from_arrays`."""
    said = "opt.load_state_dict(state, saved) is called opt.from_arrays(state, saved) now"
    deprecated(said, since="0.2.0", depth=2)
    return from_arrays(state, saved)
