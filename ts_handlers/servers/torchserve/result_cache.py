"""Whether a handler's answers may be kept, and the cache that keeps them.

A cache that cannot be had never fails a start: the reason is logged once, and `describe` shows it.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from ts_handlers.backends.compare import TOLERANCES
from ts_handlers.compiled_model import CompiledModel, ServedModel
from ts_handlers.errors import one_line
from ts_handlers.key.digests import digest_file
from ts_handlers.model.archive import files_of_model
from ts_handlers.model.changes import source_of
from ts_handlers.result_cache.attach import attach_to_calls, new_cache
from ts_handlers.result_cache.base import SharedTier
from ts_handlers.result_cache.proof import reason_against
from ts_handlers.servers.torchserve.answering import Below
from ts_handlers.servers.torchserve.request_batch import STATEFUL
from ts_handlers.servers.torchserve.request_results import RequestResults
from ts_handlers.settings import Settings, default_store_root
from ts_handlers.settings.quantities import parse_bytes, parse_seconds
from ts_handlers.settings.sections import ResultCacheSettings
from ts_handlers.store.local.layout import REMOTE
from ts_handlers.version import __version__

logger = logging.getLogger(__name__)

_SHAPE_NO_ANSWERS = (
    *("store", "on_miss", "strict", "observe", "warmup", "mmap", "verify", "canary", "guard", "background", "remote"),
    *("trust", "space", "contexts", "result_cache"),
)
"""Settings that an answer does not depend on, beside those whose artifacts' keys tell them apart."""
_NOT_READ = ("MAR-INF/*", "*.pyc", "*.log", "core.[0-9]*", "__pycache__/*", "*/__pycache__/*")


class HandlerResults:
    """The result cache of a handler.

    Parameters
    ----------
    on:
        What is looked at: requests, or the model's calls, whose cache is the model's own.
    cached:
        The cache of requests, or why there is no cache; None for calls.
    """

    def __init__(self, on: str, cached: RequestResults | str | None) -> None:
        self._on = on
        self._cached = cached

    def around(self, together: Below, below: Below) -> Below:
        """As of `RequestResults.around`; `together` itself where requests are not looked at."""
        return self._cached.around(together, below) if isinstance(self._cached, RequestResults) else together

    def describe(self, of_model: Any) -> dict[str, Any]:
        """What it holds, or why there is none; `of_model` is what the model says of its own. JSON-compatible."""
        if isinstance(self._cached, RequestResults):
            return self._cached.describe()
        if isinstance(self._cached, str) or of_model is None:
            return {"on": self._on, "reason": self._cached or "see notes"}
        return dict(of_model)


def settings_of_start(settings: Settings, config: Mapping[str, Any]) -> Settings:
    """The settings with which a model is started: without the cache where the handler keeps a state."""
    stateful = any(config.get(name) for name in STATEFUL)
    return msgspec.structs.replace(settings, result_cache=None) if stateful else settings


def results_of(
    handler: Any,
    handle_below: Any,
    model: ServedModel | None,
    settings: Settings,
    config: Mapping[str, Any],
    context: Any,
) -> HandlerResults | None:
    """The result cache of a handler whose model is ready; None where the settings have no section ``result_cache``.

    Parameters
    ----------
    handler, handle_below:
        A handler with the mixin, and the method `handle` of the class behind that; None where a class in front of the
        mixin has one of its own.
    model:
        What it serves, None when that is nothing of ours.
    settings, config, context:
        Its settings, the parsed model-config.yaml and TorchServe's context.
    """
    wanted = settings.result_cache
    if wanted is None:
        return None
    cached: RequestResults | str | None
    try:
        cached = _reason_against_handler(handler, handle_below, model, settings, wanted, config)
        if cached is None:
            assert model is not None
            cached = _cached(handler, model, settings, wanted, context)
    except Exception as error:
        logger.debug("details", exc_info=error)
        cached = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(cached, str):
        name = "model" if model is None else source_of(model).name
        logger.warning("%s: answers are not kept (result_cache): %s", name, cached)
    return HandlerResults(wanted.on, cached)


def _cached(
    handler: Any, model: ServedModel, settings: Settings, wanted: ResultCacheSettings, context: Any
) -> RequestResults | str | None:
    if wanted.on == "tensors":
        if isinstance(model, CompiledModel):  # otherwise in the process that runs it, see `ts_handlers.model_process`
            attach_to_calls(model, settings)
        return None
    tolerance = settings.canary.tolerance
    reason = reason_against(model, declared=wanted.deterministic, tolerance=tolerance)
    if reason is not None:
        return reason
    facts = _facts(handler, model, settings, wanted, context)
    cache = new_cache(wanted, model, _shared(wanted, settings, model))
    limit = TOLERANCES[torch.float32] if tolerance is None else tolerance
    return RequestResults(source_of(model).name, model, cache, facts, wanted, limit)


