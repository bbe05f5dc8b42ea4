"""Which library is an array of, and what belongs to it? One record a back end; what it names is imported when
an array of it comes, so that no library is imported that the user has not imported.
"""

import functools
import importlib
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from optimisers.arrays.protocol import Array, Library
from optimisers.arrays.types import is_complex, is_inexact, is_number
from optimisers.errors import BadSetting


@dataclass(frozen=True)
class Compiler:
    """How a step stands in a graph that a library compiles."""

    looks: Callable[[], bool]
    """Whether a graph is being made now."""
    update: Callable[..., Any]
    """`update`, put into it."""
    aside: Callable[..., Any]
    """Calls a function that cannot stand in one."""


@dataclass(frozen=True)
class Hooks:
    """What a back end does beside what its arrays answer; None for what it does not."""

    known: Callable[[Any], None] | None = None
    """Told the store of every state that is set up for its arrays."""
    compiler: Compiler | None = None
    stepped: Callable[..., Any] | None = None
    """(store, new parameters) after a whole step of (store, node, path, parameters, gradients of each order);
    None where the engines shall run it.
    """


@dataclass(frozen=True)
class Plug:
    """Where an engine is found: it is imported when a group may need it."""

    name: str
    """What users call it."""
    engine: object
    """An `optimisers.engines.task.Engine`, or `module:attribute` of one."""
    devices: tuple[str, ...] = ("",)
    """How the names of its devices begin."""
    needs: tuple[str, str] | None = None
    """(a package without which its module cannot be imported, what is said then)."""
    asked: bool = True
    """Whether users may ask for it by name."""
    prints: bool = False
    """Whether it runs kernels that it prints."""
    traced: bool = False
    """Whether it takes steps that are traced."""


NUMBA = Plug("numba", "optimisers.engines.cpu.task:ENGINE", devices=("cpu",), prints=True)
TRITON = Plug(
    "triton",
    "optimisers.engines.cuda.task:ENGINE",
    devices=("cuda",),
    needs=("torch", "Triton is driven through PyTorch, which is not installed"),
    prints=True,
)


@dataclass(frozen=True)
class Backend:
    """All that this package knows of an array library, in one record.

    What is a string names a module, or `module:attribute`, which is imported when it is needed.
    """

    name: str
    """The name, as `Library.name` has it and `explain` prints it."""
    packages: tuple[str, ...]
    """The packages or modules in which the types of its arrays are defined."""
    arrays: str | Library[Any, Any]
    """What its arrays answer: an instance of `Library`."""
    containers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Package of model classes -> the module whose `container_of(kind)` knows them."""
    others: str = ""
    """The module that knows, by `is_registered(obj)`, objects of classes that users have registered with the
    library itself, and has their entry as `OTHERS`. Its transforms are handed states of other libraries too.
    """
    sorts_dicts: bool = False
    """Whether its transforms hand dicts on with their keys sorted."""
    hooks: str | Hooks = field(default_factory=Hooks)
    engines: tuple[Plug, ...] = ()
    """What steps its arrays, the fastest first; the interpreter comes last for all."""
    public: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names of the root of this package that need the library -> their modules."""


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("numpy", ("numpy",), "optimisers.arrays.numpy:library", engines=(NUMBA,)),
        Backend(
            "torch",
            ("torch",),
            "optimisers.arrays.torch:library",
            containers={"torch": "optimisers.tree.modules_torch"},
            hooks="optimisers.torch.compiler:HOOKS",
            engines=(NUMBA, TRITON),
            public={
                "TorchOptimizer": "optimisers.torch.optimizer",
                "from_torch_class": "optimisers.torch.classes",
                "lightning_callback": "optimisers.trainers",
                "step_in_backward": "optimisers.torch.in_backward",
                "to_torch_state": "optimisers.torch.to_torch",
                "trainer_callback": "optimisers.trainers",
            },
        ),
        Backend(
            "jax",
            ("jax", "jaxlib"),
            "optimisers.arrays.jax:library",
            containers={"flax": "optimisers.tree.modules_jax", "equinox": "optimisers.tree.modules_jax"},
            others="optimisers.tree.modules_jax",
            sorts_dicts=True,
            hooks="optimisers.jax.pytree:HOOKS",
            engines=(
                Plug("numba", "optimisers.engines.xla.task:KERNELS"),
                Plug("xla", "optimisers.engines.xla.task:OPERATIONS", asked=False, traced=True),
            ),
            public={
                "as_optax": "optimisers.jax.optax",
                "from_optax": "optimisers.jax.optax",
                "from_optax_state": "optimisers.jax.optax_states",
                "to_optax_state": "optimisers.jax.optax_states",
                "vmap_axes": "optimisers.jax.pytree",
            },
        ),
        Backend(
            "cupy",
            ("cupy",),
            "optimisers.arrays.cupy:library",
            engines=(TRITON, Plug("cupy.fuse", "optimisers.engines.cupy:ENGINE", asked=False)),
        ),
    )
}
"""Library -> all that is known of it. Nowhere else stands which module serves which library."""


