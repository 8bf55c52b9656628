"""The setting ``models``: modules below a handler, each with settings of its own."""

from __future__ import annotations

import re

import msgspec

from ts_handlers.errors import SettingsError
from ts_handlers.settings.model import SECTION, Settings
from ts_handlers.settings.validation import validate

OWN = ("inputs", "dimensions", "warmup", "outside")
"""Settings of a submodel that have nothing to do with those of the handler."""
SHARED = ("backends", "on_miss", "canary", "tensorrt")
"""Settings that a submodel takes from the handler unless it has its own."""

LEAST_LENGTH = 8
"""Tokens of a static cache."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def settings_of(settings: Settings, name: str) -> Settings:
    """The settings with which a submodel is started.

    Examples
    --------
    >>> from ts_handlers.settings import parse_settings
    >>> section = {"backends": ["eager"], "models": {"unet": {"path": "pipe.unet", "outside": "refuse"}}}
    >>> found = settings_of(parse_settings({"handler": {"ts_handlers": section}}), "unet")
    >>> found.backends, found.outside
    (('eager',), 'refuse')
    """
    model = settings.models[name]
    changes = {key: getattr(model, key) for key in OWN}
    changes |= {key: value for key in SHARED if (value := getattr(model, key)) is not None}
    return msgspec.structs.replace(settings, models={}, **changes)


def validate_models(settings: Settings) -> None:
    """Raise `SettingsError` with the path of the first setting of a submodel that is wrong."""
    if not settings.models:
        return
    for key in ("inputs", "dimensions", "warmup"):
        if getattr(settings, key):
            raise SettingsError(
                f"{SECTION}.{key}: with {SECTION}.models each model has {key} of its own; name self.model there too, "
                "as `models: {model: {path: model, inputs: ...}}`"
            )
    if settings.contexts.across_workers:
        raise SettingsError(
            f"{SECTION}.models: what a handler holds exists in its worker only and cannot be shared; remove "
            f"{SECTION}.contexts.across_workers"
        )
    served: dict[tuple[str, str], str] = {}
    for name, model in settings.models.items():
        where = f"{SECTION}.models.{name}"
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"{SECTION}.models: {name[:80]!r} is no name for a model; expected letters, digits, '_' and '-'"
            )
        if not model.path or not all(model.path.split(".")):
            raise SettingsError(
                f"{where}.path: expected attributes from the handler on, such as pipe.unet, found {model.path!r}"
            )
        if not model.method.isidentifier():
            raise SettingsError(f"{where}.method: expected the name of a method, found {model.method!r}")
        other = served.setdefault((model.path, model.method), name)
        if other != name:
            raise SettingsError(
                f"{where}: {other} is {model.path}, method {model.method}, too; name each method once, since a call "
                "can be answered by one artifact"
            )
        _validate_generate(where, settings, name)
        _validate_arguments(where, settings, name)
        try:
            validate(settings_of(settings, name))
        except SettingsError as error:
            keys = "|".join((*OWN, *SHARED))
            raise SettingsError(re.sub(rf"{re.escape(SECTION)}\.({keys})\b", rf"{where}.\1", str(error))) from None


def _validate_generate(where: str, settings: Settings, name: str) -> None:
    model = settings.models[name]
    if model.generate is None:
        return
    for key in ("inputs", "dimensions", "warmup", "arguments"):
        if getattr(model, key):
            raise SettingsError(
                f"{where}.{key}: the inputs of decode steps are found by generating; remove {key}, or remove generate"
            )
    if model.method != "forward":
        raise SettingsError(f"{where}.method: decode steps call forward; remove method, or remove generate")
    length, batch = model.generate.length, model.generate.batch
    if length < LEAST_LENGTH:
        raise SettingsError(f"{where}.generate.length: expected at least {LEAST_LENGTH} tokens, found {length}")
    if not 1 <= batch.min <= batch.max:
        raise SettingsError(f"{where}.generate.batch: expected 1 <= min <= max, found {batch.min} and {batch.max}")


def _validate_arguments(where: str, settings: Settings, name: str) -> None:
    model = settings.models[name]
    for argument in model.arguments:
        if not argument.isidentifier():
            raise SettingsError(f"{where}.arguments: {argument[:80]!r} is no name of an argument")
        if argument in {spec.name for spec in model.inputs}:
            raise SettingsError(f"{where}.arguments.{argument}: is one of the inputs, too; keep one of them")
