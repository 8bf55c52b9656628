"""What follows a model's start in a worker: a warning where it took too long, metrics, and Python's cycle collector."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ts_handlers.compiled_model import ServedModel
from ts_handlers.metrics import Metrics
from ts_handlers.servers.torchserve.metrics import Emitter
from ts_handlers.settings import DEFAULT_STARTUP_TIMEOUT_SECONDS
from ts_handlers.system.cycle_collector import exempt_from_collection

logger = logging.getLogger(__name__)


def begin_serving(models: Sequence[ServedModel], config: Mapping[str, Any], torchserve_metrics: Any) -> list[Emitter]:
    """What follows the start of a worker's models; returns what emits the metrics of each.

    Parameters
    ----------
    models:
        Models that are ready.
    config:
        The parsed model-config.yaml.
    torchserve_metrics:
        TorchServe's metrics cache, None where there is none.
    """
    warn_of_startup_timeout(config, [model.metrics for model in models])
    emitters = [Emitter(model.metrics) for model in models]
    for emitter in emitters:
        emitter.emit(torchserve_metrics)
    exempt_from_collection(any(model.outcome.result == "built" or model.outcome.fallbacks for model in models))
    for model, emitter in zip(models, emitters, strict=True):
        if model.background is not None:
            _when_swapped(model, emitter, torchserve_metrics)
    return emitters


def _when_swapped(model: ServedModel, emitter: Emitter, torchserve_metrics: Any) -> None:
    background: Any = model.background

    def after_swap() -> None:
        emitter.emit(torchserve_metrics)
        background.wait_for_idle_window()  # a full pass holds the interpreter; a call under way holds the eager module
        exempt_from_collection(background.left_module)

    background.when_done(after_swap)


def warn_of_startup_timeout(config: Mapping[str, Any], started: Sequence[Metrics]) -> None:
    """Warn when building takes longer than TorchServe waits for a worker.

    Parameters
    ----------
    config:
        The parsed model-config.yaml.
    started:
        Metrics of all models of the worker.
    """
    limit = config.get("startupTimeout", DEFAULT_STARTUP_TIMEOUT_SECONDS)
    took = sum(sum(metrics.build_ms.values()) for metrics in started) / 1000
    if isinstance(limit, (int, float)) and took > 0.8 * limit:
        logger.warning(
            "building took %.0f s of the %s s that TorchServe waits for a worker (startupTimeout); set "
            "startupTimeout: %d in model-config.yaml",
            *(took, limit, int(took * 3) + 60),
        )
