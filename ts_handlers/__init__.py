"""TorchServe handlers that start compiled PyTorch models warm.

Names are imported on first use, so that the parts that do not need TorchServe work without it.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "CompiledHandler": "ts_handlers.handler",
    "CompiledHandlerMixin": "ts_handlers.handler",
    "CompiledModel": "ts_handlers.compiled_model",
    "ArchiveSource": "ts_handlers.model_source",
    "ExportedSource": "ts_handlers.exported_source",
    "ModuleSource": "ts_handlers.model_source",
    "InputError": "ts_handlers.errors",
    "WarmStartError": "ts_handlers.errors",
    "Settings": "ts_handlers.settings",
    "parse_settings": "ts_handlers.settings",
    "start_model": "ts_handlers.startup",
}

__all__ = sorted(_NAMES)

if TYPE_CHECKING:
    from ts_handlers.compiled_model import CompiledModel as CompiledModel
    from ts_handlers.errors import InputError as InputError
    from ts_handlers.errors import WarmStartError as WarmStartError
    from ts_handlers.exported_source import ExportedSource as ExportedSource
    from ts_handlers.handler import CompiledHandler as CompiledHandler
    from ts_handlers.handler import CompiledHandlerMixin as CompiledHandlerMixin
    from ts_handlers.model_source import ArchiveSource as ArchiveSource
    from ts_handlers.model_source import ModuleSource as ModuleSource
    from ts_handlers.settings import Settings as Settings
    from ts_handlers.settings import parse_settings as parse_settings
    from ts_handlers.startup import start_model as start_model


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        if _NAMES[name] == "ts_handlers.handler":
            # A worker of TorchServe: what torch has made by now stays. Otherwise the next imports make Python's cycle
            # collector walk all of it once more, see docs/decisions/0020-warm-torch-compile.md.
            gc.freeze()
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