def register_backend(backend: Backend) -> None:
    """Let arrays of another library be trained: a record that names its types and what they answer.

    Its `arrays` is an instance of a subclass of `optimisers.arrays.protocol.Library`; its `engines` run its
    steps where they do not refuse. Raises BadSetting if another back end has its name or one of its packages.
    """
    if not isinstance(backend, Backend):
        raise BadSetting(f"register_backend takes a Backend; {backend!r} is not one")
    if backend.name in BACKENDS:
        raise BadSetting(f"there is a back end {backend.name!r} already; give this one another name")
    for other in BACKENDS.values():
        if both := sorted({*backend.packages} & {*other.packages}):
            raise BadSetting(f"arrays of {both[0]!r} belong to the back end {other.name!r} already")
    if not isinstance(backend.arrays, str) and backend.arrays.name != backend.name:
        raise BadSetting(f"the back end {backend.name!r} has the arrays of {backend.arrays.name!r}")
    BACKENDS[backend.name] = backend
    forget()


def forget() -> None:
    """Look everything up anew."""
    for cached in (library_of, named, hooks, container_module, _packages):
        cached.cache_clear()


def load(name: str) -> Any:
    """What a string of a record names."""
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


@functools.cache
def _packages() -> dict[str, str]:
    """Package or module of array types -> name of the back end."""
    return {package: b.name for b in BACKENDS.values() for package in b.packages}


