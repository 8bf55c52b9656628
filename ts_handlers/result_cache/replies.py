"""Answers to requests as bytes: plain data with its status and headers, and nothing that could be code.

Format, in msgpack: ``[version, reason phrase, {header: value}, answer]``. An answer is bytes, text, a number, a truth
value, None, or a list or dict of these. Anything else has no bytes here and is not stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec

_VERSION = 1
_DEEPEST = 64
_SCALARS = frozenset((float, int, str, bytes, bytearray, bool, type(None)))


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """An answer with the status and the headers that it was sent with.

    Attributes
    ----------
    answer:
        As a handler returns it.
    status, phrase:
        Of HTTP; a phrase may be None.
    headers:
        Those of the answer.
    """

    answer: Any
    status: int = 200
    phrase: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


def encode_reply(reply: Reply) -> bytes | None:
    """A good answer as bytes; None for a refusal, and for one that does not come back as it was.

    Examples
    --------
    >>> decode_reply(encode_reply(Reply([0.1, {"label": "cat"}]))).answer
    [0.1, {'label': 'cat'}]
    >>> encode_reply(Reply("no", status=400)) is None, encode_reply(Reply(object())) is None
    (True, True)
    """
    if reply.status != 200 or not _is_plain(reply.answer):
        return None
    try:
        return msgspec.msgpack.encode([_VERSION, reply.phrase, dict(reply.headers), reply.answer])
    except (TypeError, ValueError, OverflowError, RecursionError):  # a surrogate, or a number of more than 64 bits
        return None


def decode_reply(stored: bytes) -> Reply | None:
    """What `encode_reply` has made bytes of; None for other bytes."""
    try:
        version, phrase, headers, answer = msgspec.msgpack.decode(stored)
    except (msgspec.DecodeError, TypeError, ValueError, RecursionError):
        return None
    if version != _VERSION or not isinstance(headers, dict) or not isinstance(phrase, (str, type(None))):
        return None
    if not all(isinstance(name, str) and isinstance(value, str) for name, value in headers.items()):
        return None
    return Reply(answer, 200, phrase, headers)


def _is_plain(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if kind in _SCALARS:
        return True
    if depth >= _DEEPEST or kind not in (list, tuple, dict):
        return False
    if kind is dict:
        if not all(type(key) is str for key in value):
            return False
        value = value.values()
    if _SCALARS.issuperset(map(type, value)):  # a long list of numbers, mostly
        return True
    return all(_is_plain(item, depth + 1) for item in value)
