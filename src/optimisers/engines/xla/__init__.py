"""The engine of JAX: passes in operations of XLA, or as one call of the CPU kernel."""
