"""The handler's section of model-config.yaml, as frozen settings.

Two sections are read: TorchServe's own ``pt2: {compile: {...}}`` (backend, mode, options, dynamic, fullgraph) and
ours, ``handler: {ts_handlers: {...}}``. Both are validated strictly: an unknown key, a wrong type or an impossible
combination is a `SettingsError` that names the key's path, the value found and the remedy.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ts_handlers.errors import SettingsError

BACKENDS = ("aot_inductor", "inductor", "eager")
DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
SECTION = "handler.ts_handlers"
PT2_SECTION = "pt2.compile"

BackendName = Literal["aot_inductor", "inductor", "eager"]
DtypeName = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input tensor of the model.

    `shape` holds integers (static sizes) and names of `Settings.dimensions` (dynamic sizes). `values` is the
    half-open range ``[low, high)`` from which warm-up and canary inputs are drawn: integers default to ``[0, 2)``,
    floating-point inputs to a standard normal distribution.
    """

    name: str
    dtype: DtypeName
    shape: tuple[int | str, ...]
    values: tuple[float, float] | None = None


class Dimension(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The inclusive range of one dynamic dimension, in elements."""

    min: int
    max: int


class CanarySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an artifact is compared with the eager model before it is served.

    `tolerance` is the largest accepted relative error (norm of the difference over norm of the eager output);
    None takes the one that fits the output's dtype (see `ts_handlers.warmup.TOLERANCES`). `seed` draws the input.
    """

    tolerance: float | None = None
    seed: int = 0


class CompileSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TorchServe's ``pt2: {compile: ...}`` section: the arguments of `torch.compile`."""

    enable: bool = True
    backend: str = "inductor"
    mode: str | None = None
    options: dict[str, str | int | float | bool] = msgspec.field(default_factory=dict)
    dynamic: bool | None = None
    fullgraph: bool = False


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a user can set; see docs/settings.md for the same list in prose.

    Attributes
    ----------
    store:
        Root of the artifact store; None takes ``TS_HANDLERS_CACHE``, then ``$XDG_CACHE_HOME/ts_handlers``.
    backends:
        The ladder, best first. A backend that fails falls to the next one, with its reason counted.
    on_miss:
        ``compile`` blocks until built, ``fail`` makes a miss an error, ``eager`` serves eagerly.
    strict:
        Raise instead of falling to the next backend.
    inputs, dimensions:
        The model's input signature. Requests outside it are refused, see `outside`.
    outside:
        What happens to a request outside the declared ranges: ``refuse`` (HTTP 400) or ``eager`` (right but slow;
        the eager model is built at the first such request).
    warmup:
        Sizes to run before READY, one mapping of dimension name to size per run. The first one is also the size
        that the compiler optimises for.
    dtype:
        Floating-point dtype to which the model is cast after loading; None keeps the model's own.
    mmap:
        Map the weights file instead of reading it. ``auto`` maps files that TorchServe extracted for itself and
        reads files that somebody else may overwrite in place (``no-archive`` folders).
    key_files_ignored:
        Glob patterns of archive files that do not change the compiled model, beside the built-in list.
    """

    store: str | None = None
    backends: tuple[BackendName, ...] = BACKENDS  # type: ignore[assignment]
    on_miss: Literal["compile", "fail", "eager"] = "compile"
    strict: bool = False
    inputs: tuple[InputSpec, ...] = ()
    dimensions: dict[str, Dimension] = msgspec.field(default_factory=dict)
    outside: Literal["refuse", "eager"] = "refuse"
    warmup: tuple[dict[str, int], ...] = ()
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    mmap: Literal["auto", "always", "never"] = "auto"
    key_files_ignored: tuple[str, ...] = ()
    canary: CanarySettings = CanarySettings()
    compile: CompileSettings = CompileSettings()


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
    section = handler.get("ts_handlers")
    section = {} if section is None else section
    if isinstance(section, Mapping) and "compile" in section:
        raise SettingsError(
            f"{SECTION}.compile: unknown key; arguments of torch.compile stand in TorchServe's own section, "
            "`pt2: {compile: {enable: true, ...}}`"
        )
    settings: Settings = _convert(section, Settings, SECTION)
    compile_section = _compile_section(config)
    if compile_section is not None:
        compile_settings = _convert(compile_section, CompileSettings, PT2_SECTION)
        explicit = isinstance(section, Mapping) and "backends" in section
        settings = _with_compile(settings, compile_settings, explicit)
    _validate(settings)
    return settings


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


def _with_compile(settings: Settings, compile_settings: CompileSettings, explicit: bool) -> Settings:
    if explicit and not compile_settings.enable and settings.backends != ("eager",):
        raise SettingsError(
            f"{PT2_SECTION}.enable: false contradicts {SECTION}.backends: {list(settings.backends)}; remove one of them"
        )
    if not explicit:
        if not compile_settings.enable:
            return msgspec.structs.replace(settings, compile=compile_settings, backends=("eager",))
        ladders: dict[str, tuple[BackendName, ...]] = {"inductor": ("inductor", "eager"), "eager": ("eager",)}
        if compile_settings.backend not in ladders:
            raise SettingsError(
                f"{PT2_SECTION}.backend: {compile_settings.backend!r} has no persistent artifact; expected one of "
                f"{', '.join(ladders)}, or name the ladder in {SECTION}.backends"
            )
        return msgspec.structs.replace(settings, compile=compile_settings, backends=ladders[compile_settings.backend])
    return msgspec.structs.replace(settings, compile=compile_settings)


def _convert(section: Any, kind: Any, root: str) -> Any:
    try:
        return msgspec.convert(section, kind)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error), section, kind, root)) from None


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
        return f"{where}: {what} (value: {value!r}); {remedy}"
    field = unknown["field"]
    found = value.get(field) if isinstance(value, Mapping) else None
    known = _field_names(kind)
    close = difflib.get_close_matches(field, known, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"{where}.{field}: unknown key (value: {found!r}); {remedy}"


_PARTS = {"inputs": InputSpec, "dimensions": Dimension, "canary": CanarySettings}


def _follow(section: Any, kind: Any, path: str) -> tuple[Any, str, Any, Any]:
    """Walk msgspec's path: the value there, its YAML path, the struct around it and the field's type."""
    value, steps, hint = section, "", None
    for name, index in re.findall(r"\.([A-Za-z_]\w*)|\[(\d+|\.\.\.)\]", path):
        if name:
            hint = typing.get_type_hints(kind).get(name)
            kind = _PARTS.get(name, kind) if kind is Settings else kind
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
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            return str(key)
    return "..."


def _choices(hint: Any) -> list[str]:
    """Every value that the literal types inside a type hint allow."""
    if typing.get_origin(hint) is Literal:
        return [str(value) for value in typing.get_args(hint)]
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]


def _field_names(kind: Any) -> list[str]:
    return [name for name in kind.__struct_fields__ if not (kind is Settings and name == "compile")]


def _validate(settings: Settings) -> None:
    if not settings.backends:
        raise SettingsError(f"{SECTION}.backends: the list is empty; name at least one of {', '.join(BACKENDS)}")
    if len(set(settings.backends)) != len(settings.backends):
        raise SettingsError(f"{SECTION}.backends: {list(settings.backends)} names a backend twice; remove one")
    if "eager" in settings.backends[:-1]:
        raise SettingsError(
            f"{SECTION}.backends: 'eager' always works, so what follows it in {list(settings.backends)} is never "
            "reached; put it last"
        )
    if settings.on_miss == "eager" and settings.strict:
        raise SettingsError(
            f"{SECTION}.on_miss: 'eager' falls back on a miss and {SECTION}.strict: true forbids falling back; "
            "set on_miss: fail, or strict: false"
        )
    tolerance = settings.canary.tolerance
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise SettingsError(
            f"{SECTION}.canary.tolerance: expected a relative error of at least 0, found {tolerance}; "
            "remove it to take the one that fits the dtype"
        )
    if settings.compile.mode is not None and settings.compile.options:
        raise SettingsError(
            f"{PT2_SECTION}: torch.compile takes either mode ({settings.compile.mode!r}) or options "
            f"({settings.compile.options!r}), not both; keep one"
        )
    for name, dimension in settings.dimensions.items():
        where = f"{SECTION}.dimensions.{name}"
        if dimension.min < 1:
            raise SettingsError(f"{where}.min: expected at least 1, found {dimension.min}; empty inputs are refused")
        if dimension.max < dimension.min:
            raise SettingsError(
                f"{where}: min {dimension.min} is above max {dimension.max}; swap them or widen the range"
            )
    _validate_inputs(settings)
    used = {size for spec in settings.inputs for size in spec.shape if isinstance(size, str)}
    for index, sizes in enumerate(settings.warmup):
        for name, size in sizes.items():
            where = f"{SECTION}.warmup[{index}].{name}"
            if name not in settings.dimensions:
                raise SettingsError(
                    f"{where}: unknown dimension (value: {size}); declared are {sorted(settings.dimensions)}"
                )
            dimension = settings.dimensions[name]
            if not dimension.min <= size <= dimension.max:
                raise SettingsError(
                    f"{where}: {size} is outside {dimension.min}..{dimension.max}; "
                    f"widen {SECTION}.dimensions.{name} or change the warm-up size"
                )
    for name in settings.dimensions:
        if name not in used:
            raise SettingsError(
                f"{SECTION}.dimensions.{name}: no input uses this dimension; name it in a shape or remove it"
            )


def _validate_inputs(settings: Settings) -> None:
    names = [spec.name for spec in settings.inputs]
    for index, spec in enumerate(settings.inputs):
        where = f"{SECTION}.inputs[{index}]"
        if names.count(spec.name) > 1:
            raise SettingsError(f"{where}.name: {spec.name!r} is declared twice; names must differ")
        if not spec.name.isidentifier():
            raise SettingsError(f"{where}.name: {spec.name!r} is not a Python identifier; use the argument's name")
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and size not in settings.dimensions:
                raise SettingsError(
                    f"{where}.shape[{axis}]: dimension {size!r} is not declared; "
                    f"add `{size}: {{min: 1, max: ...}}` under {SECTION}.dimensions"
                )
            if isinstance(size, int) and size < 1:
                raise SettingsError(f"{where}.shape[{axis}]: expected a size of at least 1, found {size}")
        if spec.values is not None and not _has_values(spec.dtype, *spec.values):
            raise SettingsError(
                f"{where}.values: {list(spec.values)} holds no {spec.dtype}; expected [low, high) with low below high"
            )


def _has_values(dtype: str, low: float, high: float) -> bool:
    if not (math.isfinite(low) and math.isfinite(high)):
        return False
    return low < high if "float" in dtype else int(low) < int(high)


def default_store_root(environ: Mapping[str, str] = os.environ) -> str:
    """The store's root when no setting names one.

    ``TS_HANDLERS_CACHE``, then ``$XDG_CACHE_HOME/ts_handlers``, then ``~/.cache/ts_handlers``; a uid without a home
    folder gets a folder of its own in the temporary directory.
    """
    if environ.get("TS_HANDLERS_CACHE"):
        return environ["TS_HANDLERS_CACHE"]
    if environ.get("XDG_CACHE_HOME"):
        return os.path.join(environ["XDG_CACHE_HOME"], "ts_handlers")
    home = environ.get("HOME", "")
    if not home:
        expanded = os.path.expanduser("~")  # the passwd entry, if there is one; unchanged otherwise
        home = expanded if os.path.isabs(expanded) else ""
    if home and home != "/" and os.access(home, os.W_OK | os.X_OK):
        return os.path.join(home, ".cache", "ts_handlers")
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"ts_handlers-{os.getuid()}")