def _prefixes(module: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    while module:
        yield module
        module = module.rpartition(".")[0]


@functools.lru_cache(maxsize=1024)
def library_of(kind: type) -> Library | None:
    """The library of arrays of this type, or None if it is not an array type."""
    packages = _packages()
    for base in kind.__mro__:
        name = next((packages[p] for p in _prefixes(base.__module__) if p in packages), None)
        if name is not None and (found := named(name)).is_array_type(kind):
            return found
    return None


@functools.cache
def named(name: str) -> Library:
    """The library of a name, imported now."""
    arrays = BACKENDS[name].arrays
    return load(arrays) if isinstance(arrays, str) else arrays


@functools.cache
def hooks(name: str) -> Hooks:
    """What the back end of a name wants to be told, imported now."""
    wanted = BACKENDS[name].hooks
    found: Hooks = load(wanted) if isinstance(wanted, str) else wanted
    if found.compiler is not None and found.compiler not in compilers:
        compilers.append(found.compiler)
    return found


compilers: list[Compiler] = []
"""Those of the libraries of whose arrays a state was made: every `update` asks them before it looks at
anything else.
"""


def at_hand() -> list[Backend]:
    """The back ends in use whose transforms take any object of classes that were registered with them."""
    return [b for b in BACKENDS.values() if b.others and any(sys.modules.get(p) for p in b.packages)]


def registered_elsewhere(obj: object) -> Any:
    """The registry entry of an object whose class was registered with a library, or None."""
    return next((m.OTHERS for b in at_hand() if (m := load(b.others)).is_registered(obj)), None)


def container_elsewhere() -> Any:
    """The registry entry of the objects of a class that was found so before."""
    return next(load(b.others).OTHERS for b in BACKENDS.values() if b.others)


@functools.cache
def container_module(package: str) -> str | None:
    """The module that knows the models of a package."""
    return next((b.containers[package] for b in BACKENDS.values() if package in b.containers), None)


WITHOUT_ARRAYS = {"KerasOptimizer": "optimisers.keras.optimizer"}
"""The same for names that need a library which has no arrays of its own."""


def public_names() -> dict[str, str]:
    """Name of the root that needs a library -> its module."""
    return WITHOUT_ARRAYS | {name: module for b in BACKENDS.values() for name, module in b.public.items()}


def load_public(name: str) -> Any:
    """What stands under such a name, imported now.

    Raises ModuleNotFoundError, which says what to install, where its library is not there.
    """
    try:
        return getattr(load(public_names()[name]), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"optimisers.{name} needs {error.name}, which is not installed; write pip install {error.name}",
            name=error.name,
        ) from error


def library(*args: object) -> Library:
    """The library of the first array among the arguments; NumPy for plain numbers.

    Raises TypeError if none of them is an array or a number.
    """
    plain = False
    for a in args:
        found = library_of(type(a))
        if found is not None:
            return found
        plain = plain or isinstance(a, numbers.Number)
    if plain:
        return named("numpy")
    unknown = next((module for a in args if (module := unknown_array(a))), "")
    hint = (
        f"it is {not_known(unknown)}"
        if unknown
        else "a rule sees one array; for a model write opt.setup(rule, model)"
    )
    raise TypeError(f"no array among {', '.join(type(a).__name__ for a in args)}; {hint}")


def sorts_dicts(x: object) -> bool:
    """Whether transforms of the library of an array hand dicts on with their keys sorted."""
    return BACKENDS[library(x).name].sorts_dicts


def isarray(x: object) -> bool:
    """Whether `x` is an array of a library known here."""
    return library_of(type(x)) is not None


def isnumeric(x: object) -> bool:
    """Whether `x` is an array that can be trained: floating point or complex, any shape, 0-d included.

    Arrays of integers and bools, Python numbers and everything else are not.
    """
    found = library_of(type(x))
    return found is not None and is_inexact(found.type_name(cast("Array", x).dtype))


def istrainable(x: object) -> bool:
    """Whether `x` is an array that can be trained and does not say that it should not be."""
    found = library_of(type(x))
    return found is not None and isnumeric(x) and found.is_trainable(cast("Array", x))


def type_name(x: Array) -> str:
    """The name of the type of the elements of an array."""
    return library(x).type_name(x.dtype)


def iscomplex(x: Array) -> bool:
    """Whether the elements of an array are complex numbers."""
    return is_complex(type_name(x))


def no_numbers(x: Array) -> str:
    """Why an array holds no numbers to compute with; empty if it does."""
    if isinstance(x, np.ma.MaskedArray):
        return "is masked; write filled(0)"
    return "" if is_number(type_name(x)) else f"has elements of type {x.dtype}; it takes numbers"


def maywrite(x: object) -> bool:
    """Whether `update_` may write into `x`; a read-only or broadcast array is replaced instead."""
    found = library_of(type(x))
    return found is not None and found.is_writable(cast("Array", x))


def unknown_array(x: object) -> str:
    """The module of an array of a library that is not registered; empty for what is none."""
    kind, packages = type(x), _packages()
    known = any(p in packages for base in kind.__mro__ for p in _prefixes(base.__module__))
    return "" if known or not all(hasattr(x, n) for n in ("shape", "dtype", "__add__")) else kind.__module__


def not_known(module: str) -> str:
    """What is said of an array of a library that is not registered."""
    return (
        f"an array of {module}, a library that is not known here, as {', '.join(BACKENDS)} are; "
        "opt.register_backend teaches it"
    )
