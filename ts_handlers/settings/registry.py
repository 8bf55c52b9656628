"""The backends that settings can name, and where each is found.

A backend is one module or folder and one line in `_LOCATIONS`. Other packages add theirs with `register_backend`, or
with an entry point in the group ``ts_handlers.backends`` whose name is the backend's::

    [project.entry-points."ts_handlers.backends"]
    my_backend = "my_package.my_backend:BACKEND"

Locations are resolved by `ts_handlers.backends.get_backend`; nothing is imported here.
"""

from __future__ import annotations

from typing import Any

ENTRY_POINT_GROUP = "ts_handlers.backends"

DEFAULT_BACKENDS = ("aot_inductor", "inductor", "eager")
"""The fallback order when settings name none."""

_LOCATIONS: dict[str, Any] = {
    "tensorrt": "ts_handlers.backends.tensorrt.backend:BACKEND",
    "torch_tensorrt": "ts_handlers.backends.torch_tensorrt.backend:BACKEND",
    "aot_inductor": "ts_handlers.backends.aot_inductor.backend:BACKEND",
    "inductor": "ts_handlers.backends.inductor.backend:BACKEND",
    "eager": "ts_handlers.backends.eager:BACKEND",
}


def register_backend(name: str, location: Any) -> Any:
    """Make a backend known under a name, or put another one in the place of a known one.

    Parameters
    ----------
    name:
        What ``backends:`` in model-config.yaml calls it.
    location:
        ``"module:attribute"``, imported when the backend is first used, or an object that fulfils
        `ts_handlers.backends.base.Backend`. None forgets the name.

    Returns
    -------
    What was registered under the name before, or None.

    Examples
    --------
    >>> register_backend("noop", "my_package.noop:BACKEND")
    >>> "noop" in backend_names()
    True
    >>> register_backend("noop", None)
    'my_package.noop:BACKEND'
    """
    before = _LOCATIONS.get(name)
    if location is None:
        _LOCATIONS.pop(name, None)
    else:
        _LOCATIONS[name] = location
    return before


def backend_location(name: str) -> Any:
    """Where the backend of that name is found, or None; entry points are read only for a name that is not known yet."""
    if name not in _LOCATIONS:
        _add_entry_points()
    return _LOCATIONS.get(name)


def backend_names() -> tuple[str, ...]:
    """Every name that ``backends:`` accepts."""
    _add_entry_points()
    return tuple(_LOCATIONS)


def _add_entry_points() -> None:
    import importlib.metadata

    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _LOCATIONS.setdefault(entry_point.name, entry_point.value)
