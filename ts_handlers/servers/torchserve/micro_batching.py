"""TorchServe's micro-batching: parts of a batch pass preprocess, inference and postprocess in threads of their own.

Configured as in TorchServe's own example, in model-config.yaml::

    micro_batching:
      micro_batch_size: 1
      parallelism: {preprocess: 2, inference: 2, postprocess: 2}

The setting is TorchServe's, the threads are our own: in TorchServe's (`ts.handler_utils.micro_batching`) an exception
ends a thread, after which the worker waits for ever, and a part changes threads at each phase.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from ts_handlers.errors import BusyError, SettingsError
from ts_handlers.servers.torchserve.request_batch import REFUSALS, CurrentBatch, RequestBatch

logger = logging.getLogger(__name__)

SECTION = "micro_batching"
PHASES = ("preprocess", "inference", "postprocess")


class MicroBatches:
    """Answers batches part by part.

    A thread takes a part through all phases, so that it does not wait for another thread between them; of a phase, no
    more parts are under way than the parallelism says. There are as many threads as all phases allow together; a batch
    of one part is answered by the calling thread.

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
        Parts in each phase at once, 1 where it says nothing.
    """

    def __init__(
        self, handler: Any, current: CurrentBatch, device: torch.device, size: int, parallelism: dict[str, int]
    ) -> None:
        self._handler = handler
        self._current = current
        self._device = device
        self._size = size
        self._places = {phase: _places(parallelism.get(phase, 1)) for phase in PHASES}
        self._waiting: SimpleQueue[_Part] = SimpleQueue()
        for number in range(sum(parallelism.get(phase, 1) for phase in PHASES)):
            threading.Thread(target=self._work, name=f"micro-batch-{number}", daemon=True).start()

    def answer(self, batch: RequestBatch, one_by_one: Callable[[RequestBatch], list[Any]]) -> list[Any]:
        """Answers of all requests, in order; a part that is refused is handed to `one_by_one`.

        Raises
        ------
        Exception
            Any other failure of a part, when all parts are done.
        """
        done: SimpleQueue[None] = SimpleQueue()
        starts = range(0, len(batch.rows), self._size)
        left = itertools.count(len(starts) - 1, -1)
        parts = [
            _Part(batch, start, min(start + self._size, len(batch.rows)), one_by_one, left, done) for start in starts
        ]
        if len(parts) == 1:
            self._run(parts[0])
        else:
            for part in parts:
                self._waiting.put(part)
        done.get()
        failures = [part.failure for part in parts if part.failure is not None]
        if failures:
            for part in parts:
                part.failure = None  # its traceback holds the part, and so the answers of all
            try:
                raise failures[0]
            finally:
                failures.clear()
        return [answer for part in parts for answer in part.answers]

    def _work(self) -> None:
        if self._device.type == "cuda" and self._device.index is not None:
            torch.cuda.set_device(self._device)
        while True:
            self._run(self._waiting.get())

    def _run(self, part: _Part) -> None:
        try:
            part.answers = self._answer(part)
        except BaseException as error:
            part.failure = error
        if next(part.left) == 0:
            part.done.put(None)

    def _answer(self, part: _Part) -> list[Any]:
        requests = part.batch.select(part.start, part.stop)
        count = len(requests.rows)
        value: Any = requests.rows
        try:
            for phase in PHASES:
                places = self._places[phase]
                place = places.get()
                try:
                    with self._current.use(requests):
                        value = getattr(self._handler, phase)(value)
                finally:
                    places.put(place)
        except REFUSALS as error:
            alone = count == 1 or isinstance(error, BusyError)  # each would wait as long again
            return list(requests.refuse(error)) if alone else part.one_by_one(requests)
        if not isinstance(value, list) or len(value) != count:
            raise RuntimeError(f"postprocess: expected a list of {count} answers, found {_summary(value)}")
        return value


@dataclasses.dataclass(eq=False)
class _Part:
    """Some requests of a batch and what became of them; who counts `left` down to 0 says that all are done."""

    batch: RequestBatch
    start: int
    stop: int
    one_by_one: Callable[[RequestBatch], list[Any]]
    left: Iterator[int]
    done: SimpleQueue[None]
    answers: list[Any] = dataclasses.field(default_factory=list)
    failure: BaseException | None = None


def _places(count: int) -> SimpleQueue[None]:
    """As many tokens as threads may be in a phase at once."""
    places: SimpleQueue[None] = SimpleQueue()
    for _ in range(count):
        places.put(None)
    return places


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
