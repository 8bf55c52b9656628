"""SHA-256 of texts and files; needs neither torch nor anything else outside the standard library."""

from __future__ import annotations

import concurrent.futures
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20
DigestFile = Callable[[Path], str]


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


class FileDigest:
    """SHA-256 of a file, computed once and on a thread when `begin` was called before `result`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._future: concurrent.futures.Future[str] | None = None

    def begin(self, compute: DigestFile) -> concurrent.futures.Future[str]:
        """Start the thread, unless that was done before."""
        with self._lock:
            if self._future is None:
                self._future = concurrent.futures.Future()
                thread = threading.Thread(
                    target=self._run, args=(compute, self._future), daemon=True, name="ts_handlers-digest"
                )
                thread.start()
            return self._future

    def _run(self, compute: DigestFile, future: concurrent.futures.Future[str]) -> None:
        try:
            future.set_result(compute(self._path))
        except Exception as error:
            future.set_exception(error)

    def result(self) -> str:
        """The digest; raises what computing it raised."""
        return self.begin(digest_file).result()
