"""A batch of requests: its state from preprocess to postprocess, its parts, and how a request is refused.

TorchServe hands a handler a batch. It may be answered in parts, by several threads
(`ts_handlers.servers.torchserve.micro_batching`) or one request at a time when one of them is bad. Whatever belongs to
a part stands in its `RequestBatch`, which goes with it from thread to thread.
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import types
from collections.abc import Iterator
from typing import Any

from ts_handlers.errors import BusyError, InputError

REFUSALS = (InputError, BusyError)
"""Errors that are an answer to a request."""

_STATUS = {InputError: (400, "Bad Request"), BusyError: (503, "Service Unavailable")}


class RequestBatch:
    """Some requests of one batch.

    Parameters
    ----------
    rows:
        The requests as TorchServe gives them.
    context:
        TorchServe's context of exactly these requests; see `select`.

    Attributes
    ----------
    state:
        A namespace for the handler's own per-batch values.
    """

    def __init__(self, rows: Any, context: Any) -> None:
        self.rows = rows
        self.context = context
        self.state = types.SimpleNamespace()

    def select(self, start: int, stop: int) -> RequestBatch:
        """The requests ``start`` to ``stop - 1``, with a context in which the first one has index 0.

        Answers' statuses and headers set through that context reach TorchServe: the objects behind it are the same.
        """
        context = copy.copy(self.context)
        if getattr(self.context, "request_processor", None) is not None:
            context.request_processor = self.context.request_processor[start:stop]
        if getattr(self.context, "request_ids", None) is not None:
            ids = self.context.request_ids
            context.request_ids = {i - start: ids[i] for i in range(start, stop) if i in ids}
        return RequestBatch(self.rows[start:stop], context)

    def split(self) -> list[RequestBatch]:
        """One batch for each request."""
        return [self.select(index, index + 1) for index in range(len(self.rows))]

    def refuse(self, error: Exception) -> list[str]:
        """Refuse every request of this batch; returns their answers."""
        return [self._refuse(index, error) for index in range(1 if self.rows is None else len(self.rows))]

    def _refuse(self, index: int, error: Exception) -> str:
        kind = next(kind for kind in _STATUS if isinstance(error, kind))
        code, phrase = _STATUS[kind]
        self.context.set_response_status(code, phrase, index)
        self.context.set_response_header(index, "content-type", "application/json")
        return json.dumps({"code": code, "type": kind.__name__, "message": str(error)})


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
            yield batch
        finally:
            self.batch = before
