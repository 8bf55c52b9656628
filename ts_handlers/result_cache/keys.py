"""Keys: a digest of 256 bits over all that shapes an answer, with the length of what it was computed from.

What is digested is a sequence of parts, each with its length in front, so that no two sequences have the same bytes.
Values go in with their types and shapes: 1, 1.0 and True are three values, and so are two tensors of the same bytes.
`hash(str(tensor))` would not do: the text of a tensor leaves out all but the ends of one with more than 1000 elements.
"""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ts_handlers.result_cache.base import Key

_MARSHAL_VERSION = 2
"""Of Python's marshal format: the latest one without references, so that equal values have equal bytes."""
_SMALL = 4096
_PLAIN = (bytes, bytearray, str, dict, list, int, float, bool, type(None))


class KeyDigest:
    """Collects the parts of a key.

    Parameters
    ----------
    prefix:
        What all keys of a cache have in common: who answers, see `identity`.

    Examples
    --------
    >>> KeyDigest(b"").add(b"ab").add(b"c").key() == KeyDigest(b"").add(b"a").add(b"bc").key()
    False
    >>> len(KeyDigest(b"").key())
    40
    """

    def __init__(self, prefix: bytes) -> None:
        self._digest = hashlib.sha256()
        self._length = 0
        self.add(prefix)

    def add(self, part: bytes | bytearray | memoryview) -> KeyDigest:
        """Add one part."""
        if type(part) is bytes and len(part) < _SMALL:
            size = len(part)
            self._digest.update(size.to_bytes(8, "little") + part)
        else:
            size = part.nbytes if isinstance(part, memoryview) else len(part)
            self._digest.update(size.to_bytes(8, "little"))
            self._digest.update(part)
        self._length += size
        return self

    def copy(self) -> KeyDigest:
        """Another one with the same parts."""
        made = KeyDigest.__new__(KeyDigest)
        made._digest, made._length = self._digest.copy(), self._length
        return made

    def key(self) -> Key:
        """The digest in 32 bytes, and the length of all parts in 8 bytes."""
        return self._digest.digest() + self._length.to_bytes(8, "little")


def identity(facts: Iterable[tuple[str, str]]) -> bytes:
    """Who answers, as the prefix of keys: names and values such as the artifact's key and the digest of the weights."""
    digest = KeyDigest(b"ts_handlers result cache 1")
    for name, value in facts:
        digest.add(name.encode("utf-8", "surrogatepass")).add(value.encode("utf-8", "surrogatepass"))
    return digest.key()


def request_key(prefix: bytes, row: Any, headers: Sequence[tuple[str, str]]) -> Key | None:
    """The key of a request as a server hands it over; None for one that holds something else than plain data.

    Parameters
    ----------
    row:
        The body, or the fields of the body by name: bytes, texts, or what JSON has. JSON that a server has parsed
        counts by its values and the order of its fields.
    headers:
        Names and values of the headers that count.

    Examples
    --------
    >>> request_key(b"", {"body": 1}, []) == request_key(b"", {"body": 1.0}, [])
    False
    >>> request_key(b"", {"body": object()}, []) is None
    True
    """
    digest = KeyDigest(prefix).add(len(headers).to_bytes(4, "little"))
    for name, value in sorted(headers):
        digest.add(name.encode("utf-8", "surrogatepass")).add(value.encode("utf-8", "surrogatepass"))
    fields = row if type(row) is dict else {"": row}
    digest.add(len(fields).to_bytes(4, "little") + (b"d" if fields is row else b"v"))
    for name, value in fields.items():
        kind = type(value)
        if kind not in _PLAIN or type(name) is not str:
            return None
        digest.add(name.encode("utf-8", "surrogatepass"))
        if kind is bytes or kind is bytearray:  # without a copy
            digest.add(kind.__name__.encode()).add(value)
            continue
        try:
            digest.add(b"value").add(marshal.dumps(value, _MARSHAL_VERSION))
        except (ValueError, RecursionError):  # no plain data, or nested too deep
            return None
    return digest.key()


def tensors_key(prefix: bytes, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Key | None:
    """The key of a call: each input's name, dtype, shape and bytes; None for tensors that are not plain and dense.

    Examples
    --------
    >>> a, b = torch.zeros(2, 3), torch.zeros(3, 2)
    >>> tensors_key(b"", ["x"], [a]) == tensors_key(b"", ["x"], [b])
    False
    """
    digest = KeyDigest(prefix)
    for name, tensor in zip(names, tensors, strict=True):
        content = bytes_of(tensor)
        if content is None:
            return None
        digest.add(_description(name, tensor.dtype, tensor.shape)).add(content)
    return digest.key()


def row_keys(prefix: bytes, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> list[Key] | None:
    """The key of each row along dimension 0, as if it were a call of its own; None as of `tensors_key`."""
    rows = tensors[0].shape[0]
    digests = [KeyDigest(prefix) for _ in range(rows)]
    for name, tensor in zip(names, tensors, strict=True):
        content = bytes_of(tensor)
        if content is None:
            return None
        description = _description(name, tensor.dtype, (1, *tensor.shape[1:]))
        size = content.nbytes // rows
        for row, digest in enumerate(digests):
            digest.add(description).add(content[row * size : (row + 1) * size])
    return [digest.key() for digest in digests]


def bytes_of(tensor: torch.Tensor) -> memoryview | None:
    """The elements of a dense tensor in their order, as bytes on the CPU; None for other layouts."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return None
    plain = tensor.detach().resolve_conj().resolve_neg()  # whose bits are the values
    raw = plain.cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(raw.numpy())  # type: ignore[arg-type]


def _description(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    return f"{name}\0{dtype}\0{tuple(shape)}".encode()
