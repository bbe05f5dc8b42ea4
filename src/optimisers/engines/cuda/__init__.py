"""The CUDA engine: each pass one launch of Triton over all leaves."""
