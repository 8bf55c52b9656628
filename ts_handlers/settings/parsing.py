"""Read settings from model-config.yaml; every mistake is an error that names its place and the remedy.

Two sections are read: TorchServe's own ``pt2: {compile: {...}}`` (backend, mode, options, dynamic, fullgraph) and
ours, ``handler: {ts_handlers: {...}}``. Both are validated strictly: an unknown key, a wrong type or an impossible
combination is a `SettingsError` that names the key's path, the value found and the remedy.
"""

from __future__ import annotations

import difflib
import logging
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ts_handlers.errors import SettingsError
from ts_handlers.settings.model import PT2_SECTION, SECTION, CompileSettings, Settings
from ts_handlers.settings.removed import without_removed
from ts_handlers.settings.submodels import validate_models
from ts_handlers.settings.torch_compile import apply_compile
from ts_handlers.settings.validation import validate
from ts_handlers.system.decoding import convert

logger = logging.getLogger(__name__)


def parse_settings(model_yaml_config: Mapping[str, Any] | None) -> Settings:
    """Read both sections of a parsed model-config.yaml.

    Parameters
    ----------
    model_yaml_config:
        The whole file as TorchServe parsed it; None or an empty mapping gives the defaults.

    Raises
    ------
    SettingsError
        With the key's path, the value found and the remedy.

    Examples
    --------
    >>> parse_settings({"handler": {"ts_handlers": {"backends": ["eager"]}}}).backends
    ('eager',)
    >>> parse_settings({"handler": {"ts_handlers": {"bakends": ["eager"]}}})
    Traceback (most recent call last):
    ts_handlers.errors.SettingsError: handler.ts_handlers.bakends: unknown key ...; did you mean 'backends'?
    """
    config = model_yaml_config or {}
    if not isinstance(config, Mapping):
        raise SettingsError(
            f"model-config.yaml: expected a mapping at the top level, found {type(config).__name__}; "
            "write it as `key: value` lines"
        )
    handler = config.get("handler") or {}
    if not isinstance(handler, Mapping):
        raise SettingsError(
            f"handler: expected a mapping, found {type(handler).__name__} ({handler!r}); "
            "write the settings under `handler: ts_handlers:`"
        )
    _warn_of_misspelt_sections(config, handler)
    section = handler.get("ts_handlers")
    section = {} if section is None else section
    if isinstance(section, Mapping) and "compile" in section:
        raise SettingsError(
            f"{SECTION}.compile: unknown key; arguments of torch.compile stand in TorchServe's own section, "
            "`pt2: {compile: {enable: true, ...}}`"
        )
    if isinstance(section, Mapping):
        section = without_removed(section, SECTION)
    settings: Settings = read_section(section, Settings, SECTION)
    compile_section = _compile_section(config)
    if compile_section is not None:
        compile_settings = read_section(compile_section, CompileSettings, PT2_SECTION)
        settings = apply_compile(settings, compile_settings, section)
    validate(settings)
    validate_models(settings)
    return settings


def _warn_of_misspelt_sections(config: Mapping[str, Any], handler: Mapping[str, Any]) -> None:
    """Both levels belong to TorchServe and to handlers, so what stands there is not refused."""
    places = {"": config, "handler.": handler}
    places |= {f"{name}.": value for name, value in config.items() if name != "handler" and isinstance(value, Mapping)}
    for place, mapping in places.items():
        for name in mapping:
            if f"{place}{name}" != SECTION and _is_like(str(name), "ts_handlers"):
                logger.warning(
                    "model-config.yaml: the section %.100s is not read; settings of ts_handlers stand in %s",
                    *(f"{place}{name}", SECTION),
                )


def _is_like(name: str, wanted: str) -> bool:
    plain = re.sub(r"[^a-z]", "", name.lower())
    wanted = wanted.replace("_", "")
    return plain[:2] == wanted[:2] and bool(difflib.get_close_matches(plain, [wanted], n=1, cutoff=0.85))


