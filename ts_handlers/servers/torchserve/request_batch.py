"""A batch of requests: its state from preprocess to postprocess, its parts, and how a request is refused.

TorchServe hands a handler a batch. It may be answered in parts, by several threads
(`ts_handlers.servers.torchserve.micro_batching`) or one request at a time when one of them is bad. Whatever belongs to
a part stands in its `RequestBatch`, which goes with it from thread to thread.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ts_handlers.errors import BusyError, InputError
from ts_handlers.metrics import refusals_counted_by_server
from ts_handlers.servers.torchserve.failures import (
    as_prediction_exception,
    is_loggable,
    log_text,
    refusal,
    status_of,
)

logger = logging.getLogger(__name__)

REFUSALS = (InputError, BusyError)
"""Errors that are an answer to a request."""
STATEFUL = ("sequenceBatching", "continuousBatching")
"""Settings of TorchServe with which handlers keep a state from request to request."""
_STREAMS = "ts_stream_next"
"""The header that TorchServe sets on an answer of which it has sent a part."""


class Meter(Protocol):
    """Counts requests that fail; `ts_handlers.servers.torchserve.metrics.RequestMeter` is one."""

    def failed(self, error: Exception, requests: int) -> None:
        """Clients see as many requests fail with this error."""


class RequestBatch:
    """Some requests of one batch.

    Parameters
    ----------
    rows:
        The requests as TorchServe gives them.
    context:
        TorchServe's context of exactly these requests; see `select`.
    meter:
        Is told of each request that a client sees fail.

    Attributes
    ----------
    state:
        A namespace for the handler's own per-batch values.
    """

    def __init__(self, rows: Any, context: Any, meter: Meter | None = None) -> None:
        self.rows = rows
        self.context = context
        self.meter = meter
        self.state = types.SimpleNamespace()

    def select(self, indexes: Sequence[int]) -> RequestBatch:
        """The requests of these indexes, with a context in which the first one has index 0.

        Answers' statuses and headers set through that context reach TorchServe: the objects behind it are the same.
        """
        context = copy.copy(self.context)
        processors = getattr(self.context, "request_processor", None)
        if self._is_inside_envelope and (processors is None or len(processors) != len(self.rows)):
            return RequestBatch([self.rows[index] for index in indexes], context, self.meter)
        if processors is not None:
            context.request_processor = [processors[index] for index in indexes]
        ids = getattr(self.context, "request_ids", None)
        if ids is not None:
            part = getattr(ids, "of", None)  # of those that note who reads them
            own = {new: ids[old] for new, old in enumerate(indexes) if old in ids} if part is None else part(indexes)
            context.request_ids = own
        return RequestBatch([self.rows[index] for index in indexes], context, self.meter)

    def split(self) -> list[RequestBatch]:
        """One batch for each request."""
        return [self.select([index]) for index in range(len(self.rows))]

    def copied(self) -> RequestBatch:
        """The same requests, whose dicts may be changed without harm to a second attempt."""
        if not self.can_be_split:
            return self
        return RequestBatch([dict(row) if type(row) is dict else row for row in self.rows], self.context, self.meter)

    def inside_envelope(self) -> RequestBatch:
        """The same requests for a handler behind an envelope: its rows need not be the requests of the context."""
        everything = range(len(self.rows or ()))
        inside = self.select(everything) if self.rows else RequestBatch(self.rows, copy.copy(self.context), self.meter)
        inside.context.inside_envelope = True
        return inside

    @property
    def can_be_split(self) -> bool:
        """Whether it holds several requests, each with a context of its own."""
        return self.rows is not None and len(self.rows) > 1 and not self._is_inside_envelope and not self._continues

    @property
    def _continues(self) -> bool:
        """Whether TorchServe asks the context, after the batch, for each request's criterion to stop."""
        config = getattr(self.context, "model_yaml_config", None) or {}
        return bool(config.get("continuousBatching"))

    @property
    def can_be_repeated(self) -> bool:
        """Whether its requests may be answered a second time, one by one, after the batch has failed.

        Not where the handler keeps a state from request to request (``sequenceBatching``, ``continuousBatching``),
        which has changed by then, and not where a part of an answer has been sent already
        (`ts.handler_utils.utils.send_intermediate_predict_response`).
        """
        if not self.can_be_split:
            return False
        config = getattr(self.context, "model_yaml_config", None) or {}
        if any(config.get(name) for name in STATEFUL):
            return False
        processors = getattr(self.context, "request_processor", None) or ()
        return not any(each.get_response_headers().get(_STREAMS) for each in processors)

    @property
    def _is_inside_envelope(self) -> bool:
        return getattr(self.context, "inside_envelope", False)

    @property
    def _is_one_of_grpc(self) -> bool:
        """Whether it is one request that came over gRPC: TorchServe gives it no headers but those of its inputs."""
        processors = getattr(self.context, "request_processor", None) or []
        if len(processors) != 1 or self.rows is None or len(self.rows) != 1:
            return False
        headers = getattr(processors[0], "unwatched", processors[0]).get_request_properties()
        return bool(headers) and all(isinstance(value, dict) for value in headers.values())

    def asks_alone(self, index: int) -> bool:
        """Whether a request asks for something else than a prediction: TorchServe's describe, or an explanation."""
        return self.is_describe(index) or _header(self.context, index, "explain") == "True"

    def is_describe(self, index: int = 0) -> bool:
        """Whether a request comes from the management API's describe, and not from a client that sends its header.

        TorchServe marks it by the header ``describe: True``, which a prediction may carry too. A describe has no
        parameters. A prediction has a body among them, unless its content type is that of a form without fields.
        """
        if _header(self.context, index, "describe") != "True" or not isinstance(self.rows, (list, tuple)):
            return False
        row = self.rows[index] if index < len(self.rows) else None
        if row is not None and row != {}:
            return False
        kind = str(_header(self.context, index, "content-type")).strip().lower()
        return not kind.startswith(("multipart/", "application/x-www-form-urlencoded"))

    def has_answers(self, answers: Any) -> bool:
        """Whether `answers` is a list with one answer for each request, and TorchServe can send each text in it."""
        right = isinstance(answers, list) and (self.rows is None or len(answers) == len(self.rows))
        return right and all(map(can_be_sent, answers))

    def refuse(self, error: Exception) -> list[str]:
        """Answer every request of this batch with an error, as TorchServe would answer a batch of one; their answers.

        Bodies are shorter than 1 KiB. An error that is no answer to a request is logged, with a bounded text.
        """
        if not isinstance(error, REFUSALS):
            logger.warning("a request has failed, and was answered alone:\n%s", log_text(error))
        return [self._refuse(index, error) for index in range(1 if self.rows is None else len(self.rows))]

    def refuse_or_raise(self, error: Exception) -> list[str]:
        """As `refuse` for what the client is told; anything else is raised, for TorchServe to log and answer.

        An error whose text a request has made long, or has filled with control characters, is answered here instead.
        Behind an envelope all errors are raised. A single request that came over gRPC is refused by an error, too: a
        status that a handler sets for one request is lost there, and the client would take the refusal for an answer.
        """
        if isinstance(error, REFUSALS) and self._is_one_of_grpc and not self._is_inside_envelope:
            self._tell(error)
            raise as_prediction_exception(error) from None
        if not self._is_inside_envelope and (isinstance(error, REFUSALS) or not is_loggable(error)):
            return self.refuse(error)
        if not self._is_inside_envelope:
            self._tell(error, 1 if self.rows is None else len(self.rows))
        raise error

    def _tell(self, error: Exception, requests: int = 1) -> None:
        if self.meter is not None:
            self.meter.failed(error, requests)

    def _refuse(self, index: int, error: Exception) -> str:
        self._tell(error)
        code, phrase = status_of(error)
        self.context.set_response_status(code, phrase, index)
        if getattr(self.context, "request_processor", None) is not None:
            self.context.set_response_header(index, "content-type", "application/json")
        return refusal(error)


