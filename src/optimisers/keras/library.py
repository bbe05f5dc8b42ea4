"""Keras itself, with the backend that the environment says."""

import importlib
from typing import Any

from optimisers.errors import BadSetting

try:
    keras: Any = importlib.import_module("keras")
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise
    raise BadSetting(
        f"Keras asks for {error.name}, which is not installed; set the environment variable KERAS_BACKEND to "
        "torch or jax before anything imports keras"
    ) from error

scopes: Any = importlib.import_module("keras.src.backend.common.stateless_scope")
"""Where Keras says whether variables may be written now; it has no public name for that."""
