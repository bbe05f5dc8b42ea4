"""A small network as one vector, fitted to a sine by a solver of Optimistix that knows no networks."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix

import optimisers as opt


class Network(eqx.Module):
    """One hidden layer of tanh."""

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, width: int, key: Any) -> None:
        first, second = jax.random.split(key)
        self.hidden = eqx.nn.Linear(1, width, key=first)
        self.out = eqx.nn.Linear(width, 1, key=second)

    def __call__(self, x: Any) -> Any:
        return self.out(jnp.tanh(self.hidden(x)))


INPUTS = jnp.linspace(-3, 3, 100)[:, None]


def main() -> float:
    """Fit by Levenberg and Marquardt, with derivatives through the way back; the mean square error after."""
    flat, rebuild = opt.destructure(Network(8, jax.random.key(0)))

    def residuals(vector: Any, _: Any) -> Any:
        return jax.vmap(rebuild(vector))(INPUTS) - jnp.sin(INPUTS)

    def error(vector: Any) -> float:
        return float(jnp.mean(residuals(vector, None) ** 2))

    solver = optimistix.LevenbergMarquardt(rtol=1e-5, atol=1e-5)
    found = optimistix.least_squares(residuals, solver, flat, max_steps=100, throw=False)
    network = rebuild(found.value)
    print(f"{len(rebuild)} numbers as one vector: error {error(flat):.3f}, then {error(found.value):.1e}")
    print(f"sin(1) is {float(jnp.sin(1.0)):.4f}, the network says {network(jnp.ones(1))[0]:.4f}")
    return error(found.value)


if __name__ == "__main__":
    main()
