"""Checks of the section `result_cache`."""

from __future__ import annotations

import math
import re
from urllib.parse import urlsplit

from ts_handlers.errors import SettingsError
from ts_handlers.settings.model import SECTION, Settings
from ts_handlers.settings.quantities import parse_bytes, parse_seconds
from ts_handlers.settings.undeclared import LONGEST_SECONDS

LEAST_BYTES = 64 * 1024
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NEVER = {"cache-control": "which decides for each request whether the cache is used"}


def check_result_cache(settings: Settings) -> None:
    """Check the section `result_cache` by itself; what it asks of a handler is found out when that has started."""
    results = settings.result_cache
    if results is None:
        return
    where = f"{SECTION}.result_cache"
    size = _parsed(parse_bytes, results.max_bytes, f"{where}.max_bytes")
    if size < LEAST_BYTES:
        raise SettingsError(
            f"{where}.max_bytes: expected at least {LEAST_BYTES} bytes, found {results.max_bytes!r}; remove the "
            "section to keep no answers"
        )
    _check_seconds(results.ttl, f"{where}.ttl", "it is how long an answer is kept")
    if not (math.isfinite(results.wait_seconds) and 0 <= results.wait_seconds <= LONGEST_SECONDS):
        raise SettingsError(
            f"{where}.wait_seconds: expected seconds from 0 to {LONGEST_SECONDS}, found {results.wait_seconds}; with 0 "
            "no request waits for an equal one"
        )
    for index, name in enumerate(results.headers):
        if _TOKEN.fullmatch(name) is None or name.lower() in _NEVER:
            reason = _NEVER.get(name.lower(), "such as X-Language")
            raise SettingsError(f"{where}.headers[{index}]: expected the name of a header, found {name!r}, {reason}")
    if results.headers and results.on == "tensors":
        raise SettingsError(
            f"{where}.headers: {list(results.headers)} shape no tensors; remove headers, or set on: request"
        )
    if results.redis is not None:
        _check_redis(settings, where)


def _check_redis(settings: Settings, where: str) -> None:
    results = settings.result_cache
    assert results is not None
    assert results.redis is not None
    if results.on == "tensors":
        raise SettingsError(f"{where}.redis: keeps answers to requests, and on is 'tensors'; set on: request")
    parts = urlsplit(results.redis.url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise SettingsError(
            f"{where}.redis.url: expected a URL such as redis://host:6379/0, found one of the scheme {parts.scheme!r}"
        )
    _check_seconds(results.redis.timeout, f"{where}.redis.timeout", "a request waits for the server so long at most")


def _check_seconds(value: float | str, where: str, meaning: str) -> None:
    seconds = _parsed(parse_seconds, value, where)
    if not 0 < seconds <= LONGEST_SECONDS:
        raise SettingsError(
            f"{where}: expected a duration above 0 and up to {LONGEST_SECONDS} s, found {value!r}; {meaning}"
        )


def _parsed(parse, value, where: str) -> float:  # type: ignore[no-untyped-def]
    try:
        return float(parse(value))
    except (ValueError, OverflowError) as error:
        raise SettingsError(f"{where}: {error}") from None
