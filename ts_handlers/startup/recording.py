"""Records how a start goes and ends, where this process records anything."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ts_handlers.compiled_model import CompiledModel
from ts_handlers.metrics import Metrics
from ts_handlers.monitoring.recorder import recorder_of

Model = TypeVar("Model", bound=CompiledModel)


@contextlib.contextmanager
def recorded_start(name: str | None, metrics: Metrics) -> Iterator[Callable[[Model], Model]]:
    """Record the start that goes on inside the block; what it gives is called with the model, and returns it.

    Parameters
    ----------
    name:
        The model's name, None for a start that is not to be recorded.
    """
    recorder = None if name is None else recorder_of(name)
    if recorder is None:
        yield lambda model: model
        return
    began = time.perf_counter()
    metrics.recorder = recorder
    recorder.begin()

    def ended(model: Model) -> Model:
        seconds = time.perf_counter() - began + metrics.phases_ms.get("process", 0.0) / 1000
        recorder.started(model.outcome, metrics, seconds)
        beside = None if model.background is None else model.background.describe()
        if beside is not None and beside["state"] in ("waiting", "building", "loading"):
            phase = "wait" if beside["state"] == "waiting" else beside["phase"] or "build"
            recorder.builds_beside(phase, beside["estimate_s"])
        return model

    try:
        yield ended
    except BaseException as error:
        recorder.failed(error)
        raise
