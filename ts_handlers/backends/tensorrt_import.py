"""Importing Torch-TensorRT, whose import can raise anything."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from ts_handlers.errors import BuildError


def import_torch_tensorrt() -> Any:
    """The module; raises `BuildError`."""
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:
        sys.modules["torch_tensorrt"] = None  # type: ignore[assignment]
        raise BuildError(f"torch_tensorrt cannot be imported: {type(error).__name__}: {error}") from error
