"""Settings that were removed: their default may still be written, any other value is refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ts_handlers.errors import SettingsError

HARDWARE_COMPATIBLE = (
    "an artifact is found by the name of the GPU that it was built on, so a plan that also runs on other GPUs would "
    "never be found there, and is slower; remove it"
)
_REMOVED: dict[tuple[str, str], tuple[Any, str]] = {("tensorrt", "hardware_compatible"): (False, HARDWARE_COMPATIBLE)}
"""By section and key: the value that may still be written, and why there is no other."""


def without_removed(section: Mapping[str, Any], root: str) -> Mapping[str, Any]:
    """A section without the settings that were removed.

    Raises
    ------
    SettingsError
        One of them has another value than its former default.
    """
    for (name, key), (default, reason) in _REMOVED.items():
        inner = section.get(name)
        if not isinstance(inner, Mapping) or key not in inner:
            continue
        refuse_other(inner[key], default, f"{root}.{name}.{key}", reason)
        section = {**section, name: {other: value for other, value in inner.items() if other != key}}
    return section


def refuse_other(value: Any, default: Any, where: str, reason: str) -> None:
    """Raise `SettingsError` unless a removed setting has its former default."""
    if value is not default:
        raise SettingsError(f"{where}: this setting was removed (value: {value!r}): {reason}")