def _reason_against_handler(
    handler: Any,
    handle_below: Any,
    model: ServedModel | None,
    settings: Settings,
    wanted: ResultCacheSettings,
    config: Mapping[str, Any],
) -> str | None:
    """Why answers of this kind of handler cannot be kept, or None."""
    if settings.models:
        return "modules below the handler are compiled by themselves (models), which this cache does not know"
    if model is None:
        return "the handler's model is served as it is, so nobody knows when it changes"
    stateful = [name for name in STATEFUL if config.get(name)]
    if stateful:
        return f"with {' and '.join(stateful)} an answer depends on earlier requests"
    if wanted.on == "tensors":
        return None
    if any(map(inspect.iscoroutinefunction, (handler.handle, handle_below))):
        return "the handler's handle is asynchronous, so that its answers are not there yet; set on: tensors"
    if handle_below is None:
        return (
            "a class in front of the mixin has a handle of its own, and what that reads of a request is not seen; put "
            "the mixin first, or set on: tensors"
        )
    if not isinstance(model, CompiledModel):
        if settings.outside == "eager":
            return (
                "with across_workers a worker does not see which answers are eager's (outside: eager); set on: tensors"
            )
        if settings.on_miss == "background":
            return "with across_workers a worker does not see the swap (on_miss: background); set on: tensors"
    return None


def _shared(wanted: ResultCacheSettings, settings: Settings, model: ServedModel) -> SharedTier | None:
    """The tier that hosts share; None where there is none, or where its package is missing, which is logged."""
    if wanted.redis is None:
        return None
    from ts_handlers.result_cache.redis_tier import RedisTier
    from ts_handlers.store.remote.base import UnusableError

    root = Path(settings.store or default_store_root()).expanduser()
    timeout, ttl = parse_seconds(wanted.redis.timeout), parse_seconds(wanted.ttl)
    state = root / REMOTE if root.is_dir() else None
    try:
        return RedisTier(wanted.redis.url, timeout, ttl, parse_bytes(wanted.max_bytes), model.metrics.count, state)
    except UnusableError as error:
        logger.warning("%s: answers are kept here and shared with no other host: %s", source_of(model).name, error)
        return None


def _facts(
    handler: Any, model: ServedModel, settings: Settings, wanted: ResultCacheSettings, context: Any
) -> list[tuple[str, str]]:
    """Who answers: names and values of all that shapes an answer beside the request and the artifact."""
    source = source_of(model)
    shaping = {name: getattr(settings, name) for name in settings.__struct_fields__ if name not in _SHAPE_NO_ANSWERS}
    directory = Path(context.system_properties.get("model_dir") or ".")
    weights = context.manifest["model"].get("serializedFile") or ""
    facts = [
        ("package", __version__),
        ("python", sys.version),
        ("model", source.name),
        ("handler", f"{type(handler).__module__}.{type(handler).__qualname__}"),
        ("weights", source.weights_digest()),
        ("settings", msgspec.json.encode(shaping, order="deterministic").decode()),
        ("files", _digest_of_files(directory, Path(weights).name)),
        *_handler_files(handler, directory),
    ]
    if wanted.redis is not None:  # other hosts may have other packages
        facts.append(("distributions", _distributions()))
    return facts


def _digest_of_files(directory: Path, weights: str) -> str:
    """Of handler, vocabularies, labels: all files of the archive but the weights, which have a digest of their own."""
    digest = hashlib.sha256()
    for path in files_of_model(directory, (*_NOT_READ, *([weights] if weights else []))):
        digest.update(f"{path.relative_to(directory).as_posix()}\0{digest_file(path)}\0".encode())
    return digest.hexdigest()


def _handler_files(handler: Any, directory: Path) -> list[tuple[str, str]]:
    """The files of the handler's classes that lie outside of the archive."""
    found = []
    for kind in type(handler).__mro__:
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if file and not Path(file).resolve().is_relative_to(directory.resolve()) and Path(file).is_file():
            found.append((f"class {kind.__qualname__}", digest_file(file)))
    return found


def _distributions() -> str:
    """Names and versions of all that is installed."""
    import importlib.metadata

    return "\n".join(sorted(f"{each.name}=={each.version}" for each in importlib.metadata.distributions()))
