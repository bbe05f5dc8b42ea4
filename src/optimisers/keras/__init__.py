"""Everything that is for Keras alone: an optimiser of its kind, for its backends torch and JAX."""
