"""The page of benchmarks, made from the tables under benchmarks/results."""
