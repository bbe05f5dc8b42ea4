"""Where do gradients come from? From what the arrays keep, or from a loss."""

from collections.abc import Callable
from typing import Any

from optimisers.arrays import registry
from optimisers.errors import BadState
from optimisers.state.leaf import Branch, Leaf
from optimisers.tree.children import container
from optimisers.tree.flatten import flatten_model
from optimisers.tree.flatten_up_to import flatten_up_to, mirrored
from optimisers.tree.path import KeyPath
from optimisers.tree.rebuild import rebuild


def gradients(model: object) -> Any:
    """The gradients that the arrays of a model keep (`.grad` of PyTorch), as `update` takes them.

    For a module a dict by name, as `named_parameters` has them, tied ones once; for any other model plain
    dicts and lists like it. None where there is no gradient, and so no step. Nothing is copied. Raises
    BadState for arrays that keep no gradients.
    """
    _refuse_state(model, "gradients")
    ways = container(model)
    if ways is not None and ways.gradients is not None:
        return ways.gradients(model)
    layout, arrays = flatten_model(model)
    library = registry.library(*arrays) if arrays else None
    if library is not None and library.gradient_of is None:
        raise BadState(
            f"arrays of {library.name} keep no gradients; work them out, and give them to update(state, "
            "model, grads)"
        )
    found = flatten_up_to(layout.root, model, KeyPath())
    return mirrored(
        layout.root, list(map(library.gradient_of, found)) if library and library.gradient_of else []
    )


def value_and_grad(loss: Callable[..., Any], model: object, *args: object, has_aux: bool = False) -> Any:
    """(loss(model, *args), its gradients with respect to all trainable arrays), for models of tensors.

    Worked out by `torch.func`, so that it may itself be differentiated and vmapped; the gradients stand as
    those of `gradients` do. With `has_aux`, the loss returns (loss, aux), and ((loss, aux), gradients) comes
    back. Buffers that a module changes, such as the statistics of BatchNorm, are changed in the module.
    Raises BadState for arrays that their library cannot differentiate here.
    """
    _refuse_state(model, "value_and_grad")
    ways = container(model)
    if ways is not None and ways.value_and_grad is not None:
        return ways.value_and_grad(loss, model, args, has_aux)
    layout, arrays = flatten_model(model)
    library = registry.library(*arrays) if arrays else registry.library(0.0)
    if library.value_and_grad is None:
        raise BadState(
            f"value_and_grad takes models of tensors; for arrays of {library.name} use its own, and give the "
            "gradients to update(state, model, grads)"
        )

    def of(new: list[Any]) -> Any:
        return loss(rebuild(layout.root, model, dict(enumerate(new))), *args)

    value, grads = library.value_and_grad(of, arrays, has_aux)
    return value, mirrored(layout.root, [grads[leaf] for leaf in layout.root.leaves])


def _refuse_state(model: object, name: str) -> None:
    if isinstance(model, Leaf | Branch):
        raise BadState(f"{name} was given a state; it takes the model")
