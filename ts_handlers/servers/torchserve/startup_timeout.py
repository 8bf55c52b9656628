"""A warning when a build nearly takes as long as TorchServe waits for a worker."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ts_handlers.metrics import Metrics
from ts_handlers.settings import DEFAULT_STARTUP_TIMEOUT_SECONDS

logger = logging.getLogger(__name__)


def warn_of_startup_timeout(config: Mapping[str, Any], metrics: Metrics) -> None:
    """Log what to set when building has taken most of ``startupTimeout``.

    Parameters
    ----------
    config:
        The parsed model-config.yaml.
    metrics:
        Those of the start.
    """
    limit = config.get("startupTimeout", DEFAULT_STARTUP_TIMEOUT_SECONDS)
    took = sum(metrics.build_ms.values()) / 1000
    if isinstance(limit, (int, float)) and took > 0.8 * limit:
        logger.warning(
            "building took %.0f s of the %s s that TorchServe waits for a worker (startupTimeout); set "
            "startupTimeout: %d in model-config.yaml",
            *(took, limit, int(took * 3) + 60),
        )
