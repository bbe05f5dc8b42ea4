"""Benchmarks: run as modules from the root of the repository; they print, and never assert on time."""
