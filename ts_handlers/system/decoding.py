"""JSON to structs, in several threads.

msgspec finds out a class's fields at its first use, and another thread that uses the class meanwhile takes what is half
done: the process ends with a segmentation fault (msgspec 0.22). Here one thread at a time uses a class first.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

Kind = TypeVar("Kind")

_lock = threading.Lock()
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def decoder_of(kind: type[Kind]) -> msgspec.json.Decoder[Kind]:
    """The decoder of a class; after it, `msgspec.convert` to the class is safe in several threads too."""
    found = _decoders.get(kind)
    if found is None:
        with _lock:
            found = _decoders.get(kind)
            if found is None:
                found = _decoders[kind] = msgspec.json.Decoder(kind)
    return found


def decode_json(data: bytes, kind: type[Kind]) -> Kind:
    """Decode JSON to a struct.

    Raises
    ------
    msgspec.DecodeError
        It is no JSON, or not of this class: `ts_handlers.errors.UNDECODABLE` has all that it may raise.
    """
    return decoder_of(kind).decode(data)


def convert(value: Any, kind: type[Kind]) -> Kind:
    """As `msgspec.convert`.

    Raises
    ------
    msgspec.ValidationError
        The value is not of this class.
    """
    decoder_of(kind)
    return msgspec.convert(value, kind)
