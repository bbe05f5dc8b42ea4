"""A rule as a graph: called once with symbols, cut into passes at its reductions, printed as kernels by the
engines.
"""
