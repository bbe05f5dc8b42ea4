"""Kernels for CUDA run on the CPU here, by Triton's interpreter, unless somebody says otherwise.

Triton asks once, when it is imported.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
