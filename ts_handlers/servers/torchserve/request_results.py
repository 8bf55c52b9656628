"""``on: request``: answers to TorchServe's requests, kept by body and headers.

A stored answer is right for an equal request only if nothing else has shaped it. So a handler gets its requests inside
`WatchedRequest`, which notes what it reads: an answer for which it has read a header that is no part of the key, or the
request's id, is not stored. And the first answers are computed twice and compared.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ts_handlers.compiled_model import ServedModel, serving_epoch
from ts_handlers.result_cache.base import Answered, Computed, Key
from ts_handlers.result_cache.cache import ResultCache
from ts_handlers.result_cache.epochs import Epochs
from ts_handlers.result_cache.keys import identity, request_key
from ts_handlers.result_cache.replies import Reply, decode_reply, encode_reply
from ts_handlers.servers.torchserve.answering import Below, answer_one_by_one
from ts_handlers.servers.torchserve.request_batch import RequestBatch
from ts_handlers.servers.torchserve.watched_requests import STREAMS, watched
from ts_handlers.settings.sections import ResultCacheSettings

logger = logging.getLogger(__name__)

TRIALS = 2
"""So many answers of each epoch are computed twice."""
_COUNTING_HEADERS = ("content-type", "accept", "describe", "explain")
"""Request headers that are part of every key; the last two are TorchServe's own, and the base handler reads them."""
_MOST_REASONS = 8