def _compile_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    pt2 = config.get("pt2")
    if pt2 is None:
        return None
    if isinstance(pt2, str):  # TorchServe's deprecated short form: `pt2: inductor`
        return {"backend": pt2}
    if not isinstance(pt2, Mapping):
        raise SettingsError(
            f"pt2: expected a mapping, found {type(pt2).__name__} ({pt2!r}); "
            "write `pt2: {compile: {enable: true, backend: inductor}}`"
        )
    if "export" in pt2 and "compile" not in pt2:
        return None
    section = pt2.get("compile", pt2)
    if not isinstance(section, Mapping):
        raise SettingsError(
            f"{PT2_SECTION}: expected a mapping, found {type(section).__name__} ({section!r}); "
            "write `{enable: true, backend: inductor}`"
        )
    return section


def read_section(section: Any, kind: Any, root: str) -> Any:
    """Convert a section of model-config.yaml to a struct, strictly.

    Parameters
    ----------
    section:
        What YAML has read.
    kind:
        A `msgspec.Struct` that forbids unknown fields.
    root:
        The section's path in the file, for messages.

    Raises
    ------
    SettingsError
        An unknown key or a value of another type, with its path, the value and the remedy.
    """
    try:
        return convert(section, kind)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error), section, kind, root)) from None
    except UnicodeEncodeError as error:
        raise SettingsError(f"{root}: {error.object!r} holds half of a surrogate pair, which is no text") from None


_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")
_AT = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)


def _explain(message: str, section: Any, kind: Any, root: str) -> str:
    """Turn msgspec's message into one with the YAML path, the value and the remedy."""
    match = _AT.match(message)
    assert match is not None
    what, path = match["what"], (match["path"] or "$")
    value, steps, kind, hint = _follow(section, kind, path)
    where = root + steps
    unknown = _UNKNOWN.match(what)
    if unknown is None:
        choices = _choices(hint)
        remedy = f"expected one of {', '.join(choices)}" if choices else "see docs/settings.md"
        return f"{where}: {what} (value: {_shown(value, where)}); {remedy}"
    field = unknown["field"]
    found = value.get(field) if isinstance(value, Mapping) else None
    known = _field_names(kind)
    close = difflib.get_close_matches(field, known, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"{where}.{field}: unknown key (value: {_shown(found, where)}); {remedy}"


def _shown(value: Any, where: str) -> str:
    """A value for a message; what stands below ``remote`` or ``redis`` may be a password."""
    secret = where.startswith((f"{SECTION}.remote", f"{SECTION}.result_cache.redis"))
    return f"a {type(value).__name__}, not shown" if secret else repr(value)


def _struct_in(hint: Any) -> Any:
    """The struct that a field's type holds, directly or inside a tuple, a mapping or an alternative; or None."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    return next((found for part in typing.get_args(hint) if (found := _struct_in(part)) is not None), None)


def _follow(section: Any, kind: Any, path: str) -> tuple[Any, str, Any, Any]:
    """Walk msgspec's path: the value there, its YAML path, the struct around it and the field's type."""
    value, steps, hint = section, "", None
    for name, index in re.findall(r"\.([A-Za-z_]\w*)|\[(\d+|\.\.\.)\]", path):
        if name:
            hint = typing.get_type_hints(kind).get(name)
            kind = _struct_in(hint) or kind
        key: Any = name or (_misfit(value, kind) if index == "..." else int(index))
        steps += f"[{key}]" if isinstance(key, int) else f".{key}"
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            break
    return value, steps, kind, hint


def _misfit(mapping: Mapping[str, Any], kind: Any) -> str:
    """The first key of a mapping whose value is at fault; msgspec does not say which one it is."""
    for key, value in mapping.items():
        try:
            convert(value, kind)
        except (msgspec.ValidationError, UnicodeEncodeError):
            return str(key)
    return "..."


def _choices(hint: Any) -> list[str]:
    """Every value that the literal types inside a type hint allow."""
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]


def _field_names(kind: Any) -> list[str]:
    return [name for name in kind.__struct_fields__ if not (kind is Settings and name == "compile")]
