"""Everything that is for PyTorch alone: an optimiser of its kind, a step in its compiled graphs."""
