"""The ways to run a model: one module or folder each, registered by name in `ts_handlers.settings.registry`."""

from __future__ import annotations

import importlib
from typing import cast

from ts_handlers.backends.base import Backend
from ts_handlers.errors import SettingsError
from ts_handlers.settings.registry import backend_location, backend_names


def get_backend(name: str) -> Backend:
    """The backend of that name; its module is imported here, and its compiler only when it builds.

    Raises
    ------
    SettingsError
        No backend of that name is registered.
    """
    location = backend_location(name)
    if location is None:
        raise SettingsError(f"no backend is called {name!r}; known are {', '.join(backend_names())}")
    if isinstance(location, str):
        module, _, attributes = location.partition(":")
        location = importlib.import_module(module)
        for attribute in attributes.split("."):
            location = getattr(location, attribute)
    return cast(Backend, location)
