"""How does a model take a step? `setup` puts a rule and state beside each array; `update` walks them
together.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, overload

import numpy as np

from optimisers.arrays import registry
from optimisers.engines.choose import choice_for
from optimisers.engines.signals import held
from optimisers.errors import BadSetting, BadState, FloatParameter, NoParameters, TreeMismatch
from optimisers.graph.passes import store_pass
from optimisers.rule import Rule
from optimisers.state.buffers import LARGE
from optimisers.state.group import Shape, grouped, started
from optimisers.state.leaf import Branch, Leaf, State, handle, parts
from optimisers.state.store import Store
from optimisers.step.choose import Rules, choose, refuse_no_model
from optimisers.step.jobs import Steps
from optimisers.tree.flatten import Ties, flatten_model
from optimisers.tree.flatten_up_to import flatten_up_to, gradients_up_to
from optimisers.tree.layout import Layout, Node
from optimisers.tree.path import KeyPath
from optimisers.tree.rebuild import rebuild, rebuilt

M = TypeVar("M")
"""The type of a model: a step keeps it."""

S = TypeVar("S")
"""The type of a state, or of a part of one."""

W_co = TypeVar("W_co", covariant=True)
"""What a rule for whole models makes."""


class WholeRule(Protocol[W_co]):
    """A rule for a whole model, which makes a state of its own kind: `from_optax(transformation)`."""

    def setup(self, model: Any, ties: Ties = ()) -> W_co:
        """The state that trains the model."""
        ...


# -- setup ---------------------------------------------------------------------------------------------------


@overload
def setup(
    rule: Rules,
    model: object,
    *,
    engine: str | None = None,
    capturable: bool = False,
    ties: Ties = (),
    packed: bool = False,
    conjugate: bool = False,
) -> State: ...
@overload
def setup(rule: WholeRule[W_co], model: object, *, ties: Ties = ()) -> W_co: ...
def setup(
    rule: Any,
    model: object,
    *,
    engine: str | None = None,
    capturable: bool = False,
    ties: Ties = (),
    packed: bool = False,
    conjugate: bool = False,
) -> Any:
    """The state that trains `model` by `rule`: a tree with the model's structure and a Leaf for each array.

    `rule` is a rule; or a dict whose keys are globs over paths and selectors (`matrices`, `vectors`,
    `by_type(Embedding)`), where the first that picks an array wins; or `layer_decay(rule)`; or a function
    (path, array) -> rule. A rule of None trains nothing there. `engine="interpret"` computes every step with
    the array library's own functions instead of fused kernels. `capturable=True`, for tensors on one CUDA
    device, keeps the clock and all numbers of the state there: then a CUDA graph may hold a step, and what is
    adjusted between its replays counts from the next one on; checks of the rules are left out, since
    no step waits for them.

    Where arrays can be written, the same array at several places is one parameter. Arrays of JAX are tied by
    an object of Flax NNX that stands at several places, or by `ties`: tuples of the paths that hold one
    array, or of globs that match one path each, such as `ties=[("encoder.w", "decoder.w")]`.

    State of JAX has an array for each parameter. With `packed=True` small ones share vectors, sixteen to one:
    a model of many small arrays compiles faster and steps faster, and its state is found by path no more. The
    state of other libraries lies side by side anyway.

    The gradient of complex parameters is the direction of steepest ascent, as torch and Optimisers.jl have
    it. `jax.grad` gives its conjugate: with `conjugate=True` that is what every update takes.

    Raises BadState if rule and model are mixed up, NoMatch for a key that picks nothing or a parameter that
    no key picks, TraceError for a rule that cannot be traced, BadSetting for an engine that cannot
    step the model, or a model that cannot be captured. Warns if there is nothing to train.
    """
    for compiler in registry.compilers:
        if compiler.looks():
            return compiler.aside(
                setup,
                rule,
                model,
                engine=engine,
                capturable=capturable,
                ties=ties,
                packed=packed,
                conjugate=conjugate,
            )
    refuse_no_model(model, "setup(rule, model)")
    own = None if isinstance(rule, type) else getattr(rule, "setup", None)
    if own is not None:
        return own(model, ties)
    layout, arrays = flatten_model(model, ties)
    for path, value in layout.floats if arrays else []:
        warnings.warn(
            f"{path.code()} is the number {value}, which does not train; write np.array({value}) to train it",
            FloatParameter,
            stacklevel=2,
        )
    if not arrays:
        warnings.warn(
            "the model has no array of floating point or complex numbers: nothing will be trained",
            NoParameters,
            stacklevel=2,
        )
    rules = choose(rule, layout, arrays)
    store = store_of(layout, arrays, rules, engine=engine, packed=packed, capturable=capturable)
    store.conjugate = conjugate
    for name in {kind.name for kind in store.shapes if kind is not None} | {
        b.name for b in registry.at_hand()
    }:
        if (known := registry.hooks(name).known) is not None:
            known(store)
    return handle(store, layout.root, KeyPath())


def store_of(
    layout: Layout,
    arrays: Sequence[Any],
    rules: Sequence[Rule | None],
    *,
    engine: str | None,
    packed: bool = False,
    capturable: bool = False,
    programs: dict[Any, Any] | None = None,
    alone: bool = False,
    wholes: bool = False,
) -> Store:
    """The state of some arrays, each with a rule, or with None to train nothing there. `programs` are those
    of a state beside it; where each array is stepped `alone`, it has a group of its own. With `wholes`, steps
    will be given whole arrays in the place of these, which are spread over processes.
    """
    shapes = [
        None if r is None else Shape.of(x, engine, packed=packed, capturable=capturable)
        for r, x in zip(rules, arrays, strict=True)
    ]
    if wholes:
        shapes = [k if k is None else k.of_wholes() for k in shapes]
    entries = [
        (i, r, started(r, x, layout.paths[i]))
        for i, (r, x) in enumerate(zip(rules, arrays, strict=True))
        if r is not None
    ]
    if capturable:
        _refuse_uncapturable(shapes)
    if packed:
        _refuse_cut(layout, shapes, arrays)
    programs = {} if programs is None else programs
    groups = grouped(entries, shapes, programs, layout.paths, alone=alone)
    frozen = np.zeros(len(arrays), bool)
    store = Store(layout, shapes, groups, frozen, engine=engine, programs=programs, alone=alone)
    for group in store.groups:
        if group.table.traced:
            near = [arrays[leaf] for leaf in group.leaves]
            held = (group.kind.library.scalars.beside(a, near) for a in group.table.arrays())
            group.table = group.table.filled(*held)
        choice_for(group, engine)
    return store


def _refuse_cut(layout: Layout, shapes: Sequence[Shape | None], arrays: Sequence[Any]) -> None:
    """Raise BadSetting for arrays on several devices whose state would have to be gathered into a vector."""
    for path, kind, x in zip(layout.paths, shapes, arrays, strict=True):
        if kind is not None and math.prod(x.shape) < LARGE and kind.library.shards.is_cut(x):
            raise BadSetting(
                f"packed=True puts the state of small arrays into shared vectors, and {path.code()} is cut "
                "into parts on several devices; leave packed out, or replicate it"
            )


def _refuse_uncapturable(shapes: Sequence[Shape | None]) -> None:
    """Raise BadSetting unless the parameters are all on one device whose steps can be captured."""
    found = {(k.name, k.device) for k in shapes if k is not None}
    if len(found) != 1 or not registry.named(next(iter(found))[0]).graphs.capturable:
        where = ", ".join(f"{name} on {device}" for name, device in sorted(found)) or "nothing"
        raise BadSetting(f"capturable=True takes tensors of torch on one CUDA device; this model has {where}")


# -- update --------------------------------------------------------------------------------------------------


class _Missing:
    def __repr__(self) -> str:
        return "<required>"


_MISSING: Any = _Missing()


def update(state: S, model: M, grads: object = _MISSING, *more: object, loss: object = None) -> tuple[S, M]:
    """(state, model) after one step, leaving the old arrays and the old state as they were.

    `grads` has the structure of `model`; None in it means "no step here", which is not the same as a zero
    gradient: momenta stay untouched too. `more` are further gradients (of second order, say) for rules that
    ask for them; None in their place, or in them, means that there is none at this step. `loss`, a number,
    goes to the rules that ask for it. What takes no step is shared with the old model. `state` may be a part
    of a state tree, with that part of the model; `()`, where nothing is trained, gives the model back.

    Raises TreeMismatch, naming the path, if structure, shapes or types do not fit, BadState for mixed-up
    arguments, and what the rules raise, such as DomainError for a norm that is not finite.
    """
    if _untrained(state):
        return state, model
    for compiler in registry.compilers:
        if compiler.looks():
            return compiler.update(state, model, _given(grads, "update"), more, loss)
    own = getattr(type(state), "stepped", None)
    if own is not None:
        return own(state, model, _given(grads, "update"), loss=loss)
    store, node, path = _opened(state, model, "update")
    xs, orders = walked(node, path, model, (_given(grads, "update"), *more))
    successor, new = stepped(store, node, path, xs, orders, loss)
    return handle(successor, node, path), rebuild(node, model, new)


def walked(node: Node, path: KeyPath, model: Any, grads: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    """(parameters, gradients of each order) at the places below a node."""
    return flatten_up_to(node, model, path), [gradients_up_to(node, g, path) for g in grads]


def stepped(
    store: Store, node: Node, path: KeyPath, xs: Any, orders: list[Any], loss: Any = None
) -> tuple[Store, dict[int, Any]]:
    """(the store after a step with new arrays, the new parameters by leaf)."""
    names = {group.kind.name for group in store.groups}
    run = registry.hooks(names.pop()).stepped if len(names) == 1 else None
    found = None if run is None else run(store, node, path, xs, orders, loss)
    return evaluated(store, node, xs, orders, loss) if found is None else found


def evaluated(
    store: Store, node: Node, xs: Any, orders: list[Any], loss: Any = None, *, changes: bool = False
) -> tuple[Store, dict[int, Any]]:
    """The same, by the engines; with `changes`, what is to be added to parameters in place of new ones."""
    run = store.apart([g.of_changes() for g in store.groups]) if changes else store
    step = Steps(run, node, xs, orders, inplace=False, loss=loss)
    step.prepare()
    new = step.store_all()
    groups = [step.targets.get(g) or group.fork() for g, group in enumerate(run.groups)]
    if changes:
        groups = [
            dataclasses.replace(g, program=old.program, programs=old.programs, changes=False)
            for g, old in zip(groups, store.groups, strict=True)
        ]
    return store.successor(groups), new


def update_(state: S, model: M, grads: object = _MISSING, *more: object, loss: object = None) -> tuple[S, M]:
    """(state, model) after one step in place: the same numbers as `update`, written into the arrays that are
    there.

    Arrays that may not be written (read-only ones) are replaced in the model that is returned, and only
    there. If it raises, nothing has changed. Arguments and errors are those of `update`.

    While the step is stored, handlers of signals that are written in Python (Ctrl-C is one) wait, in the main
    thread: they are called when all of it is stored, and find no half step. For that they are replaced for
    this moment, and put back: at every step, since each stores several things, the arrays of its groups, then
    their counters and clocks. `update`, whose new arrays are in no use yet, replaces none.
    """
    if _untrained(state):
        return state, model
    for compiler in registry.compilers:
        if compiler.looks():
            return compiler.aside(update_, state, model, grads, *more, loss=loss)
    own = getattr(type(state), "stepped_", None)
    if own is not None:
        return own(state, model, _given(grads, "update_"), loss=loss)
    store, node, path = _opened(state, model, "update_")
    xs, orders = walked(node, path, model, (_given(grads, "update_"), *more))
    with store.lock:  # an edit from another thread waits for the step
        if any(g.kind.library.immutable for g in store.groups):
            successor, new = stepped(store, node, path, xs, orders, loss)
            made, writes = rebuilt(node, model, new)
            with held():
                store.become(successor)
                for write in writes:
                    write()
            return state, made
        step = Steps(store, node, xs, orders, inplace=True, loss=loss)
        new = step.prepare()
        # Constructors of containers may raise: they come before anything is written.
        made, writes = rebuilt(node, model, new) if new else (model, ())
        with held():
            step.store_all()
            for write in writes:
                write()
    return state, made


def update_listed(
    store: Store,
    node: Node,
    xs: Sequence[Any],
    orders: list[Sequence[Any]],
    scaling: tuple[Any, Any] | None = None,
    loss: Any = None,
    ready: Callable[[], object] = tuple,
    after: Callable[[], object] = tuple,
) -> None:
    """A step in place of parameters and gradients, of each order, that come in the order of the walk. `ready`
    is called when all that may fail is done, before anything is written; `after` it is called what belongs to
    it, before a handler of a signal sees anything.

    `scaling`, for states that say `takes_scaling`: the gradients are divided by its first number, and the
    step is none where the second is not 0; both are on the device, where they stay. Raises BadState, naming
    it, for a parameter that cannot be written.
    """
    if scaling is not None:
        kind = store.groups[0].kind
        scale, found = (kind.library.scalars.moved(x, kind.device) for x in scaling)
        scaling = scale, found
    with store.lock:  # an edit from another thread waits for the step
        step = Steps(store, node, xs, orders, inplace=True, loss=loss, scaling=scaling)
        for leaf in step.prepare():
            raise BadState(
                f"{str(store.layout.paths[leaf])!r} cannot be written: it is an expanded tensor, or one that "
                "was made in inference mode; give its clone() to the optimiser"
            )
        ready()
        with held():
            step.store_all()
            after()


def takes_scaling(store: Store) -> bool:
    """Whether a step of this state may depend on numbers on the device alone."""
    whole = all(slot.shape is None for g in store.groups for slot in g.program.slots)
    stored = [store_pass(g.program, None) for g in store.groups]
    return store.capturable and whole and not any(p is not None and p.free for p in stored)


def _untrained(state: Any) -> bool:
    """Whether a state is that of a model, or a part of one, in which nothing is trained."""
    return isinstance(state, tuple) and not state


def _opened(state: Any, model: Any, name: str) -> tuple[Store, Node, KeyPath]:
    if isinstance(model, Leaf | Branch):
        raise BadState("the second argument is a state; the order is update(state, model, grads)")
    store, node, path = parts(state)
    store.refuse_lent(name)
    kind = store.shapes[node.leaf] if node.leaf >= 0 and len(store.layout.places[node.leaf]) > 1 else None
    if kind is not None and registry.isarray(model):
        library = registry.library(model)
        if (tuple(model.shape), library.memory.dense_strides(model)) != (kind.shape, kind.strides):
            raise TreeMismatch(
                f"this is a transposed view of {path.code()}, whose Leaf speaks for that place; update a "
                "part of the model that holds it"
            )
    return store, node, path


def _given(grads: Any, name: str) -> Any:
    """The gradients; raises BadState if they are missing."""
    if grads is _MISSING:
        raise BadState(f"the gradients are missing; write state, model = {name}(state, model, grads)")
    return grads
