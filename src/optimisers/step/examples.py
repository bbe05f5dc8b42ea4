"""What becomes of the gradients of single examples, which have an axis in front? One weighted sum for each
array, before any engine sees them.
"""

from collections.abc import Sequence
from typing import Any

from optimisers import ops
from optimisers.arrays import registry
from optimisers.arrays.types import arithmetic, is_inexact
from optimisers.errors import BadState, TreeMismatch
from optimisers.rule import Rule
from optimisers.settings import parts, schedules
from optimisers.state.group import Group
from optimisers.state.store import Store
from optimisers.step.plan import Plan


def weighing(group: Group) -> bool:
    """Whether the rule of a group takes gradients of single examples; remembered by the group."""
    if group.cache.per_example is None:
        group.cache.per_example = _weigher(group.rule) is not None
    return group.cache.per_example


def _weigher(rule: Rule) -> Rule | None:
    """The rule, among those that a rule is made of, that takes gradients of single examples."""
    return next((part for part in parts(rule) if isinstance(part, Rule) and part.per_example), None)


def summed(store: Store, plan: Plan, mask: Any, grads: Sequence[Any]) -> tuple[Sequence[Any], int | None]:
    """(gradients, how many examples they are of): those of single examples weighted and summed; None where no
    rule asks for such.

    Raises TreeMismatch, naming the path, for gradients without their axis, and where two arrays have
    different numbers of examples.
    """
    chosen = {
        n: (group, member)
        for g, inside, at in plan.parts
        if weighing(group := store.groups[g])
        for member, n in zip(range(len(at)) if inside is None else inside.tolist(), at.tolist(), strict=True)
        if mask is None or mask[n]
    }
    if not chosen:
        return grads, None
    if store.capturable:
        raise BadState(
            "gradients of single examples are summed outside of kernels, which a capturable state does not "
            "allow; write setup without capturable"
        )
    flat: dict[int, Any] = {}
    counts: dict[int, str] = {}
    for n, (group, member) in chosen.items():
        path = store.layout.paths[plan.leaves[n]].code("grads")
        shape = group.places.shapes[member]
        rule = type(_weigher(group.rule)).__name__
        flat[n] = _of_examples(grads[n], shape, group.kind.dtype, rule, path)
        counts.setdefault(flat[n].shape[0], path)
    if len(counts) > 1:
        said = " and ".join(f"of {count} at {path}" for count, path in counts.items())
        raise TreeMismatch(
            f"the gradients of single examples are {said}; each array has one for each example"
        )
    norms = _norms(list(flat.values()))
    found = list(grads)
    for n, (group, member) in chosen.items():
        weights = _resolved(group, member).weigh(norms)
        library = registry.library(flat[n])
        row = library.operations["reshape"](library.cast(weights, flat[n].dtype), (1, -1))
        shape = tuple(grads[n].shape)[1:]
        found[n] = library.operations["reshape"](library.operations["matmul"](row, flat[n]), shape)
    return found, next(iter(counts))


def _of_examples(g: Any, shape: tuple[int, ...], dtype: Any, rule: str, path: str) -> Any:
    """The gradients of one array, of this type, as a matrix, a row an example, in the type of the
    arithmetic.
    """
    found = tuple(g.shape) if registry.isarray(g) else None
    if found is None or found[1:] != shape or len(found) != len(shape) + 1:
        what = f"of type {type(g).__name__}" if found is None else f"a gradient of shape {found}"
        wanted = f"(examples, {', '.join(map(str, shape))})" if shape else "(examples,)"
        raise TreeMismatch(
            f"{what} for parameters of shape {shape}, at {path}; {rule} takes the gradients of single "
            f"examples, of shape {wanted}: write jax.vmap(jax.grad(loss), (None, 0, 0))(model, x, y), or "
            "torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(model, x, y); TorchOptimizer takes them "
            "from p.grad_sample"
        )
    if found[0] == 0:
        raise TreeMismatch(f"gradients of no example, at {path}; leave such a step out")
    library = registry.library(g)
    kind = g.dtype if is_inexact(library.type_name(g.dtype)) else dtype
    return library.operations["reshape"](library.cast(g, arithmetic(library, kind)), (found[0], -1))


def _norms(gradients: list[Any]) -> Any:
    """The norm of each example over all arrays; raises BadState where these are of several libraries."""
    if len({registry.library(g).name for g in gradients}) > 1:
        raise BadState("the norms of examples are taken over arrays of one library; this model has several")
    library = registry.library(gradients[0])
    each = [ops.norm2(g, axis=1) for g in gradients]
    return ops.norm2(library.stacks.stack(each), axis=0)


def _resolved(group: Group, member: int) -> Any:
    """The rule that weighs examples, with the numbers of one array at its clock."""
    clock = group.table.read_clock(member)
    rule = _weigher(group.rule_of(member))
    assert rule is not None
    return schedules(rule, lambda _, schedule, __: schedule(clock))
