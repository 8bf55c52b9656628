"""TorchServe's section ``pt2: {compile: ...}``: the fallback order that it selects, and to whom its options belong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ts_handlers.errors import ForeignBackendError, SettingsError
from ts_handlers.settings.model import PT2_SECTION, SECTION, CompileSettings, Settings
from ts_handlers.settings.removed import HARDWARE_COMPATIBLE, refuse_other

_TENSORRT: tuple[str, ...] = ("tensorrt", "torch_tensorrt", "eager")
FALLBACK_ORDERS: dict[str, tuple[str, ...]] = {
    "inductor": ("inductor", "eager"),
    "torch_tensorrt": _TENSORRT,
    "tensorrt": _TENSORRT,  # Torch-TensorRT registers its backend under both names
    "eager": ("eager",),
}
_MIB = 1 << 20

# Options of Torch-TensorRT that have a setting of their own: its name, the option's type, and how to translate it.
_SETTINGS: dict[str, tuple[str, type, Any]] = {
    "optimization_level": ("optimization_level", int, lambda value: value),
    "disable_tf32": ("tf32", bool, lambda value: not value),
    "enable_autocast": ("precision", bool, lambda value: "autocast" if value else "as_is"),
    "workspace_size": ("workspace_mb", int, lambda value: -(-value // _MIB) or None),  # 0 is TensorRT's default
}


def apply_compile(settings: Settings, compile_settings: CompileSettings, section: Mapping[str, Any]) -> Settings:
    """The settings with TorchServe's section applied.

    Parameters
    ----------
    settings, compile_settings:
        Both sections, converted.
    section:
        ``handler: ts_handlers:`` as the user wrote it: what stands there wins or is contradicted, defaults are not.

    Raises
    ------
    SettingsError
        The two sections contradict each other, or the backend has nothing to store.
    """
    explicit = "backends" in section
    if explicit and not compile_settings.enable and settings.backends != ("eager",):
        raise SettingsError(
            f"{PT2_SECTION}.enable: false contradicts {SECTION}.backends: {list(settings.backends)}; remove one of them"
        )
    backends = settings.backends
    if not compile_settings.enable:
        backends = ("eager",)
    elif not explicit:
        if compile_settings.backend not in FALLBACK_ORDERS:
            raise ForeignBackendError(
                f"{PT2_SECTION}.backend: {compile_settings.backend!r} has no persistent artifact; expected one of "
                f"{', '.join(FALLBACK_ORDERS)}, or name the backends in {SECTION}.backends",
                compile_settings.backend,
            )
        backends = FALLBACK_ORDERS[compile_settings.backend]
    if FALLBACK_ORDERS.get(compile_settings.backend) is _TENSORRT:
        settings, compile_settings = _move_options(settings, compile_settings, section.get("tensorrt") or {})
    return msgspec.structs.replace(settings, compile=compile_settings, backends=backends)


def _move_options(
    settings: Settings, compile_settings: CompileSettings, section: Mapping[str, Any]
) -> tuple[Settings, CompileSettings]:
    """Read Torch-TensorRT's options into `Settings.tensorrt`, where both TensorRT backends look."""
    if compile_settings.mode is not None:
        raise SettingsError(
            f"{PT2_SECTION}.mode: {compile_settings.mode!r} is a mode of Inductor, which {compile_settings.backend} "
            f"does not have; remove it, or set options: {{optimization_level: 0 to 5}}"
        )
    changes: dict[str, Any] = {}
    options = dict(settings.tensorrt.options)
    for name, value in compile_settings.options.items():
        if name == "hardware_compatible":
            refuse_other(value, False, f"{PT2_SECTION}.options.{name}", HARDWARE_COMPATIBLE)
        elif name in _SETTINGS:
            setting, kind, translate = _SETTINGS[name]
            if type(value) is not kind:
                raise SettingsError(f"{PT2_SECTION}.options.{name}: expected {kind.__name__}, found {value!r}")
            changes[setting] = translate(value)
            there = getattr(settings.tensorrt, setting)
            if setting in section and there != changes[setting]:
                raise _contradiction(name, value, setting, there)
        else:
            if name in options and options[name] != value:
                raise _contradiction(name, value, f"options.{name}", options[name])
            options[name] = value
    tensorrt = msgspec.structs.replace(settings.tensorrt, options=options, **changes)
    return msgspec.structs.replace(settings, tensorrt=tensorrt), msgspec.structs.replace(compile_settings, options={})


def _contradiction(name: str, value: Any, other: str, there: Any) -> SettingsError:
    return SettingsError(
        f"{PT2_SECTION}.options.{name}: {value!r} contradicts {SECTION}.tensorrt.{other}: {there!r}; remove one of them"
    )
