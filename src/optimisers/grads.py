"""Where do gradients come from? From what the arrays keep, or from a loss."""

from collections.abc import Callable, Sequence
from typing import Any

from optimisers.arrays import registry
from optimisers.arrays.types import is_complex
from optimisers.errors import BadState
from optimisers.ops import rademacher
from optimisers.step.choose import refuse_no_model
from optimisers.tree.children import container_for
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
    refuse_no_model(model, "gradients(model)")
    container = container_for(model)
    if container is not None and container.gradients is not None:
        return container.gradients(model)
    layout, arrays = flatten_model(model)
    library = registry.library(*arrays) if arrays else None
    if library is not None and library.derivatives.gradient_of is None:
        raise BadState(
            f"arrays of {library.name} keep no gradients; work them out, and give them to update(state, "
            "model, grads)"
        )
    found = flatten_up_to(layout.root, model, KeyPath())
    return mirrored(
        layout.root,
        list(map(library.derivatives.gradient_of, found))
        if library and library.derivatives.gradient_of
        else [],
    )


def value_and_grad(loss: Callable[..., Any], model: object, *args: object, has_aux: bool = False) -> Any:
    """(loss(model, *args), its gradients with respect to all trainable arrays), for models of tensors.

    Worked out by `torch.func`, so that it may itself be differentiated and vmapped; the gradients stand as
    those of `gradients` do. With `has_aux`, the loss returns (loss, aux), and ((loss, aux), gradients) comes
    back. Buffers that a module changes, such as the statistics of BatchNorm, are changed in the module.
    Raises BadState for arrays that their library cannot differentiate here.
    """
    refuse_no_model(model, "value_and_grad(loss, model)")
    container = container_for(model)
    if container is not None and container.value_and_grad is not None:
        return container.value_and_grad(loss, model, args, has_aux)
    layout, arrays = flatten_model(model)
    library = registry.library(*arrays) if arrays else registry.library(0.0)
    if library.derivatives.value_and_grad is None:
        raise BadState(
            f"value_and_grad takes models of tensors; for arrays of {library.name} use its own, and give the "
            "gradients to update(state, model, grads)"
        )

    def of(new: list[Any]) -> Any:
        return loss(rebuild(layout.root, model, dict(enumerate(new))), *args)

    value, grads = library.derivatives.value_and_grad(of, arrays, has_aux)
    return value, mirrored(layout.root, [grads[leaf] for leaf in layout.root.leaves])


def hutchinson(loss: Callable[..., Any], model: object, seed: Any, *args: object, samples: int = 1) -> Any:
    """An estimate of the diagonal of the Hessian of loss(model, *args) with respect to all trainable arrays:
    the mean of z H z over `samples` arrays z of random signs; for models of tensors, and of arrays of JAX.

    It is right in the mean, and exact where the Hessian is diagonal. The signs follow from `seed`, a whole
    number below 2^24, and the path of each array (see `opt.ops.rademacher`): give another seed for each
    estimate, the number of the step, say. It stands as the gradients of `gradients` do, and goes to the rules
    that ask for it as second gradients: `update(state, model, grads, hutchinson(loss, model, step, batch))`.
    One estimate costs about two gradients. By a derivative of the gradient, in PyTorch backward over
    backward, in JAX forward over backward, there also inside `jit`; buffers of a module stay as they are.
    Bekas, Kokiopoulou & Saad, "An estimator for the diagonal of a matrix", 2007,
    doi:10.1016/j.apnum.2007.01.003.

    Raises BadState for complex parameters, and for arrays that their library cannot differentiate here.
    """
    refuse_no_model(model, "hutchinson(loss, model, seed)")
    if samples < 1:
        raise BadState(f"hutchinson was given samples={samples!r}; it takes a whole number, 1 or more")
    container = container_for(model)
    if container is not None and container.functional is not None:
        run, parameters, named = container.functional(loss, model, args)
        names = list(parameters)
        found = _diagonal(
            lambda new: run(dict(zip(names, new, strict=True)))[0],
            list(parameters.values()),
            [KeyPath(*name.split(".")) for name in names],
            seed,
            samples,
        )
        return named(dict(zip(names, found, strict=True)))
    layout, arrays = flatten_model(model)

    def of(new: list[Any]) -> Any:
        return loss(rebuild(layout.root, model, dict(enumerate(new))), *args)

    found = _diagonal(of, arrays, layout.paths, seed, samples)
    return mirrored(layout.root, [found[leaf] for leaf in layout.root.leaves])


def _diagonal(
    of: Callable[[list[Any]], Any], arrays: list[Any], paths: Sequence[KeyPath], seed: Any, samples: int
) -> list[Any]:
    """The estimate for a function of a list of arrays, which stand at these paths."""
    if not arrays:
        return []
    library = registry.library(*arrays)
    product = library.derivatives.hessian_product
    if product is None:
        raise BadState(
            f"hutchinson takes models of tensors and of arrays of JAX; arrays of {library.name} cannot be "
            "differentiated: give estimates of your own to update(state, model, grads, hessians)"
        )
    for x, path in zip(arrays, paths, strict=True):
        if is_complex(library.type_name(x.dtype)):
            raise BadState(f"hutchinson takes real parameters; {path.code()} is complex")
    total: list[Any] = [0.0] * len(arrays)
    for k in range(samples):
        signs = [
            library.cast(rademacher(x, seed, step=k, leaf=path), x.dtype)
            for x, path in zip(arrays, paths, strict=True)
        ]
        products = product(of, arrays, signs)
        total = [t + z * h / samples for t, z, h in zip(total, signs, products, strict=True)]
    return total