class RequestResults:
    """Answers a handler's requests.

    Parameters
    ----------
    name:
        The model's name, for the log.
    model:
        What the handler serves.
    cache:
        Its answers.
    facts:
        Who answers, beside the model's outcome: names and values.
    settings:
        Of the cache.
    tolerance:
        By how much numbers of a model that is declared deterministic may differ, relative to their size.

    Attributes
    ----------
    reason:
        Why nothing is answered from the cache any more; None while it is used.
    """

    def __init__(
        self,
        name: str,
        model: ServedModel,
        cache: ResultCache,
        facts: Sequence[tuple[str, str]],
        settings: ResultCacheSettings,
        tolerance: float,
    ) -> None:
        self.reason: str | None = None
        self._name = name
        self._model = model
        self._cache = cache
        self._facts = tuple(facts)
        self._declared = settings.deterministic
        self._tolerance = tolerance
        self._headers = frozenset((*_COUNTING_HEADERS, *(name.lower() for name in settings.headers)))
        self._epochs = Epochs(model)
        self._lock = threading.Lock()
        self._trials = -1, 0  # of which epoch, and how many are left
        self._prefix: tuple[Any, int, bytes] = None, -1, b""
        self._not_stored: dict[str, int] = {}
        self._own = uuid.uuid4().hex

    def around(self, together: Below, below: Below) -> Below:
        """A function that answers a batch of predictions, from the cache and with `together`.

        Parameters
        ----------
        together:
            Answers a batch, and raises for a batch of one only.
        below:
            Answers one request.
        """
        return lambda batch: self._answer(batch, together, below)

    def describe(self) -> dict[str, Any]:
        """The cache, and which answers were not stored and why; JSON-compatible."""
        with self._lock:
            not_stored = dict(self._not_stored)
        return {"on": "request", "reason": self.reason, **self._cache.describe(), "not_stored": not_stored}

    def _answer(self, batch: RequestBatch, together: Below, below: Below) -> Any:
        if batch.rows and len(batch.rows) == 1 and batch.asks_alone(0):  # in a larger batch nobody does here
            return together(batch)
        asked = _Asked(batch, together, below)
        outcome = self._model.outcome
        epoch = (
            None if self.reason is not None or not asked.can_be_watched else self._epochs.at(serving_epoch(self._model))
        )
        if epoch is None:
            self._model.metrics.count("result_cache_bypass", len(batch.rows or ()))
            answers = together(batch)
            if asked.can_be_watched:
                asked.mark_all("bypass")
            return answers
        prefix = self._prefix_of(outcome, epoch.number, epoch.changed)
        wishes = [_wish(properties) for properties in asked.headers]
        keys = [
            None if wish == "no-store" else self._key(prefix, row, asked.headers[index])
            for index, (row, wish) in enumerate(zip(batch.rows, wishes, strict=True))
        ]
        refresh = {index for index, wish in enumerate(wishes) if wish == "no-cache"}

        def compute(indexes: Sequence[int]) -> list[Computed]:
            return self._compute(asked, indexes, keys, outcome, epoch.number)

        try:
            answered = self._cache.answer(keys, compute, refresh, epoch.number)
        except _NotAList as found:
            return found.answers
        return [asked.deliver(index, each) for index, each in enumerate(answered)]

    def _key(self, prefix: bytes, row: Any, properties: Mapping[str, Any]) -> Key | None:
        counting = [(name, value) for name, value in properties.items() if str(name).lower() in self._headers]
        if not all(isinstance(value, str) for _, value in counting):  # a field of a form with the name of a header
            return None
        return request_key(prefix, row, counting)

    def _prefix_of(self, outcome: Any, number: int, changed: bool) -> bytes:
        with self._lock:
            known, of_number, prefix = self._prefix
            if known is not outcome or of_number != number:
                # What has been changed in this process is no other's: then the number of the epoch tells it apart.
                own = f"{self._own}-{number}" if changed else ""
                facts = (*self._facts, ("backend", outcome.backend), ("artifact", outcome.key or ""), ("changed", own))
                prefix = identity(facts)
                self._prefix = outcome, number, prefix
            return prefix

    def _compute(
        self, asked: _Asked, indexes: Sequence[int], keys: Sequence[Key | None], outcome: Any, epoch: int
    ) -> list[Computed]:
        counters = self._model.metrics.counters
        eager_before = counters["outside_eager"]
        part = watched(asked.batch.select(indexes), self._headers)
        answers = asked.run(part)
        replies = [part.reply(position, answer) for position, answer in enumerate(answers)]
        reasons = [part.reason_not_to_share(position) for position in range(len(replies))]
        if counters["outside_eager"] != eager_before:
            reasons = [reason or "eager answered what is outside of the declared ranges" for reason in reasons]
        if self._model.outcome is not outcome:
            reasons = [reason or "the model was swapped meanwhile" for reason in reasons]
        computed: list[Computed] = []
        for reply, reason, index in zip(replies, reasons, indexes, strict=True):
            stored = encode_reply(reply) if reason is None and keys[index] is not None else None
            if reason is None and stored is None and reply.status == 200 and keys[index] is not None:
                reason = f"a {type(reply.answer).__name__} with something that is no plain data"
            if reason is not None and keys[index] is not None:
                self._note(reason)
            size = None if stored is None else len(stored)
            computed.append(Computed(reply, stored, size, shared=part.can_be_shared(len(computed))))
        if any(part.streams(position) for position in range(len(replies))):
            self._give_up("the handler sends answers in parts")
        elif any(each.size is not None for each in computed) and self._is_on_trial(epoch):
            return self._tried(asked, indexes, computed, epoch)
        return computed

    def _is_on_trial(self, epoch: int) -> bool:
        with self._lock:
            of_epoch, left = self._trials
            left = left if of_epoch == epoch else TRIALS
            self._trials = epoch, max(0, left - 1)
            return left > 0

    def _tried(self, asked: _Asked, indexes: Sequence[int], computed: list[Computed], epoch: int) -> list[Computed]:
        """Answer once more, apart from the client, and compare; gives the cache up where an answer differs."""
        chosen = [position for position, each in enumerate(computed) if each.size is not None]
        part = watched(asked.batch.select([indexes[position] for position in chosen]), self._headers, anew=True)
        try:
            again = [part.reply(position, answer) for position, answer in enumerate(asked.run(part))]
        except Exception as error:
            logger.debug("details", exc_info=error)
            again = []
        if not again or any(reply.status != 200 for reply in again):  # which says nothing: no context came free
            with self._lock:
                self._trials = epoch, self._trials[1] + 1
            return [Computed(each.value, each.stored, None, each.shared) for each in computed]
        for position, reply in zip(chosen, again, strict=True):
            second = encode_reply(reply)
            if second is None or not self._is_equal(computed[position].stored, second):
                hint = "" if self._declared else "; if only last digits vary, declare deterministic: true"
                self._give_up(f"the same request was answered in two ways{hint}")
                return [Computed(each.value, shared=False) for each in computed]
        return computed

    def _is_equal(self, first: bytes, second: bytes) -> bool:
        if first == second:
            return True
        one, other = decode_reply(first), decode_reply(second)
        if not self._declared or one is None or other is None or one.headers != other.headers:
            return False
        return is_close(one.answer, other.answer, self._tolerance)

    def _give_up(self, reason: str) -> None:
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
        self._cache.clear()
        logger.warning("%s: no answers are kept from now on: %s", self._name, reason)

    def _note(self, reason: str) -> None:
        with self._lock:
            first = reason not in self._not_stored
            if first and len(self._not_stored) >= _MOST_REASONS:
                return
            self._not_stored[reason] = self._not_stored.get(reason, 0) + 1
        if first:
            logger.warning("%s: an answer is not kept: %s", self._name, reason)


class _NotAList(Exception):
    """A handler has answered a batch of one with something that TorchServe itself complains about."""

    def __init__(self, answers: Any) -> None:
        super().__init__("no answers")
        self.answers = answers


