"""SHA-256 of texts and files; needs neither torch nor anything else outside the standard library."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20


def digest_text(text: str) -> str:
    """SHA-256 of a string, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits; the GIL is free while it is computed."""
    with open(path, "rb", buffering=0) as file:
        return digest_stream(file)


def digest_stream(file: BinaryIO) -> str:
    """SHA-256 of what an unbuffered binary file still holds, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
    return digest.hexdigest()
