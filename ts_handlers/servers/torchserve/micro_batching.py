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
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

import msgspec
import torch

from ts_handlers.errors import BusyError, SettingsError
from ts_handlers.servers.torchserve.request_batch import CurrentBatch, RequestBatch
from ts_handlers.settings.parsing import read_section
from ts_handlers.settings.sections import ContextSettings

logger = logging.getLogger(__name__)

SECTION = "micro_batching"
PHASES = ("preprocess", "inference", "postprocess")


class Parallelism(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many parts of batches may be in each phase at once."""

    preprocess: int = 1
    inference: int = 1
    postprocess: int = 1


class MicroBatchingSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TorchServe's section ``micro_batching``; `micro_batch_size` is the number of requests in a part."""

    micro_batch_size: int = 1
    parallelism: Parallelism = Parallelism()


def read_micro_batching(config: Mapping[str, Any]) -> MicroBatchingSettings | None:
    """TorchServe's section ``micro_batching`` of a parsed model-config.yaml, or None when there is none.

    Raises
    ------
    SettingsError
        An unknown key, or a number that is none or less than 1.

    Examples
    --------
    >>> section = read_micro_batching({"micro_batching": {"micro_batch_size": 2, "parallelism": {"inference": 4}}})
    >>> section.micro_batch_size, section.parallelism.inference, section.parallelism.preprocess
    (2, 4, 1)
    """
    section = config.get(SECTION)
    if section is None:
        return None
    if isinstance(section, Mapping) and not section.get("parallelism", True):  # `parallelism:` with nothing below it
        section = {key: value for key, value in section.items() if key != "parallelism"}
    settings: MicroBatchingSettings = read_section(section, MicroBatchingSettings, SECTION)
    counts = {f"parallelism.{phase}": getattr(settings.parallelism, phase) for phase in PHASES}
    for name, count in {"micro_batch_size": settings.micro_batch_size, **counts}.items():
        if count < 1:
            raise SettingsError(f"{SECTION}.{name}: expected a whole number from 1, found {count}")
    return settings


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
    settings:
        Requests in a part, and parts in each phase at once.
    """

    def __init__(
        self, handler: Any, current: CurrentBatch, device: torch.device, settings: MicroBatchingSettings
    ) -> None:
        self._handler = handler
        self._current = current
        self._device = device
        self._size = settings.micro_batch_size
        counts = {phase: getattr(settings.parallelism, phase) for phase in PHASES}
        self._places = {phase: _places(count) for phase, count in counts.items()}
        self._waiting: SimpleQueue[_Part] = SimpleQueue()
        for number in range(sum(counts.values())):
            threading.Thread(target=self._work, name=f"micro-batch-{number}", daemon=True).start()

    def answer(self, batch: RequestBatch, one_by_one: Callable[[RequestBatch], list[Any]]) -> list[Any]:
        """Answers of all requests, in order; a part that fails is handed to `one_by_one`, a request that fails refused.

        Raises
        ------
        Exception
            What a batch of one request has failed with, unless it is a refusal.
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
        requests = part.batch.select(range(part.start, part.stop))
        count = len(requests.rows)
        attempt = requests.copied()
        value: Any = attempt.rows
        try:
            for phase in PHASES:
                places = self._places[phase]
                place = places.get()
                try:
                    with self._current.use(attempt):
                        value = getattr(self._handler, phase)(value)
                finally:
                    places.put(place)
        except Exception as error:
            if not part.batch.can_be_split:
                return requests.refuse_or_raise(error)
            # Behind one that found no context each would wait as long again.
            if count == 1 or isinstance(error, BusyError) or not requests.can_be_repeated:
                return list(requests.refuse(error))
            return part.one_by_one(requests)
        if requests.has_answers(value):
            return list(value)
        wrong = RuntimeError(f"postprocess: expected a list of {count} answers, found {_summary(value)}")
        if not part.batch.can_be_split:
            raise wrong
        return part.one_by_one(requests) if requests.can_be_repeated else requests.refuse(wrong)


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


def check_contexts(threads: int, contexts: int) -> None:
    """Warn when the inference threads and the execution contexts do not match."""
    if threads != contexts:
        logger.warning(
            "micro_batching.parallelism.inference is %d and handler.ts_handlers.contexts.count is %d: %s; set both to "
            "the same number",
            threads,
            contexts,
            "inference threads will wait for contexts" if threads > contexts else "some contexts will never be used",
        )


def micro_batches_of(
    handler: Any, current: CurrentBatch, config: Mapping[str, Any], contexts: ContextSettings
) -> MicroBatches | None:
    """What answers a handler's batches by parts; None without TorchServe's section.

    Parameters
    ----------
    handler, current:
        See `MicroBatches`.
    config:
        The parsed model-config.yaml.
    contexts:
        How many calls of the model run at once.
    """
    section = read_micro_batching(config)
    if section is None:
        return None
    if not contexts.across_workers:
        check_contexts(section.parallelism.inference, contexts.count)
    return MicroBatches(handler, current, torch.device(getattr(handler, "device", None) or "cpu"), section)