def can_be_sent(answer: Any) -> bool:
    """Whether a text has no surrogate, as JSON may bring one: TorchServe would end the worker that answers with it."""
    if isinstance(answer, str):
        try:
            answer.encode()
        except UnicodeEncodeError:
            return False
    return True


def _header(context: Any, index: int, name: str) -> str | None:
    """A header of a request, whatever case its name was sent in; the exact name first."""
    processors = getattr(context, "request_processor", None)
    if processors is None or index >= len(processors):
        return None
    headers = getattr(processors[index], "unwatched", processors[index]).get_request_properties()
    if name in headers:
        return headers[name]  # type: ignore[no-any-return]
    return next((value for key, value in headers.items() if key.lower() == name), None)


class CurrentBatch(threading.local):
    """The batch that the running thread works on.

    `without` is the state of calls that belong to no batch, as when a test calls `preprocess` by itself.
    """

    def __init__(self) -> None:
        self.batch: RequestBatch | None = None
        self.without = types.SimpleNamespace()

    @property
    def state(self) -> types.SimpleNamespace:
        """The current batch's namespace."""
        return self.without if self.batch is None else self.batch.state

    @contextlib.contextmanager
    def use(self, batch: RequestBatch) -> Iterator[RequestBatch]:
        """Make `batch` the current one inside the block."""
        before, self.batch = self.batch, batch
        try:
            with refusals_counted_by_server():
                yield batch
        finally:
            self.batch = before
