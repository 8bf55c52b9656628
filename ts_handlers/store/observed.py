"""The file format of what is known of a model's calls: names, dtypes and shapes, never contents.

Below ``observed/<identity>/``, where the identity is a digest of the model's name and source, lie

- ``calls``: the calls that were seen, as ``{"first": seconds since the epoch, "kinds": [...]}``; see
  `ts_handlers.model.observed_calls.SeenKind`
- ``declaration``: what the next start takes for declared, see `ts_handlers.model.declaration.Declaration`

Format: ``SHA-256 in hex, newline, JSON``. The digest covers the record's subject too, ``<identity>/<name>``: a record
under another name is damage. ``calls`` is read, added to and written by several processes without a lock; two of them
at the same moment lose a few counts. ``declaration`` is written by whoever holds the lease to build.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec

from ts_handlers.errors import UNDECODABLE
from ts_handlers.model.declaration import Declaration
from ts_handlers.model.observed_calls import ObservedCalls, SeenKind
from ts_handlers.settings import Settings
from ts_handlers.system.decoding import decode_json

LIMIT = 1 << 20
"""Bytes of a record."""
T = TypeVar("T")


class CallsRecord(msgspec.Struct):
    """Calls that were seen, and when the first of them came, in seconds since the epoch."""

    first: float
    kinds: list[SeenKind]

    @property
    def calls(self) -> ObservedCalls:
        """The calls."""
        return ObservedCalls(self.kinds)


def encode_record(subject: str, record: CallsRecord | Declaration) -> bytes:
    """A record as the file of its subject."""
    payload = msgspec.json.encode(record)
    return _digest(subject, payload) + b"\n" + payload


def decode_calls(subject: str, data: bytes) -> CallsRecord:
    """Calls from the file of a subject. Raises `ValueError` when it is damaged or another subject's."""
    record = _decode(subject, data, CallsRecord)
    for seen in record.kinds:
        ranks = [rank for _, _, rank in seen.kind.inputs]
        if any(
            [len(shape) for shape in shapes] != ranks for shapes in (seen.low, seen.high, *(s for s, _ in seen.shapes))
        ):
            raise ValueError("its shapes do not fit its inputs")
    return record


def decode_declaration(subject: str, data: bytes) -> Declaration:
    """A declaration from the file of a subject. Raises `ValueError` when it is damaged or another subject's."""
    from ts_handlers.settings.validation import validate

    declaration = _decode(subject, data, Declaration)
    validate(declaration.applied_to(Settings()))
    return declaration


def _decode(subject: str, data: bytes, kind: type[T]) -> T:
    digest, _, payload = data.partition(b"\n")
    if len(data) > LIMIT or digest != _digest(subject, payload):
        raise ValueError("its digest differs from its content")
    try:
        return decode_json(payload, kind)
    except UNDECODABLE as error:
        raise ValueError(f"it cannot be read: {error}") from error


def _digest(subject: str, payload: bytes) -> bytes:
    return hashlib.sha256(subject.encode() + b"\n" + payload).hexdigest().encode()
