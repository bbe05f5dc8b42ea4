"""Everything that is for JAX alone: a state as a pytree, our rules in Optax and the reverse."""
