"""Requests that note what a handler reads of them, so that it shows whether equal ones get equal answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ts_handlers.result_cache.replies import Reply
from ts_handlers.servers.torchserve.request_batch import RequestBatch

STREAMS = "ts_stream_next"
"""The header that TorchServe sets on an answer of which it has sent a part."""
_SHOWN = 60


def watched(batch: RequestBatch, headers: frozenset[str], *, anew: bool = False) -> WatchedBatch:
    """The same requests, watched.

    Parameters
    ----------
    batch:
        Requests with a context of their own, see `RequestBatch.select`.
    headers:
        Names, in lower case, of the headers that may be read.
    anew:
        Keep statuses and headers of the answers here instead of handing them to TorchServe.
    """
    context = batch.context
    context.request_processor = [WatchedRequest(each, headers, anew) for each in context.request_processor]
    ids = getattr(context, "request_ids", None)
    if ids is not None:
        context.request_ids = WatchedIds(ids)
    return WatchedBatch(batch.rows, context)


class WatchedBatch(RequestBatch):
    """A batch of watched requests; its parts are watched, too."""

    def reply(self, position: int, answer: Any) -> Reply:
        """An answer with its status and headers."""
        request = self.context.request_processor[position]
        status = request.get_response_status_code()
        phrase = request.get_response_status_phrase()
        return Reply(answer, 200 if status is None else status, phrase, dict(request.get_response_headers()))

    def streams(self, position: int) -> bool:
        """Whether a part of the answer has been sent already."""
        return bool(self.context.request_processor[position].get_response_headers().get(STREAMS))

    def can_be_shared(self, position: int) -> bool:
        """Whether the answer is right for each request of the same key that waits for it now."""
        request = self.context.request_processor[position]
        return not request.read_elsewhere and not self.streams(position) and not self._ids_read(position)

    def reason_not_to_share(self, position: int) -> str | None:
        """Why it is not, or None."""
        read = self.context.request_processor[position].read_elsewhere
        if read:
            named = sorted(name[:_SHOWN] for name in read)[0]
            return f"the handler reads the header {named!r}; name it in result_cache.headers if it shapes answers"
        if self._ids_read(position):
            return "the handler reads the request's id"
        return "the handler sends answers in parts" if self.streams(position) else None

    def _ids_read(self, position: int) -> bool:
        ids = self.context.request_ids
        return isinstance(ids, WatchedIds) and position in ids.read


class WatchedRequest:
    """TorchServe's `RequestProcessor` with a note of the headers that are read.

    Attributes
    ----------
    read_elsewhere:
        Names of the headers that were read, or would have been if they were there, beside those that may be.
    """

    def __init__(self, request: Any, headers: frozenset[str], anew: bool) -> None:
        self.unwatched = type(request)(request.get_request_properties()) if anew else request
        self.read_elsewhere: set[str] = set()
        self._headers = headers

    def note(self, name: object) -> None:
        """Note that a header is read."""
        if str(name).lower() not in self._headers:
            self.read_elsewhere.add(str(name))

    def get_request_property(self, key: str) -> Any:
        """A header of the request, or None."""
        self.note(key)
        return self.unwatched.get_request_property(key)

    def get_request_properties(self) -> dict[str, Any]:
        """All headers of the request; which of them are read is noted."""
        return WatchedHeaders(self.unwatched.get_request_properties(), self)

    def __getattr__(self, name: str) -> Any:  # all that belongs to the answer
        if name == "unwatched":
            raise AttributeError(name)
        return getattr(self.unwatched, name)


class WatchedHeaders(dict[str, Any]):
    """Headers by name; one that is looked up is noted, and all of them where somebody looks at all."""

    def __init__(self, headers: dict[str, Any], request: WatchedRequest) -> None:
        super().__init__(headers)
        self._request = request

    def __getitem__(self, name: str) -> Any:
        self._request.note(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self._request.note(name)
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        self._request.note(name)
        return super().get(name, default)

    def _all(self) -> None:
        for name in dict.keys(self):
            self._request.note(name)
        self._request.note("any")  # another request may have more of them

    def __iter__(self) -> Iterator[str]:
        self._all()
        return super().__iter__()

    def __len__(self) -> int:
        self._all()
        return super().__len__()

    def keys(self) -> Any:
        """As of a dict."""
        self._all()
        return super().keys()

    def values(self) -> Any:
        """As of a dict."""
        self._all()
        return super().values()

    def items(self) -> Any:
        """As of a dict."""
        self._all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """As of a dict."""
        self._all()
        return dict(super().items())

    def pop(self, name: str, *default: Any) -> Any:
        """As of a dict."""
        self._request.note(name)
        return super().pop(name, *default)

    def __eq__(self, other: object) -> bool:
        self._all()
        return super().__eq__(other)

    def __repr__(self) -> str:
        self._all()
        return super().__repr__()

    __hash__ = None


class WatchedIds(dict[int, str]):
    """The ids of requests by index; `read` has the indexes of those that were read."""

    def __init__(self, ids: dict[int, str]) -> None:
        super().__init__(ids)
        self.read: set[int] = set()

    def of(self, indexes: list[int]) -> WatchedIds:
        """Those of some requests, which note here what is read of them."""
        part = _PartOfIds(
            {new: dict.__getitem__(self, old) for new, old in enumerate(indexes) if dict.__contains__(self, old)}
        )
        part.whole, part.indexes = self, indexes
        return part

    def note(self, index: object) -> None:
        """Note that an id is read."""
        if isinstance(index, int):
            self.read.add(index)

    def __getitem__(self, index: int) -> str:
        self.note(index)
        return super().__getitem__(index)

    def get(self, index: int, default: Any = None) -> Any:
        """As of a dict."""
        self.note(index)
        return super().get(index, default)

    def values(self) -> Any:
        """As of a dict."""
        for index in list(super().keys()):
            self.note(index)
        return super().values()

    def items(self) -> Any:
        """As of a dict."""
        for index in list(super().keys()):
            self.note(index)
        return super().items()


class _PartOfIds(WatchedIds):
    whole: WatchedIds
    indexes: list[int]

    def note(self, index: object) -> None:
        super().note(index)
        if isinstance(index, int) and index < len(self.indexes):
            self.whole.note(self.indexes[index])
