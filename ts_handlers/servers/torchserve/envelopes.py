"""TorchServe's request envelopes (`service_envelope`), which reformat requests before a handler sees them.

An envelope stands around the handler: what it raises for one request would fail the whole batch, and one that joins the
instances of several requests hides from the handler which request is which. So the envelope answers a batch as the
handler does, and what fails inside is answered request by request out here.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from ts_handlers.servers.torchserve.answering import answer, answer_together
from ts_handlers.servers.torchserve.request_batch import RequestBatch

_BASE = "ts.torch_handler.request_envelope.base"


def guard_envelope() -> None:
    """Make the envelope of this worker, if it has one, answer the requests of a batch one by one when that fails."""
    base = sys.modules.get(_BASE)
    envelope: Any = None if base is None else base.BaseEnvelope
    if envelope is None or hasattr(envelope.handle, "__wrapped__"):
        return
    original = envelope.handle

    @functools.wraps(original)
    def handle(self: Any, data: Any, context: Any) -> Any:
        def below(batch: RequestBatch) -> Any:
            if batch.is_describe():  # it has no body to reformat
                return self._handle_fn(batch.rows, batch.context)
            inside = batch.inside_envelope()
            return original(self, inside.rows, inside.context)

        meter = getattr(getattr(self._handle_fn, "__self__", None), "request_meter", None)
        return answer(RequestBatch(data, context, meter), lambda batch: answer_together(batch, below), below)

    envelope.handle = handle
