"""What is right to a type checker where JAX is used: read by pyright and mypy, and never run."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# Functions of JAX take and give what has no type.
from typing import assert_type

import jax
import jax.numpy as jnp
import optax

import optimisers as opt

Params = dict[str, jax.Array]


def loss(params: Params, batch: jax.Array) -> jax.Array:
    return jnp.sum((batch @ params["w"]) ** 2)


params: Params = {"w": jnp.ones(3)}
state = opt.setup(opt.Chain(opt.ClipNorm(1.0), opt.AdamW(opt.Cosine(1e-3, 100))), params)


def step(state: opt.State, params: Params, batch: jax.Array) -> tuple[opt.State, Params]:
    return opt.update(state, params, jax.grad(loss)(params, batch))


assert_type(step(state, params, jnp.ones((2, 3))), tuple[opt.State, Params])

transformation = opt.as_optax(opt.Adam(0.1))
assert_type(transformation, optax.GradientTransformationExtraArgs)
optax.chain(optax.clip(1.0), transformation)
opt.setup(opt.from_optax(optax.adam(0.1)), params)
