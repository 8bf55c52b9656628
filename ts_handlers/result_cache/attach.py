"""A model's calls get a result cache, in the process that runs the model: a worker, or one that all workers share."""

from __future__ import annotations

import dataclasses
import logging

from ts_handlers.compiled_model import CompiledModel, ServedModel
from ts_handlers.errors import one_line
from ts_handlers.model.changes import source_of
from ts_handlers.result_cache.base import SharedTier
from ts_handlers.result_cache.cache import ResultCache
from ts_handlers.result_cache.keys import identity
from ts_handlers.result_cache.proof import reason_against
from ts_handlers.result_cache.tensors import TensorResults
from ts_handlers.settings import Settings
from ts_handlers.settings.quantities import parse_bytes, parse_seconds
from ts_handlers.settings.sections import ResultCacheSettings
from ts_handlers.version import __version__

logger = logging.getLogger(__name__)


def new_cache(wanted: ResultCacheSettings, model: ServedModel, shared: SharedTier | None = None) -> ResultCache:
    """A cache as the settings ask for it, whose counters are the model's."""
    size, ttl = parse_bytes(wanted.max_bytes), parse_seconds(wanted.ttl)
    return ResultCache(size, ttl, wanted.wait_seconds, model.metrics.count, shared)


def attach_to_calls(model: ServedModel, settings: Settings) -> str | None:
    """Have the model's calls answered from a cache, where the settings ask for ``on: tensors``; never raises.

    Returns
    -------
    Why they are not, None where they are or nobody asks for it. The reason is logged, and `describe` has it as a note.
    """
    wanted = settings.result_cache
    if wanted is None or wanted.on != "tensors":
        return None
    try:
        reason = _attach(model, settings, wanted)
    except Exception as error:
        logger.debug("details", exc_info=error)
        reason = f"{type(error).__name__}: {one_line(error)}"
    if reason is not None:
        note = f"answers are not kept (result_cache): {reason}"
        logger.warning("%s: %s", source_of(model).name, note)
        model.outcome = dataclasses.replace(model.outcome, notes=(*model.outcome.notes, note))
    return reason


def _attach(model: ServedModel, settings: Settings, wanted: ResultCacheSettings) -> str | None:
    if not model.signature.inputs:
        return "on: tensors needs declared inputs, and there are none; declare inputs, or set on: request"
    reason = reason_against(model, declared=wanted.deterministic, tolerance=settings.canary.tolerance)
    if reason is not None:
        return reason
    assert isinstance(model, CompiledModel)
    facts = [("package", __version__), ("model", source_of(model).name), ("weights", source_of(model).weights_digest())]
    TensorResults(model, new_cache(wanted, model), identity(facts)).attach()
    return None
