"""TorchServe handlers that start compiled PyTorch models warm.

Names are imported on first use, so that the parts that do not need TorchServe work without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ts_handlers.version import __version__ as __version__

_NAMES = {
    "ArchiveSource": "ts_handlers.model.archive",
    "CompiledHandler": "ts_handlers.servers.torchserve.compiled_handler",
    "CompiledHandlerMixin": "ts_handlers.servers.torchserve.handler",
    "CompiledModel": "ts_handlers.compiled_model",
    "ExportedSource": "ts_handlers.model.exported",
    "FunctionHandler": "ts_handlers.servers.torchserve.function_handler",
    "InputError": "ts_handlers.errors",
    "ModuleSource": "ts_handlers.model.module",
    "ServedModel": "ts_handlers.compiled_model",
    "Settings": "ts_handlers.settings",
    "WarmStartError": "ts_handlers.errors",
    "lift_quarantine": "ts_handlers.guard.quarantine",
    "parse_settings": "ts_handlers.settings",
    "prewarm": "ts_handlers.servers.torchserve.prewarm",
    "read_quarantines": "ts_handlers.guard.quarantine",
    "register_backend": "ts_handlers.settings",
    "start_model": "ts_handlers.start",
}

__all__ = sorted(_NAMES)

if TYPE_CHECKING:
    from ts_handlers.compiled_model import CompiledModel as CompiledModel
    from ts_handlers.compiled_model import ServedModel as ServedModel
    from ts_handlers.errors import InputError as InputError
    from ts_handlers.errors import WarmStartError as WarmStartError
    from ts_handlers.guard.quarantine import lift_quarantine as lift_quarantine
    from ts_handlers.guard.quarantine import read_quarantines as read_quarantines
    from ts_handlers.model.archive import ArchiveSource as ArchiveSource
    from ts_handlers.model.exported import ExportedSource as ExportedSource
    from ts_handlers.model.module import ModuleSource as ModuleSource
    from ts_handlers.servers.torchserve.compiled_handler import CompiledHandler as CompiledHandler
    from ts_handlers.servers.torchserve.function_handler import FunctionHandler as FunctionHandler
    from ts_handlers.servers.torchserve.handler import CompiledHandlerMixin as CompiledHandlerMixin
    from ts_handlers.servers.torchserve.prewarm import prewarm as prewarm
    from ts_handlers.settings import Settings as Settings
    from ts_handlers.settings import parse_settings as parse_settings
    from ts_handlers.settings import register_backend as register_backend
    from ts_handlers.start import start_model as start_model


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
