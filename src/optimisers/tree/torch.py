"""How are the modules of PyTorch read? Parameters first, then modules, as `named_parameters` has them."""

# PyTorch answers some questions only in private.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from optimisers.arrays import torch as arrays
from optimisers.tree.children import Container
from optimisers.tree.path import Attr


def container_of(kind: type) -> Container | None:
    """The ways of modules of this type; None for what is no module."""
    return MODULE if issubclass(kind, nn.Module) else None


def _key(module: Any, name: str) -> Any:
    """A child's name as the code that reaches it: an index, an item or an attribute."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ParameterList) and name.isdigit():
        return int(name)
    return name if isinstance(module, nn.ModuleDict | nn.ParameterDict) else Attr(name)


def _keys(module: Any) -> tuple[Any, ...]:
    present = [name for name, p in module._parameters.items() if p is not None]
    present += [name for name, m in module._modules.items() if m is not None]
    return tuple(_key(module, name) for name in present)


def _read(module: Any, keys: tuple[Any, ...]) -> Iterable[Any]:
    parameters, modules = module._parameters, module._modules
    return [parameters[name] if name in parameters else modules[name] for name in map(str, keys)]


OWNED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""What a copy of a module must hold by itself; hooks are copied too, all else is shared."""


def _rebuild(module: Any, changes: dict[Any, Any]) -> Any:
    """A new instance of the same class with other parameters or modules; buffers are shared, hooks kept."""
    new = object.__new__(type(module))
    held = vars(module).copy()
    for name, value in held.items():
        if name in OWNED or (name.startswith("_") and "hook" in name and isinstance(value, dict)):
            held[name] = value.copy()
    vars(new).update(held)
    for key, value in changes.items():
        name = str(key)
        (new._parameters if name in new._parameters else new._modules)[name] = value
    flat = held.get("_flat_weights_names")
    if flat is not None:  # recurrent layers keep a list of their weights beside the dict
        vars(new)["_flat_weights"] = [new._parameters.get(name) for name in flat]
    return new


class Route:
    """The way to every parameter of one module, found once, and checked at every use.

    Reading a thousand parameters by attribute takes a millisecond; along these links it takes a twentieth.
    """

    def __init__(self, module: Any) -> None:
        self.names: list[str] = []
        self.links: list[tuple[Any, str]] = []
        self.dicts: list[Any] = []
        self.absent: list[tuple[Any, str]] = []
        self.inner: list[tuple[Any, str]] = []
        self.known: list[Any] = []
        self.visit(module, "")
        self.sizes = list(map(len, self.dicts))
        self.at = {name: i for i, name in enumerate(self.names)}
        self.first: list[int] = []
        self.ids: list[int] = []
        self.picks: dict[int, tuple[Any, list[int]]] = {}
        self.found: list[Any] = [d[name] for d, name in self.links]
        """Every parameter as it was last seen; tied ones at every place."""

    def visit(self, module: Any, prefix: str) -> None:
        self.dicts += [module._parameters, module._modules]
        for name, p in module._parameters.items():
            if p is None:
                self.absent.append((module._parameters, name))
            else:
                self.names.append(prefix + name)
                self.links.append((module._parameters, name))
        for name, m in module._modules.items():
            if m is None:
                self.absent.append((module._modules, name))
            else:
                self.inner.append((module._modules, name))
                self.known.append(m)
                self.visit(m, f"{prefix}{name}.")

    def holds(self, module: Any) -> bool:
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


def _walked_alike(node: Any, module: Any) -> bool:
    """Whether a module has at every level the children that a layout knows."""
    if not isinstance(module, nn.Module):
        return True
    keys = _keys(module)
    if set(node.keys) != set(keys):
        return False
    children = dict(zip(keys, _read(module, keys), strict=True))
    return all(_walked_alike(child, children[key]) for key, child in node.live)


_routes: "weakref.WeakKeyDictionary[Any, Route]" = weakref.WeakKeyDictionary()


def route(module: Any) -> Route:
    """The route through a module; made anew if the module has changed."""
    found = _routes.get(module)
    if found is None or not found.holds(module):
        found = _routes[module] = Route(module)
    return found


def parameters(module: Any, node: Any, names: list[str]) -> list[Any] | None:
    """The parameters of a module at the places of a node of its layout; None where the module is another."""
    return route(module).of(node, names, module)


def gradients(module: Any) -> dict[str, Any]:
    """`.grad` of every parameter by its name, as `named_parameters` has them: tied ones once."""
    way = route(module)
    found = way.found
    if list(map(id, found)) != way.ids:
        way.ids, way.first = list(map(id, found)), way.firsts(found)
    if len(way.first) == len(found):
        return {name: p.grad for name, p in zip(way.names, found, strict=True)}
    return {way.names[i]: found[i].grad for i in way.first}


class _Loss(nn.Module):
    """A loss of a module, as a module."""

    def __init__(self, loss: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self.loss, self.module = loss, module

    def forward(self, *args: Any) -> Any:
        return self.loss(self.module, *args)


def value_and_grad(loss: Callable[..., Any], module: Any, args: Any, has_aux: bool) -> Any:
    """((loss, aux) or loss, gradients by name): parameters and buffers are replaced while the loss is worked
    out, and buffers that it has changed are changed in the module afterwards.
    """
    whole, way = _Loss(loss, module), route(module)
    every = way.found
    first = [i for i in way.firsts(every) if every[i].requires_grad]
    parameters = {way.names[i]: every[i].detach() for i in first}
    buffers = dict(module.named_buffers())

    def of(parameters: dict[str, Any]) -> Any:
        own = {name: b.clone() for name, b in buffers.items()}
        replaced = {f"module.{name}": x for name, x in (parameters | own).items()}
        found = functional_call(whole, replaced, args)
        value, aux = found if has_aux else (found, ())
        return value, (aux, own)

    (value, (aux, changed)), grads = arrays.value_and_grad(of, parameters, True)
    with torch.no_grad():
        for name, b in buffers.items():
            if not torch.equal(b, changed[name]):
                b.copy_(changed[name])
    return ((value, aux) if has_aux else value), grads


MODULE = Container(
    _keys, _read, _rebuild, gather=parameters, gradients=gradients, value_and_grad=value_and_grad
)