class _Asked:
    """A batch as it came, and how its answers are delivered."""

    def __init__(self, batch: RequestBatch, together: Below, below: Below) -> None:
        self.batch = batch
        self._together = together
        self._below = below
        self._processors = getattr(batch.context, "request_processor", None)
        rows = batch.rows
        count = len(rows) if isinstance(rows, list) else 0
        self.can_be_watched = (
            count > 0
            and self._processors is not None
            and len(self._processors) == count
            and (count == 1 or batch.can_be_split)
            and not getattr(batch.context, "inside_envelope", False)
        )
        watched_ones = (self._processors or ()) if self.can_be_watched else ()
        self.headers = [each.get_request_properties() for each in watched_ones]

    def run(self, part: RequestBatch) -> list[Any]:
        """Answers of some requests, one for each; raises for a batch of one that came alone."""
        with self._shown(part):
            return self._run(part)

    @contextlib.contextmanager
    def _shown(self, part: RequestBatch) -> Iterator[None]:
        """Show these requests to a handler that has kept TorchServe's context, too: it is the same for all batches."""
        context = self.batch.context
        before = context.request_processor, context.request_ids
        context.request_processor, context.request_ids = part.context.request_processor, part.context.request_ids
        try:
            yield
        finally:
            context.request_processor, context.request_ids = before

    def _run(self, part: RequestBatch) -> list[Any]:
        alone = len(self.batch.rows) == 1
        if len(part.rows) == 1 and not alone:  # its failure is not to be that of its neighbours
            return answer_one_by_one(part, self._below)
        answers = self._together(part)
        if isinstance(answers, list) and len(answers) == len(part.rows):
            return answers
        if alone:
            raise _NotAList(answers)
        return list(part.refuse(RuntimeError(f"expected {len(part.rows)} answers, found a {type(answers).__name__}")))

    def deliver(self, index: int, answered: Answered) -> Any:
        """Set status and headers of a request, and return its answer."""
        context = self.batch.context
        if answered.error is not None:
            part = self.batch.select([index])
            if not isinstance(answered.error, Exception) or not self.batch.can_be_split:
                raise answered.error
            (refused,) = part.refuse(answered.error)
            return refused
        reply = answered.value if isinstance(answered.value, Reply) else decode_reply(answered.value)
        if reply is None:
            raise RuntimeError("a stored answer cannot be read")
        if answered.how in ("hit", "coalesced"):
            for name, value in reply.headers.items():
                context.set_response_header(index, name, value)
            if reply.status != 200 or reply.phrase is not None:
                context.set_response_status(reply.status, reply.phrase or "", index)
        self._mark(index, answered.how)
        if answered.how == "hit":
            context.set_response_header(index, "Age", str(int(answered.age)))
        return reply.answer

    def mark_all(self, how: str) -> None:
        """Tell all clients that the cache had nothing to do with their answers."""
        for index in range(len(self.batch.rows)):
            self._mark(index, how)

    def _mark(self, index: int, how: str) -> None:
        if not self.batch.context.get_response_headers(index).get(STREAMS):  # whose headers have been sent
            self.batch.context.set_response_header(index, "X-Cache", how)


def _wish(properties: Mapping[str, Any]) -> str | None:
    """What a request's ``Cache-Control`` asks for: ``no-store``, ``no-cache`` or nothing that counts here.

    Examples
    --------
    >>> _wish({"Cache-Control": "max-age=0, No-Store"}), _wish({"cache-control": "max-age=0"}), _wish({})
    ('no-store', 'no-cache', None)
    """
    asked = {
        part.strip().lower()
        for name, value in properties.items()
        if str(name).lower() == "cache-control"
        for part in str(value).split(",")
    }
    if "no-store" in asked:
        return "no-store"
    return "no-cache" if asked & {"no-cache", "max-age=0"} else None


def is_close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two answers are the same but for the last digits of their numbers: norm of the difference over norm.

    Examples
    --------
    >>> is_close({"a": [1.0, "x"]}, {"a": [1.0001, "x"]}, 1e-3), is_close([1.0], [1.1], 1e-3), is_close([1], [2], 1.0)
    (True, False, False)
    """
    pairs: list[tuple[float, float]] = []
    if not _is_alike(one, other, pairs):
        return False
    difference = math.sqrt(sum((a - b) ** 2 for a, b in pairs))
    return difference <= tolerance * math.sqrt(sum(a * a for a, _ in pairs))


def _is_alike(one: Any, other: Any, pairs: list[tuple[float, float]]) -> bool:
    """Whether two answers have all in common but floating-point numbers, which are collected."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        if math.isfinite(one) and math.isfinite(other):
            pairs.append((one, other))
            return True
        return repr(one) == repr(other)
    if isinstance(one, list):
        return len(one) == len(other) and all(_is_alike(a, b, pairs) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_is_alike(one[name], other[name], pairs) for name in one)
    return bool(one == other)
