"""The CPU engine: each pass one compiled kernel of Numba over all leaves."""
