"""The file format of canary records: inputs and the answers that the eager model gave to them.

Format: ``SHA-256 in hex, newline, torch.save bytes``. The digest covers the record's subject too, ``<key>/<weights
digest>``, newline: a record that a copy or a repair has put under another name is damage and not another's answers.

A record's modification time is that of its last use, which `record_canary_use` keeps.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import Any


def encode_canary(subject: str, record: dict[str, Any]) -> bytes:
    """A record as the file of its subject."""
    import torch

    buffer = io.BytesIO()
    torch.save(record, buffer)
    return _digest(subject, buffer.getvalue()) + b"\n" + buffer.getvalue()


def check_canary_bytes(subject: str, data: bytes) -> bytes:
    """The ``torch.save`` bytes of a record's file. Raises `ValueError` when it is damaged or another subject's."""
    digest, _, payload = data.partition(b"\n")
    if digest != _digest(subject, payload):
        raise ValueError("its digest differs from its content")
    return payload


def load_record(payload: bytes) -> dict[str, Any]:
    """A record from ``torch.save`` bytes. Raises `ValueError` when there is none in them."""
    import torch

    try:
        record = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except Exception as error:  # torch's reader does not say what it raises for damaged bytes
        raise ValueError(f"its record cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"its record is a {type(record).__name__}, not a dict")
    return record


def record_canary_use(path: Path) -> None:
    """Remember that a record was used now; on a store that cannot be written it is not."""
    with contextlib.suppress(OSError):
        os.utime(path)


def last_use(path: Path) -> float:
    """When a record was used the last time, in seconds since the epoch; 0 when it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _digest(subject: str, payload: bytes) -> bytes:
    return hashlib.sha256(subject.encode() + b"\n" + payload).hexdigest().encode()
