"""The ways to run a model: one module each, registered by name in `get_backend`."""

from __future__ import annotations

import importlib

from ts_handlers.backends.base import Backend
from ts_handlers.errors import BuildError, FailedBeforeError
from ts_handlers.settings import Settings

_MODULES = {
    "tensorrt": "ts_handlers.backends.tensorrt",
    "torch_tensorrt": "ts_handlers.backends.torch_tensorrt_jit",
    "aot_inductor": "ts_handlers.backends.aot_inductor",
    "inductor": "ts_handlers.backends.inductor",
    "eager": "ts_handlers.backends.eager",
}
RELEASES_EAGER = ("aot_inductor", "tensorrt")
"""Backends whose artifacts do not need the eager module, which is then freed."""


def get_backend(name: str) -> Backend:
    """The backend of that name; its module is imported here, and its compiler only when it builds."""
    module = importlib.import_module(_MODULES[name])
    backend: Backend = module.BACKEND
    return backend


def stand_in(backend: Backend, settings: Settings, error: Exception) -> Backend | None:
    """What to try after `error` before the next backend: a plan with its weights inside for one that is refitted.

    Where nothing could be built, it could not either.
    """
    unbuildable = error.unbuildable if isinstance(error, FailedBeforeError) else isinstance(error, BuildError)
    if backend.name != "tensorrt" or not settings.tensorrt.refit or unbuildable:
        return None
    from ts_handlers.backends import tensorrt

    return tensorrt.WEIGHTS_INSIDE if backend is tensorrt.BACKEND else None
