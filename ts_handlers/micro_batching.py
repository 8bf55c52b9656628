"""TorchServe's micro-batching: parts of a batch pass preprocess, inference and postprocess in threads of their own.

Configured as in TorchServe's own example, in model-config.yaml::

    micro_batching:
      micro_batch_size: 1
      parallelism: {preprocess: 2, inference: 2, postprocess: 2}

The threads are TorchServe's (`ts.handler_utils.micro_batching`). What they call is `_Phases`, which never raises: an
exception in one of those threads ends it, and the worker then waits for ever.
"""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ts_handlers.errors import SettingsError
from ts_handlers.request_batch import REFUSALS, CurrentBatch, RequestBatch

logger = logging.getLogger(__name__)

SECTION = "micro_batching"
PHASES = ("preprocess", "inference", "postprocess")


class MicroBatches:
    """Answers batches part by part.

    Parameters
    ----------
    handler:
        Its `preprocess`, `inference` and `postprocess` are called, in threads.
    current:
        Where the threads say which requests they work on.
    device:
        Where the model runs; CUDA's current device is one for each thread.
    size:
        Requests in a part.
    parallelism:
        Threads of each phase, 1 where it says nothing.
    """

    def __init__(
        self, handler: Any, current: CurrentBatch, device: torch.device, size: int, parallelism: dict[str, int]
    ) -> None:
        phases = _Phases(handler, current, device)
        made: list[Any] = []

        def make() -> None:
            from ts.handler_utils.micro_batching import MicroBatching

            made.append(MicroBatching(phases, size, dict(parallelism)))

        # Its threads inherit `daemon` from the thread that starts them; otherwise they would keep the worker alive.
        starter = threading.Thread(target=make, daemon=True)
        starter.start()
        starter.join()
        self._threads = made[0]

    def answer(self, batch: RequestBatch, one_by_one: Callable[[RequestBatch], list[Any]]) -> list[Any]:
        """Answers of all requests, in order; a part that is refused is handed to `one_by_one`.

        Raises
        ------
        Exception
            Any other failure of a part, when all parts are done.
        """
        parts = [_Part(batch, index, one_by_one) for index in range(len(batch.rows))]
        answers = self._threads.handle(parts)
        for answer in answers:
            if isinstance(answer, _Failure):
                raise answer.error
        return answers  # type: ignore[no-any-return]


class _Part:
    """One request of a batch, and afterwards the micro-batch that it opens."""

    def __init__(self, batch: RequestBatch, index: int, one_by_one: Callable[[RequestBatch], list[Any]]) -> None:
        self.batch = batch
        self.index = index
        self.one_by_one = one_by_one


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _MicroBatch:
    """What goes from thread to thread: the requests with their state, and what the last phase made of them."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        first = parts[0]
        self.one_by_one = first.one_by_one
        self.requests = first.batch.select(first.index, first.index + len(parts))
        self.value: Any = self.requests.rows
        self.answers: list[Any] | None = None


class _Phases:
    """The handler as TorchServe's micro-batching calls it."""

    def __init__(self, handler: Any, current: CurrentBatch, device: torch.device) -> None:
        self._handler = handler
        self._device = device
        self._current = current

    def preprocess(self, parts: Sequence[_Part]) -> _MicroBatch:
        return self._run("preprocess", _MicroBatch(parts))

    def inference(self, batch: _MicroBatch) -> _MicroBatch:
        return self._run("inference", batch)

    def postprocess(self, batch: _MicroBatch) -> list[Any]:
        batch = self._run("postprocess", batch)
        if batch.answers is not None:
            return batch.answers
        count = len(batch.requests.rows)
        if not isinstance(batch.value, list) or len(batch.value) != count:
            return [
                _Failure(
                    RuntimeError(f"postprocess: expected a list of {count} answers, found {_summary(batch.value)}")
                )
            ] * count
        return batch.value

    def _run(self, phase: str, batch: _MicroBatch) -> _MicroBatch:
        if batch.answers is not None:
            return batch
        try:
            if self._device.type == "cuda" and self._device.index is not None:
                torch.cuda.set_device(self._device)
            with self._current.use(batch.requests):
                batch.value = getattr(self._handler, phase)(batch.value)
        except REFUSALS as error:
            batch.answers = self._refused(batch, error)
        except BaseException as error:
            batch.answers = [_Failure(error)] * len(batch.requests.rows)
        return batch

    def _refused(self, batch: _MicroBatch, error: Exception) -> list[Any]:
        if len(batch.requests.rows) == 1:
            return list(batch.requests.refuse(error))
        try:
            return batch.one_by_one(batch.requests)
        except BaseException as failure:
            return [_Failure(failure)] * len(batch.requests.rows)


def _summary(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else f"a {type(value).__name__}"


def read_section(config: dict[str, Any]) -> tuple[int, dict[str, int]] | None:
    """TorchServe's section ``micro_batching``: (size, threads by phase), or None when there is none.

    Raises
    ------
    SettingsError
        An unknown key, or a number that is none or less than 1.

    Examples
    --------
    >>> read_section({"micro_batching": {"micro_batch_size": 2, "parallelism": {"inference": 4}}})
    (2, {'inference': 4})
    """
    section = config.get(SECTION)
    if section is None:
        return None
    section = _mapping(SECTION, section, ("micro_batch_size", "parallelism"))
    parallelism = _mapping(f"{SECTION}.parallelism", section.get("parallelism") or {}, PHASES)
    size = _count(f"{SECTION}.micro_batch_size", section.get("micro_batch_size", 1))
    return size, {phase: _count(f"{SECTION}.parallelism.{phase}", count) for phase, count in parallelism.items()}


def _mapping(name: str, value: Any, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{name}: expected a mapping with {', '.join(known)}, found {type(value).__name__}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise SettingsError(f"{name}.{key}: unknown key{hint}")
    return value


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"{name}: expected a whole number from 1, found {value!r}")
    return value


def check_contexts(parallelism: dict[str, int], contexts: int) -> None:
    """Warn when the inference threads and the execution contexts do not match."""
    threads = parallelism.get("inference", 1)
    if threads != contexts:
        logger.warning(
            "micro_batching.parallelism.inference is %d and handler.ts_handlers.contexts.count is %d: %s; set both to "
            "the same number",
            threads,
            contexts,
            "inference threads will wait for contexts" if threads > contexts else "some contexts will never be used",
        )
