"""What is a step given beside the gradients of torch? Second gradients, the gradients of single examples, and
the scale of a GradScaler, where the optimiser holds the parameters and not the model.
"""

# pyright: reportPrivateImportUsage=false

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from optimisers.arrays.torch import library as tensors
from optimisers.arrays.types import arithmetic
from optimisers.errors import BadState, TreeMismatch
from optimisers.state.store import Store
from optimisers.step.update import takes_scaling
from optimisers.torch.classes import plain
from optimisers.torch.loading import bare_name
from optimisers.tree.flatten import flatten_model


def second_gradients(
    given: Any, names: Mapping[Any, str], trained: Sequence[Any], *, taken: bool
) -> list[Any]:
    """The second gradients of the parameters that are trained, None where there is none: of a list in the
    order of all parameters, of a dict by parameter or by name, or of what has the shape of the module.

    Raises TreeMismatch for a list of another length, and for a name that no parameter has, BadState where no
    rule takes any.
    """
    if given is None:
        return [None] * len(trained)
    if not taken:
        raise BadState(
            "step was given hessians, and no rule here takes second gradients; opt.Sophia and opt.AdaHessian "
            "do"
        )
    if isinstance(given, Mapping) and all(isinstance(key, torch.Tensor) for key in given):
        found = dict(given)
        strange = [tuple(p.shape) for p in found if p not in names]
        if strange:
            raise TreeMismatch(
                f"hessians has an entry for a tensor of shape {strange[0]}, which is no parameter of this "
                "optimiser"
            )
    elif isinstance(given, Mapping | torch.nn.Module):
        found = _by_name(given, names)
    else:
        listed = list(given) if isinstance(given, Iterable) else [given]
        if len(listed) != len(names):
            raise TreeMismatch(
                f"hessians has {len(listed)} entries, and this optimiser has {len(names)} parameters; write "
                "a list in their order, with None where there is none, or a dict by name"
            )
        found = dict(zip(names, listed, strict=True))
    return [found.get(p) for p in trained]


def _by_name(given: Any, names: Mapping[Any, str]) -> dict[Any, Any]:
    """The same by parameter for what has names."""
    layout, arrays = flatten_model(given)
    of = {bare_name(name): p for p, name in names.items()}
    found: dict[Any, Any] = {}
    for path, array in zip(layout.paths, arrays, strict=True):
        name = bare_name(str(path))
        if name not in of:
            raise TreeMismatch(
                f"hessians has {name!r}, and no parameter of this optimiser is called so; there are "
                f"{', '.join(list(of)[:8])}{', ...' if len(of) > 8 else ''}"
            )
        found[of[name]] = array
    return found


def gradients(trained: Sequence[Any], sampled: Collection[Any]) -> list[Any]:
    """The gradients of the parameters; of those `sampled` that of each example, as Opacus keeps them."""
    if not sampled:
        return [p.grad for p in trained]
    return [_of_examples(p) if p in sampled else p.grad for p in trained]


def _of_examples(p: Any) -> Any:
    """The gradients of single examples of a parameter: of several backward passes one after another."""
    found = getattr(p, "grad_sample", None)
    return torch.cat(found) if isinstance(found, list) else p.grad if found is None else found


def unscaled(
    optimizer: torch.optim.Optimizer, store: Store, grads: list[Any]
) -> tuple[Any, list[Any] | None]:
    """(scale and what was found infinite, for a device that divides; the gradients, divided by the scale of a
    GradScaler that has left it to this optimiser: None where the step is none).
    """
    found, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found is None:
        return None, grads
    if store.capturable and takes_scaling(store):
        return (torch.ones_like(found) if scale is None else scale, found), grads
    if store.capturable and tensors.graphs.capturing(str(found.device)):
        raise BadState(
            "this rule computes values of another shape than the parameters; a step of it that a GradScaler "
            "may skip cannot be captured"
        )
    if found.item():
        return None, None
    if scale is None:
        return None, grads
    share = 1 / scale.item()
    return None, [None if g is None else g.to(arithmetic(tensors, g.dtype)) * share for g in grads]


def asks_for_state_only(groups: list[dict[str, Any]], grads: list[Any]) -> bool:
    """Whether this step is that of `torch.distributed.checkpoint`, which wants a state to load into: with
    rate 0 and gradients of zeros. Decay must not move the weights then.
    """
    still = all(not plain(group.get("lr", 0)) for group in groups)
    return still and all(g is None or not bool(g.any()) for g in grads)
