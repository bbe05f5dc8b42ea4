"""How does a step go whose arrays lie on a mesh of devices? As XLA partitions it, but for matrices.

Rules that compute with matrices do so with axes of the mesh that are automatic, also where they are explicit:
no product has to say how its result lies. State and parameters come back as they lay.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from optimisers.arrays import registry
from optimisers.engines.task import watches
from optimisers.engines.xla.mesh import Lying, Spec, lying, spec_of
from optimisers.state.group import is_free
from optimisers.state.store import Store
from optimisers.state.structure import structure_of
from optimisers.step import update
from optimisers.tree.layout import Node


def evaluated(
    store: Store,
    node: Node,
    xs: Sequence[Any],
    orders: list[Any],
    loss: object = None,
    *,
    changes: bool = False,
) -> tuple[Store, dict[int, Any]]:
    """(the store after a step, the new parameters by leaf), by the engines, inside a transform or outside."""
    mesh = explicit_mesh(xs) if any(is_free(g.program) for g in store.groups) else None
    if mesh is None:
        return update.evaluated(store, node, xs, orders, loss, changes=changes)
    notes = watches.get()
    structure, found = structure_of(store), dict[str, Any]()

    def automatic(held: Any, xs: Any, orders: Any, loss: Any) -> Any:
        own = None if notes is None else list[Any]()
        mesh = jax.sharding.get_abstract_mesh()
        tokens = watches.set(own), lying.set(Lying(mesh, specs))
        try:
            after, new = update.evaluated(structure.filled(held), node, xs, orders, loss, changes=changes)
        finally:
            watches.reset(tokens[0])
            lying.reset(tokens[1])
        found.update(structure=structure_of(after), leaves=set(new), notes=own)
        return (
            after.arrays(),
            [new.get(leaf, x) for leaf, x in zip(node.leaves, xs, strict=True)],
            [seen for seen, _, _ in own or ()],
        )

    specs = specs_of(node, xs)
    held = store.arrays()
    there = [[sharding_of(x, mesh) for x in some] for some in (held, xs)]
    run: Any = jax.sharding.auto_axes(automatic, out_sharding=(*there, NamedSharding(mesh, PartitionSpec())))
    with jax.sharding.use_abstract_mesh(mesh):
        held, new, seen = run(held, list(xs), [once(node, o) for o in orders], loss)
    if notes is not None:
        notes += [(values, *rest) for values, (_, *rest) in zip(seen, found["notes"], strict=True)]
    by_leaf = {leaf: x for leaf, x in zip(node.leaves, new, strict=True) if leaf in found["leaves"]}
    return found["structure"].filled(held), by_leaf


def explicit_mesh(xs: Sequence[object]) -> AbstractMesh | None:
    """The mesh on which arrays lie that say how, where its axes are explicit; else None."""
    if not hasattr(jax.sharding, "auto_axes"):
        return None
    for x in xs:
        mesh = (
            getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None) if registry.isarray(x) else None
        )
        if mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def sharding_of(x: object, mesh: AbstractMesh) -> NamedSharding:
    """Where an array lies, as the trace sees it."""
    found = getattr(jax.typeof(x), "sharding", None)
    return found if found is not None and found.mesh == mesh else NamedSharding(mesh, PartitionSpec())


def specs_of(node: Node, xs: Sequence[Any]) -> tuple[tuple[int, Spec], ...]:
    """(leaf, how its parameters are cut) of those that lie on a mesh."""
    found = dict[int, Spec]()
    for leaf, x in zip(node.leaves, xs, strict=True):
        there = getattr(jax.typeof(x) if isinstance(x, Tracer) else x, "sharding", None)
        if isinstance(there, NamedSharding):
            found[leaf] = spec_of(there.spec, x.ndim)
    return tuple(found.items())


def lying_of(node: Node, xs: Sequence[Any]) -> Lying | None:
    """Where the parameters of an eager step lie; None where it is not on one mesh of several devices."""
    meshes = {getattr(x.sharding, "mesh", None) for x in xs if isinstance(x, jax.Array)}
    mesh = meshes.pop() if len(meshes) == 1 else None
    if mesh is None or mesh.size == 1 or jax.sharding.AxisType.Explicit in mesh.axis_types:
        return None
    return Lying(mesh, specs_of(node, xs))


def once(node: Node, grads: Sequence[Any]) -> list[Any]:
    """Gradients, each object once among the places of a leaf: inside a transform they are objects no more."""
    seen = set[tuple[int, int]]()
    found: list[Any] = []
    for leaf, g in zip(node.leaves, grads, strict=True):
        found.append(None if (leaf, id(g)) in seen else g)
        seen.add((leaf, id(g)))
    return found
