"""How are the modules of PyTorch read? Parameters first, then modules, as `named_parameters` has them."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import functools
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.func import functional_call

from optimisers.arrays.torch import value_and_grad as of_tensors
from optimisers.errors import BadState
from optimisers.tree.children import Beside, Container
from optimisers.tree.layout import Place
from optimisers.tree.path import Attr, named_path


def container_of(kind: type) -> Container | None:
    """The registry entry of modules of this type; None for what is no module."""
    return MODULE if issubclass(kind, nn.Module) else None


def _key(module: object, name: str) -> Any:
    """A child's name as the code that reaches it: an index, an item or an attribute."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ParameterList) and name.isdigit():
        return int(name)
    return name if isinstance(module, nn.ModuleDict | nn.ParameterDict) else Attr(name)


def _keys(module: object) -> tuple[Any, ...]:
    present = [name for name, p in module._parameters.items() if p is not None]
    present += [name for name, m in module._modules.items() if m is not None]
    return tuple(_key(module, name) for name in present)


def _read(module: object, keys: tuple[Any, ...]) -> Iterable[Any]:
    parameters, modules = module._parameters, module._modules
    return [parameters[name] if name in parameters else modules[name] for name in map(str, keys)]


OWNED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""What a copy of a module must hold by itself; hooks are copied too, all else is shared."""


def _rebuild(module: object, changes: dict[Any, Any]) -> Any:
    """A new instance of the same class with other parameters or modules; buffers are shared, hooks kept."""
    if isinstance(module, OptimizedModule):  # a compiled module holds its forward by the old one
        inner = changes.get("_orig_mod", module._orig_mod)
        return OptimizedModule(inner, module.dynamo_ctx)
    new = object.__new__(type(module))
    held = vars(module).copy()
    if held.get("_compiled_call_impl") is not None:
        held["_compiled_call_impl"] = None
    for name, value in held.items():
        if name in OWNED or (name.startswith("_") and "hook" in name and isinstance(value, dict)):
            held[name] = value.copy()
    vars(new).update(held)
    for key, value in changes.items():
        name = str(key)
        (new._parameters if name in new._parameters else new._modules)[name] = value
    return new


def _relink(pairs: list[tuple[Any, Any]]) -> None:
    """Let new modules hold new ones wherever the old ones held old ones: in lists beside the registered
    modules, as other attributes, in bound methods.
    """
    new_of: dict[int, Any] = {}
    for old, new in pairs:
        new_of[id(old)] = new
        for name, p in getattr(old, "_parameters", {}).items():
            new_of[id(p)] = new._parameters[name]
    for old, new in pairs:
        if isinstance(new, OptimizedModule):  # it was made by its own constructor
            continue
        for name, value in list(vars(new).items()):
            if name in OWNED:
                continue
            if name == "forward" and isinstance(value, FunctionType):
                raise BadState(
                    f"a {type(old).__name__} has a forward of its own, a function that may hold the old "
                    "module; write update_, or patch the class"
                )
            found = _relinked(value, new_of)
            if found is not value:
                vars(new)[name] = found


def _relinked(value: object, new_of: dict[int, Any], depth: int = 4) -> Any:
    """A value that holds new modules and parameters in place of old ones; itself if it holds none."""
    if id(value) in new_of and value is not None:
        return new_of[id(value)]
    if isinstance(value, MethodType):
        owner = new_of.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    return value if depth == 0 else _relinked_inside(value, new_of, depth - 1)


def _relinked_inside(value: Any, new_of: dict[int, Any], depth: int) -> Any:
    """The same for what holds others."""
    if isinstance(value, functools.partial):
        parts: Any = _relinked([value.func, list(value.args), value.keywords], new_of, depth)
        return functools.partial(parts[0], *parts[1], **parts[2])
    if type(value) in (list, tuple):
        items = [_relinked(v, new_of, depth) for v in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    if type(value) in (dict, OrderedDict):
        inner = {k: _relinked(v, new_of, depth) for k, v in value.items()}
        return type(value)(inner) if any(inner[k] is not v for k, v in value.items()) else value
    return value


class Route:
    """The way to every parameter of one module, found once, and checked at every use.

    Reading a thousand parameters by attribute takes a millisecond; along these links it takes a twentieth.
    """

    def __init__(self, module: object) -> None:
        self.names: list[str] = []
        self.kinds: list[tuple[type, ...]] = []
        """The types of the modules around each parameter, outermost first."""
        self.links: list[tuple[Any, str]] = []
        self.dicts: list[Any] = []
        self.absent: list[tuple[Any, str]] = []
        self.inner: list[tuple[Any, str]] = []
        self.known: list[Any] = []
        self.visit(module, "", ())
        self.sizes = list(map(len, self.dicts))
        self.at = {name: i for i, name in enumerate(self.names)}
        self.first: list[int] = []
        self.ids: list[int] = []
        self.picks: dict[int, tuple[Any, list[int]]] = {}
        self.found: list[Any] = [d[name] for d, name in self.links]
        """Every parameter as it was last seen; tied ones at every place."""

    def visit(self, module: object, prefix: str, around: tuple[type, ...]) -> None:
        around = (*around, type(module))
        self.dicts += [module._parameters, module._modules]
        for name, p in module._parameters.items():
            if p is None:
                self.absent.append((module._parameters, name))
            else:
                self.names.append(prefix + name)
                self.kinds.append(around)
                self.links.append((module._parameters, name))
        for name, m in module._modules.items():
            if m is None:
                self.absent.append((module._modules, name))
            else:
                self.inner.append((module._modules, name))
                self.known.append(m)
                self.visit(m, f"{prefix}{name}.", around)

    def holds(self, module: object) -> bool:
        """Whether the module still is what it was: the same modules inside, parameters of the same names."""
        try:
            inside = [d[name] for d, name in self.inner]
            self.found = found = [d[name] for d, name in self.links]
            absent = [d[name] for d, name in self.absent]
        except KeyError:
            return False
        return (
            self.dicts[0] is module._parameters
            and self.dicts[1] is module._modules
            and all(map(operator.is_, inside, self.known))
            and list(map(len, self.dicts)) == self.sizes
            and all(p is not None for p in found)
            and all(p is None for p in absent)
        )

    @staticmethod
    def firsts(parameters: list[Any]) -> list[int]:
        """Where each different parameter stands first."""
        where: dict[int, int] = {}
        for i, p in enumerate(parameters):
            where.setdefault(id(p), i)
        return list(where.values())

    def of(self, node: Any, names: list[str], module: Any) -> list[Any] | None:
        """The parameters at some places, found once for a node of a layout; None if they are not all there,
        or others are.
        """
        if id(node) not in self.picks:
            if any(name not in self.at for name in names) or not _walked_alike(node, module):
                return None
            self.picks[id(node)] = node, [self.at[name] for name in names]
        found = self.found
        return [found[i] for i in self.picks[id(node)][1]]


def _walked_alike(node: object, module: object) -> bool:
    """Whether a module has at every level the children that a layout knows."""
    if not isinstance(module, nn.Module):
        return True
    keys = _keys(module)
    if set(node.keys) != set(keys):
        return False
    children = dict(zip(keys, _read(module, keys), strict=True))
    return all(_walked_alike(child, children[key]) for key, child in node.live)


_routes: "weakref.WeakKeyDictionary[Any, Route]" = weakref.WeakKeyDictionary()


def route(module: object) -> Route:
    """The route through a module; made anew if the module has changed."""
    found = _routes.get(module)
    if found is None or not found.holds(module):
        found = _routes[module] = Route(module)
    return found


def places(module: object, called: Callable[[str], str]) -> dict[str, tuple[Place, ...]]:
    """All places of each parameter of a module, by the name of the first, as `named_parameters` has them;
    `called` says what names are to be.
    """
    way = route(module)
    found: dict[int, list[Place]] = {}
    for name, kinds, p in zip(way.names, way.kinds, way.found, strict=True):
        found.setdefault(id(p), []).append(Place(named_path(called(name)), kinds))
    return {str(several[0].path): tuple(several) for several in found.values()}


def parameters(module: object, node: object, names: list[str]) -> list[Any] | None:
    """The parameters of a module at the places of a node of its layout; None where the module is another."""
    return route(module).of(node, names, module)


def gradients(module: object) -> dict[str, Any]:
    """`.grad` of every parameter by its name, as `named_parameters` has them: tied ones once."""
    way = route(module)
    found = way.found
    if list(map(id, found)) != way.ids:
        way.ids, way.first = list(map(id, found)), way.firsts(found)
    if len(way.first) == len(found):
        return {name: p.grad for name, p in zip(way.names, found, strict=True)}
    return {way.names[i]: found[i].grad for i in way.first}


def beside(module: object) -> list[Beside]:
    """The buffers of a module and of those in it, each once."""
    named = module.named_modules() if isinstance(module, nn.Module) else ()
    return [
        Beside(
            named_path(f"{prefix}.{name}" if prefix else name).keys,
            b,
            functools.partial(_write_buffer, m._buffers, name, b),
            name not in m._non_persistent_buffers_set,
        )
        for prefix, m in named
        for name, b in m._buffers.items()
        if b is not None
    ]


def _write_buffer(held: dict[str, Any], name: str, b: torch.Tensor, value: Any) -> None:
    with torch.no_grad():
        held[name] = b.copy_(value)


class _Loss(nn.Module):
    """A loss of a module, as a module."""

    def __init__(self, loss: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self.loss, self.module = loss, module

    def forward(self, *args: object) -> Any:
        return self.loss(self.module, *args)


def functional(
    loss: Callable[..., Any], module: Any, args: object
) -> tuple[Callable[[dict[str, Any]], Any], dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """(a function of parameters by name, those that are trained, what makes gradients of their names into
    those of all). The function gives what the loss gives, and the buffers as it leaves them: parameters and
    buffers are replaced while it runs.
    """
    whole, way = _Loss(loss, module), route(module)
    every = way.found
    first = [i for i in way.firsts(every) if every[i].requires_grad]
    buffers = dict(module.named_buffers())

    def of(parameters: dict[str, Any]) -> Any:
        own = {name: b.clone() for name, b in buffers.items()}
        replaced = {f"module.{name}": x for name, x in (parameters | own).items()}
        return functional_call(whole, replaced, args), own

    def named(grads: dict[str, Any]) -> dict[str, Any]:
        seen = {id(every[i]): name for name, i in zip(grads, first, strict=True)}
        return {
            way.names[i]: grads[seen[id(every[i])]] if id(every[i]) in seen else None
            for i in way.firsts(every)
        }

    return of, {way.names[i]: every[i].detach() for i in first}, named


def value_and_grad(loss: Callable[..., Any], module: Any, args: object, has_aux: bool) -> Any:
    """((loss, aux) or loss, gradients by name); buffers that the loss has changed are changed in the module
    afterwards.
    """
    run, parameters, named = functional(loss, module, args)

    def of(parameters: dict[str, Any]) -> Any:
        found, own = run(parameters)
        value, aux = found if has_aux else (found, ())
        return value, (aux, own)

    (value, (aux, changed)), grads = of_tensors(of, parameters, True)
    with torch.no_grad():
        for name, b in module.named_buffers():
            if not torch.equal(b, changed[name]):
                b.copy_(changed[name])
    return ((value, aux) if has_aux else value), named(grads)


MODULE = Container(
    _keys,
    _read,
    _rebuild,
    relink=_relink,
    parameters=parameters,
    gradients=gradients,
    beside=beside,
    value_and_grad=value_and_grad,
    functional=functional,
)
