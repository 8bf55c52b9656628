"""Combinations of settings that the types alone do not rule out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from ts_handlers.errors import SettingsError
from ts_handlers.settings.dtypes import INTEGERS, VALUES
from ts_handlers.settings.model import PT2_SECTION, SECTION, InputSpec, Settings
from ts_handlers.settings.quantities import parse_bytes
from ts_handlers.settings.registry import backend_location, backend_names
from ts_handlers.settings.results import check_result_cache
from ts_handlers.settings.sections import Quota
from ts_handlers.settings.undeclared import LONGEST_SECONDS, check_observe, check_samples
from ts_handlers.settings.values import column_limits, values_to_draw, whole_limits

_LARGEST_MB = 2**30
MAX_CONTEXTS = 1024


def validate(settings: Settings) -> None:
    """Raise `SettingsError` with the path of the first setting that cannot stand beside the others."""
    for check in CHECKS:
        check(settings)


def _check_backends(settings: Settings) -> None:
    if not settings.backends:
        raise SettingsError(f"{SECTION}.backends: the list is empty; name at least one of {', '.join(backend_names())}")
    for index, name in enumerate(settings.backends):
        if backend_location(name) is None:
            raise SettingsError(
                f"{SECTION}.backends[{index}]: no backend has this name (value: {name!r}); expected one of "
                f"{', '.join(backend_names())}"
            )
    if len(set(settings.backends)) != len(settings.backends):
        raise SettingsError(f"{SECTION}.backends: {list(settings.backends)} names a backend twice; remove one")
    if "eager" in settings.backends[:-1]:
        raise SettingsError(
            f"{SECTION}.backends: 'eager' always works, so what follows it in {list(settings.backends)} is never "
            "reached; put it last"
        )


def _check_on_miss(settings: Settings) -> None:
    if settings.on_miss == "eager" and settings.strict:
        raise SettingsError(
            f"{SECTION}.on_miss: 'eager' falls back on a miss and {SECTION}.strict: true forbids falling back; "
            "set on_miss: fail, or strict: false"
        )


def _check_key(settings: Settings) -> None:
    for index, name in enumerate(settings.key_environment):
        if not name or "=" in name or "\0" in name:
            raise SettingsError(
                f"{SECTION}.key_environment[{index}]: expected the name of an environment variable, found {name!r}"
            )
    for index, path in enumerate(settings.key_files):
        if not path or "\0" in path:
            raise SettingsError(f"{SECTION}.key_files[{index}]: expected the path of a file or folder, found {path!r}")


def _check_background(settings: Settings) -> None:
    if settings.on_miss == "background" and settings.strict:
        raise SettingsError(
            f"{SECTION}.on_miss: 'background' serves eagerly until the build has ended, and {SECTION}.strict: true "
            "forbids falling back; set on_miss: compile, or strict: false"
        )
    where, limits = f"{SECTION}.background", settings.background
    if not 0 <= limits.nice <= 19:
        raise SettingsError(f"{where}.nice: expected 0 to 19, found {limits.nice}; 19 disturbs requests least")
    largest = {"compile_threads": 1024, "memory_mb": _LARGEST_MB, "seconds": LONGEST_SECONDS}
    for name, most in largest.items():
        value = getattr(limits, name)
        if value is not None and not 0 < value <= most:
            raise SettingsError(
                f"{where}.{name}: expected a number above 0 and up to {most}, found {value}; remove it for the default"
            )


def _check_canary(settings: Settings) -> None:
    tolerance = settings.canary.tolerance
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise SettingsError(
            f"{SECTION}.canary.tolerance: expected a relative error of at least 0, found {tolerance}; "
            "remove it to take the one that fits the dtype"
        )


def _check_guard(settings: Settings) -> None:
    seconds, megabytes = settings.guard.load_seconds, settings.guard.load_memory_mb
    if isinstance(seconds, (int, float)) and not 0 < seconds <= LONGEST_SECONDS:
        raise SettingsError(
            f"{SECTION}.guard.load_seconds: expected seconds above 0 and up to {LONGEST_SECONDS}, found {seconds}; "
            "write null for no limit, or 'auto'"
        )
    if megabytes is not None and not 0 < megabytes <= _LARGEST_MB:
        raise SettingsError(
            f"{SECTION}.guard.load_memory_mb: expected MiB from 1 to {_LARGEST_MB}, found {megabytes}; "
            "write null for no bound"
        )


def _check_compile(settings: Settings) -> None:
    if settings.compile.mode is not None and settings.compile.options:
        raise SettingsError(
            f"{PT2_SECTION}: torch.compile takes either mode ({settings.compile.mode!r}) or options "
            f"({settings.compile.options!r}), not both; keep one"
        )


def _check_remote(settings: Settings) -> None:
    remote = settings.remote
    if remote is None:
        return
    where = f"{SECTION}.remote"
    parts = urlsplit(remote.url)
    if not (os.path.isabs(remote.url) or (parts.scheme and (parts.netloc or os.path.isabs(parts.path)))):
        raise SettingsError(
            f"{where}.url: expected an absolute folder or a URL such as file:///mnt/artifacts or s3://bucket/prefix, "
            f"found {_shown(remote.url)!r}"
        )
    if remote.lease not in ("auto", "off") and urlsplit(remote.lease).scheme not in ("redis", "rediss", "unix"):
        raise SettingsError(
            f"{where}.lease: expected auto, off or a URL such as redis://host:6379/0, found {_shown(remote.lease)!r}"
        )
    for name in ("timeout_seconds", "heartbeat_seconds"):
        value = getattr(remote, name)
        if not (math.isfinite(value) and value > 0):
            raise SettingsError(f"{where}.{name}: expected seconds above 0, found {value}")


def _shown(url: str) -> str:
    """A wrong URL without what may be a password in it."""
    return f"***@{url.rpartition('@')[2]}" if "@" in url else url


def _check_trust(settings: Settings) -> None:
    trust = settings.trust
    if trust.public_keys == ():
        raise SettingsError(
            f"{SECTION}.trust.public_keys: expected at least one PEM file, found an empty list; name the keys that you "
            "trust, or leave public_keys out to accept what nobody has signed"
        )
    paths = {f"public_keys[{index}]": path for index, path in enumerate(trust.public_keys or ())}
    if trust.signing_key is not None:
        paths["signing_key"] = trust.signing_key
    for name, path in paths.items():
        if not os.path.isfile(os.path.expanduser(path)):
            raise SettingsError(f"{SECTION}.trust.{name}: expected the path of a PEM file, found no file at {path}")
    for index, path in enumerate(trust.folders):
        if not os.path.isabs(path):
            raise SettingsError(f"{SECTION}.trust.folders[{index}]: expected an absolute path, found {path!r}")


def _check_dimensions(settings: Settings) -> None:
    for name, dimension in settings.dimensions.items():
        where = f"{SECTION}.dimensions.{name}"
        if dimension.min < 1:
            raise SettingsError(f"{where}.min: expected at least 1, found {dimension.min}; empty inputs are refused")
        if dimension.max < dimension.min:
            raise SettingsError(
                f"{where}: min {dimension.min} is above max {dimension.max}; swap them or widen the range"
            )


def _check_contexts(settings: Settings) -> None:
    if not 1 <= settings.contexts.count <= MAX_CONTEXTS:
        raise SettingsError(
            f"{SECTION}.contexts.count: expected 1 to {MAX_CONTEXTS}, found {settings.contexts.count}; it is how many "
            "calls run at once"
        )
    wait = settings.contexts.wait_seconds
    if not (math.isfinite(wait) and wait >= 0):
        raise SettingsError(
            f"{SECTION}.contexts.wait_seconds: expected seconds from 0, found {wait}; a call that waits longer gets "
            "HTTP 503"
        )
    for name, least in (("silent_seconds", 2.0), ("call_seconds", 1.0)):
        found = getattr(settings.contexts, name)
        if not (math.isfinite(found) and found >= least):
            raise SettingsError(
                f"{SECTION}.contexts.{name}: expected seconds from {least:g}, found {found}; it says when the model's "
                "process is taken to hang"
            )
    if settings.contexts.across_workers and not hasattr(os, "memfd_create"):
        raise SettingsError(
            f"{SECTION}.contexts.across_workers: needs Linux, whose shared memory carries tensors between processes; "
            "remove it here"
        )


def _check_space(settings: Settings) -> None:
    _check_quota(f"{SECTION}.space.store", settings.space.store)
    _check_quota(f"{SECTION}.space.per_model", settings.space.per_model)


def _check_quota(where: str, quota: Quota) -> None:
    if quota.bytes is not None:
        try:
            parse_bytes(quota.bytes)
        except ValueError as error:
            raise SettingsError(f"{where}.bytes: {error}") from error
    for name, limit in (("entries", quota.entries), ("inodes", quota.inodes)):
        if limit is not None and limit < 0:
            raise SettingsError(f"{where}.{name}: expected at least 0, found {limit}; remove it for no bound")


def _check_inputs(settings: Settings) -> None:
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
        if spec.values is not None and not _has_values(spec):
            raise SettingsError(
                f"{where}.values: {list(spec.values)} holds no {spec.dtype}; expected [low, high) with low below high"
            )
        _check_limits(where, spec)
        _check_excludes(where, spec)


def _has_values(spec: InputSpec) -> bool:
    if not all(map(math.isfinite, spec.values or ())):
        return False
    drawn = values_to_draw(spec)
    return drawn is None or drawn[0] < drawn[1]


def _check_limits(where: str, spec: InputSpec) -> None:
    columns = column_limits(spec)
    if columns is None:
        if spec.limits is not None:
            _check_one_range(f"{where}.limits", where, spec)
    elif not spec.shape or spec.shape[-1] != len(columns):
        last = spec.shape[-1] if spec.shape else "no dimension"
        raise SettingsError(
            f"{where}.limits: expected one range for each column of the last dimension ({last}), which must be an "
            f"integer, found {len(columns)} ranges; write one range [low, high] for all columns, or complete the list"
        )
    else:
        for index, limits in enumerate(columns):
            column = msgspec.structs.replace(spec, limits=limits)
            _check_one_range(f"{where}.limits[{index}]", where, column)


def _check_one_range(path: str, where: str, spec: InputSpec) -> None:
    found = spec.limits or ()
    bounds = [bound for bound in found if bound is not None]
    numbers = [bound for bound in bounds if not isinstance(bound, tuple)]
    if len(found) != 2 or not bounds or numbers != bounds or not all(map(_is_finite, numbers)):
        raise SettingsError(
            f"{path}: expected two numbers, or a number and null for an open end, or a list of such pairs for the "
            f"columns of the last dimension, found {list(found)}; remove it to accept every value"
        )
    if not _has_values(msgspec.structs.replace(spec, values=None)):
        raise SettingsError(f"{path}: {list(found)} holds no {spec.dtype}; expected [low, high) with low below high")
    low, high = whole_limits(spec) or (None, None)
    if spec.values is not None and (
        (low is not None and spec.values[0] < low) or (high is not None and spec.values[1] > high)
    ):
        raise SettingsError(
            f"{where}.values: {list(spec.values)} is not inside {path} {list(found)}, so that warm-up "
            "would run what a request may not hold; narrow it, or remove it to draw from the limits"
        )


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # integers may be too large for a float


def _check_excludes(where: str, spec: InputSpec) -> None:
    least, most = VALUES[spec.dtype]
    for value in spec.excludes:
        if not (_is_finite(value) and least <= value <= most):
            raise SettingsError(
                f"{where}.excludes: {value} is no value of {spec.dtype}; remove it, infinity and NaN are kept out by "
                "limits"
            )
    for limits in column_limits(spec) or (whole_limits(spec),):
        drawn = values_to_draw(msgspec.structs.replace(spec, limits=limits))
        if spec.dtype not in INTEGERS or drawn is None or drawn[1] - drawn[0] > len(spec.excludes):
            continue
        if all(value in spec.excludes for value in range(int(drawn[0]), int(drawn[1]))):
            raise SettingsError(
                f"{where}.excludes: {list(spec.excludes)} leaves nothing of [{drawn[0]}, {drawn[1]}), from which "
                f"the inputs of warm-up and canary are drawn; widen {where}.values or {where}.limits"
            )


def _check_tensorrt(settings: Settings) -> None:
    section = settings.tensorrt
    where = f"{SECTION}.tensorrt"
    if section.workspace_mb is not None and section.workspace_mb < 1:
        raise SettingsError(
            f"{where}.workspace_mb: expected at least 1 MiB, found {section.workspace_mb}; remove it for the default"
        )
    if section.optimization_level is not None and not 0 <= section.optimization_level <= 5:
        raise SettingsError(f"{where}.optimization_level: expected 0 to 5, found {section.optimization_level}")
    for index, ranges in enumerate(section.ranges):
        for name, sizes in ranges.items():
            path = f"{where}.ranges[{index}].{name}"
            if name not in settings.dimensions:
                raise SettingsError(f"{path}: unknown dimension; declared are {sorted(settings.dimensions)}")
            if not sizes.min <= sizes.opt <= sizes.max:
                raise SettingsError(
                    f"{path}: expected min <= opt <= max, found {sizes.min}, {sizes.opt}, {sizes.max}; reorder them"
                )
            declared = settings.dimensions[name]
            if sizes.min < declared.min or sizes.max > declared.max:
                raise SettingsError(
                    f"{path}: {sizes.min}..{sizes.max} is outside {declared.min}..{declared.max}; "
                    f"widen {SECTION}.dimensions.{name} or narrow the range"
                )


def _check_warmup(settings: Settings) -> None:
    for index, sizes in enumerate(settings.warmup_sizes):
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


def _check_dimensions_are_used(settings: Settings) -> None:
    used = {size for spec in settings.inputs for size in spec.shape if isinstance(size, str)}
    for name in settings.dimensions:
        if name not in used:
            raise SettingsError(
                f"{SECTION}.dimensions.{name}: no input uses this dimension; name it in a shape or remove it"
            )


CHECKS: tuple[Callable[[Settings], None], ...] = (
    _check_backends,
    _check_on_miss,
    _check_key,
    _check_background,
    check_samples,
    check_observe,
    _check_canary,
    _check_guard,
    _check_compile,
    _check_remote,
    _check_trust,
    _check_dimensions,
    _check_contexts,
    check_result_cache,
    _check_space,
    _check_inputs,
    _check_tensorrt,
    _check_warmup,
    _check_dimensions_are_used,
)
"""One check for each section, and for each pair that contradict each other, in the order in which they report."""
