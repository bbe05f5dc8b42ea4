"""What JAX takes for a tree of arrays is a model: classes that users register, bound arguments, gradients of
a part; what is none says so.
"""

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optimisers as opt


@pytest.fixture(autouse=True)
def single() -> Any:
    with jax.enable_x64(False):
        yield


@jax.tree_util.register_pytree_node_class
class Named:
    """Arrays and a name, registered without keys."""

    def __init__(self, w: Any, inner: Any, name: str) -> None:
        self.w, self.inner, self.name = w, inner, name

    def tree_flatten(self) -> Any:
        return (self.w, self.inner), self.name

    @classmethod
    def tree_unflatten(cls, name: str, children: Any) -> "Named":
        return cls(*children, name)


class Keyed:
    """An array, registered with keys by functions."""

    def __init__(self, w: Any) -> None:
        self.w = w


jax.tree_util.register_pytree_with_keys(
    Keyed, lambda k: (((jax.tree_util.GetAttrKey("w"), k.w),), None), lambda _, children: Keyed(*children)
)


@pytest.mark.parametrize(
    "step", [opt.update, opt.update_, jax.jit(opt.update)], ids=["pure", "in place", "jit"]
)
def test_classes_that_are_registered_with_jax_are_models(step: Any) -> None:
    model = {"a": Named(jnp.ones(3), Keyed(jnp.ones(2)), "mine"), "b": jnp.ones(1)}
    state = opt.setup({"a.*.w": opt.Descent(0.5), "**": opt.Descent(0.25)}, model)
    state, new = step(state, model, jax.grad(lambda m: m["a"].w.sum() + m["a"].inner.w.sum())(model))

    np.testing.assert_allclose(new["a"].w, 0.75)
    np.testing.assert_allclose(new["a"].inner.w, 0.5)
    np.testing.assert_allclose(new["b"], 1)
    assert new["a"].name == "mine"
    assert state["a"][1].w.rule == opt.Descent(0.5)


def test_a_state_of_such_a_model_is_pickled() -> None:
    model = Keyed(jnp.ones(2))
    state = pickle.loads(pickle.dumps(opt.setup(opt.Momentum(), model)))
    _, new = opt.update(state, model, Keyed(jnp.ones(2)))
    np.testing.assert_allclose(new.w, 0.99)


def test_a_model_of_the_user_keeps_what_was_registered_here() -> None:
    opt.register(Keyed, children=("w",))
    try:
        assert str(opt.setup(opt.Adam(), Keyed(jnp.ones(2))).w.path) == "w"
    finally:
        from optimisers.tree.children import REGISTERED

        del REGISTERED[Keyed]


def test_arguments_that_are_bound_train_where_jax_sees_them() -> None:
    bound = jax.tree_util.Partial(lambda w, x, *, b: w * x + b, jnp.ones(3), b=jnp.zeros(3))
    model = {"f": bound}
    grads = jax.grad(lambda m: m["f"](2.0).sum())(model)
    _, new = opt.update(opt.setup(opt.Descent(0.25), model), model, grads)
    np.testing.assert_allclose(new["f"](1.0), 0.5 - 0.25)

    with pytest.raises(
        opt.TreeMismatch, match=r"model\['f'\] is a partial, which holds an array in model\['f'\].args"
    ):
        opt.setup(opt.Adam(), {"f": functools.partial(jnp.add, jnp.ones(3)), "w": jnp.ones(2)})


@pytest.mark.parametrize("step", [opt.update, opt.update_], ids=lambda f: f.__name__)
def test_gradients_of_a_part_of_a_module_step_that_part(step: Any) -> None:
    module = nnx.LoRA(3, 2, 3, base_module=nnx.Linear(3, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    part = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3))) ** 2), argnums=part)(module)
    _, new = step(opt.setup(opt.Descent(0.5), module), module, grads)
    after = nnx.to_pure_dict(nnx.state(new, nnx.Param))

    np.testing.assert_array_equal(after["base_module"]["kernel"], before["base_module"]["kernel"])
    np.testing.assert_allclose(
        after["lora_b"], before["lora_b"] - 0.5 * grads["lora_b"][...], rtol=1e-6, atol=1e-7
    )


def test_gradients_of_another_module_are_refused() -> None:
    module, other = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Embed(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(opt.TreeMismatch, match="embedding"):
        opt.update(opt.setup(opt.Adam(), module), module, nnx.state(other))


def test_a_state_over_numpy_says_so_inside_a_transform() -> None:
    """As msgpack restores parameters."""
    params = {"w": np.ones(3, np.float32)}
    state = opt.setup(opt.Adam(0.1), params)
    with pytest.raises(opt.BadState, match=r"arrays of numpy.*jax.tree.map\(jnp.asarray, model\)"):
        jax.jit(opt.update)(state, params, {"w": jnp.ones(3)})

    tx: Any = opt.as_optax(opt.Descent(0.5))
    updates, _ = jax.jit(tx.update)({"w": jnp.ones(3)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.5)
