"""The structure of a state depends on the model and the rule alone; every array of it has a path.

Wanted numbers come from NumPy's arrays, stepped by the same rule.
"""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimisers as opt

RULES = (
    opt.Adam(0.1),
    opt.MixedPrecision(opt.Momentum(0.1)),
    opt.Chain(opt.ClipGlobalNorm(1.0), opt.Lion(0.1)),
)


def model(kind: Any = jnp) -> Any:
    return {
        "a": kind.ones((2, 3), kind.float32),
        "b": {"c": kind.ones(4, kind.float32)},
        "d": kind.ones((), "float32"),
    }


def form(state: Any) -> Any:
    return jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_structure_is_the_same_inside_and_outside_jit(rule: opt.Rule) -> None:
    outside = opt.setup(rule, model())

    assert form(outside) == form(jax.jit(lambda m: opt.setup(rule, m))(model()))
    abstract = jax.eval_shape(lambda m: opt.setup(rule, m), model())
    assert form(outside)[0] == jax.tree.structure(abstract)


@pytest.mark.parametrize("packed", [False, True])
def test_a_traced_rate_gives_the_structure_of_a_plain_one(packed: bool) -> None:
    plain = opt.setup(opt.Adam(0.1), model(), packed=packed)
    traced = jax.jit(lambda eta: opt.setup(opt.Adam(eta), model(), packed=packed))(0.1)

    assert form(plain) == form(traced)
    np.testing.assert_allclose(jax.tree.leaves(plain)[-2], jax.tree.leaves(traced)[-2], rtol=1e-6)


def test_the_structure_does_not_depend_on_the_values_of_rates() -> None:
    def state(first: Any, second: Any) -> Any:
        return opt.setup({"a": opt.Adam(first), "**": opt.Adam(second)}, model())

    wanted = form(state(0.1, 0.2))

    assert form(state(0.2, 0.1)) == wanted
    assert form(jax.jit(state)(0.1, 0.2)) == wanted


def test_every_array_of_a_state_has_a_path() -> None:
    state = opt.setup(opt.Adam(), model())
    names = {path[0].key: x.shape for path, x in jax.tree_util.tree_leaves_with_path(state)}

    for path, shape in (("a", (2, 3)), ("b.c", (4,)), ("d", ())):
        assert names[f"{path}:m"] == names[f"{path}:v"] == shape
    assert len(names) == len(jax.tree.leaves(state))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("packed", [False, True])
def test_packed_or_not_a_step_is_that_of_numpy(rule: opt.Rule, packed: bool) -> None:
    ours, theirs = model(), model(np)
    state, plain = opt.setup(rule, ours, packed=packed), opt.setup(rule, theirs)
    step = jax.jit(opt.update)
    for _ in range(3):
        state, ours = step(state, ours, jax.tree.map(lambda x: 0.5 * x, ours))
        plain, theirs = opt.update(plain, theirs, jax.tree.map(lambda x: np.float32(0.5) * x, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), ours, theirs)


def test_packed_state_has_fewer_arrays() -> None:
    many = {f"w{i:02}": jnp.ones(3) for i in range(32)}
    alone, packed = (opt.setup(opt.Momentum(), many, packed=p) for p in (False, True))

    assert len(jax.tree.leaves(alone)) - len(jax.tree.leaves(packed)) == 32 - 2


@pytest.mark.parametrize("frozen", ["a", "b.**"])
def test_a_state_with_frozen_parts_is_still_stepped_by_the_kernel(frozen: str) -> None:
    ours = model()
    state = opt.freeze(opt.setup(opt.Adam(0.1), ours), where=frozen)
    text = jax.jit(opt.update).lower(state, ours, ours).as_text()

    assert "optimisers_" in text


def test_where_two_structures_differ_the_message_of_jax_says_by_what() -> None:
    state = opt.setup(opt.Descent(opt.Cosine(0.1, 10)), {"w": jnp.ones(2)})
    axes = opt.vmap_axes(state, "eta")
    with pytest.raises(ValueError, match="metadata") as caught:
        jax.vmap(lambda eta: opt.adjust(state, eta), out_axes=axes)(jnp.arange(3.0))

    assert "1 arrays: Descent(Cosine(#, #, #, #, #, 1, #, #))>" in str(caught.value)
    assert "1 arrays: Descent(#)>" in str(caught.value)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optimisers as opt
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
spread = NamedSharding(mesh, P("d"))
rule = opt.Chain(opt.ClipGlobalNorm(1.0), opt.Adam(0.1))
there = {"a": jnp.arange(32.0).reshape(8, 4), "b": jnp.ones(5)}
one = opt.setup(rule, there)
model = {"a": jax.device_put(there["a"], spread), "b": there["b"]}
outside, inside = opt.setup(rule, model), jax.jit(lambda m: opt.setup(rule, m))(model)
assert jax.tree.structure(one) == jax.tree.structure(outside) == jax.tree.structure(inside)
step = jax.jit(opt.update)
_, wanted = step(one, there, there)
for state in (one, outside, inside):  # that of one device too: it is restored on four
    _, new = step(state, model, model)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), new, wanted)
assert "optimisers_" in step.lower(one, there, there).as_text()
assert "optimisers_" not in step.lower(outside, model, model).as_text()  # XLA partitions it
"""


@pytest.mark.slow
def test_a_state_of_one_device_is_that_of_four() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        check=False,
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
