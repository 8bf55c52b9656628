"""The ways to run a model: one module each, registered by name in `get_backend`."""

from __future__ import annotations

import importlib

from ts_handlers.backends.base import Backend

_MODULES = {
    "tensorrt": "ts_handlers.backends.tensorrt",
    "torch_tensorrt": "ts_handlers.backends.torch_tensorrt_jit",
    "aot_inductor": "ts_handlers.backends.aot_inductor",
    "inductor": "ts_handlers.backends.inductor",
    "eager": "ts_handlers.backends.eager",
}


def get_backend(name: str) -> Backend:
    """The backend of that name; its module is imported here, and its compiler only when it builds."""
    module = importlib.import_module(_MODULES[name])
    backend: Backend = module.BACKEND
    return backend
