"""What both TensorRT backends ask of the settings: the options in the key, and a GPU to run on."""

from __future__ import annotations

import json

from ts_handlers.backends.base import Target
from ts_handlers.errors import BuildError
from ts_handlers.settings.sections import TensorRTSettings


def engine_options(settings: TensorRTSettings) -> dict[str, str]:
    """The settings of the section that change every engine, by the names that they have in the key."""
    facts = {
        "precision": settings.precision,
        "tf32": str(settings.tf32),
        "float32_accumulation": str(settings.float32_accumulation),
        "workspace_mb": str(settings.workspace_mb),
        "optimization_level": str(settings.optimization_level),
        "hardware_compatible": "False",  # once a setting; without it the keys of stored entries would change
    }
    facts.update({f"tensorrt.{name}": json.dumps(value) for name, value in settings.options.items()})
    return facts


def require_gpu(target: Target) -> None:
    """Raise `BuildError` unless the model runs on a CUDA GPU."""
    if target.device.type != "cuda":
        raise BuildError(f"TensorRT needs a CUDA GPU, the worker runs on {target.device.type}; take another backend")
