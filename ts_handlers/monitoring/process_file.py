"""The file into which one process writes its series, as they change.

The file is mapped into memory, so that a change is one store to memory, and what was counted stays when the process is
killed. Each process has a file of its own and holds a lock on it: whoever gets the lock knows that the process is gone,
also from another container.

Format, in the machine's byte order, all offsets multiples of 8::

    8 bytes    b"tsh-s1\\0\\0"
    8 bytes    how many bytes of the file are in use
    records:   4 bytes length of the key, 4 bytes count of numbers, the key as JSON padded with spaces, the numbers

The key is ``[metric, [label values]]`` and the numbers are float64: the value of a counter or gauge; the counts of a
histogram's buckets, not summed up, and the sum. The key ``["", [model]]`` has the progress of a model's start: a number
that is odd while it is being written, and JSON padded with zero bytes, `PROGRESS_BYTES` long.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ts_handlers.errors import UNDECODABLE
from ts_handlers.system.processes import process_start

MAGIC = b"tsh-s1\0\0"
ENDING = ".series"
FIRST_BYTES = 32 * 1024
MOST_BYTES = 1024 * 1024
PROGRESS_BYTES = 1024
_HEAD = 16
_DOUBLE = 8

Key = tuple[str, tuple[str, ...]]


class ProcessFile:
    """This process's series; safe for threads. After `close` changes go nowhere.

    Parameters
    ----------
    directory:
        Where the file is made.

    Raises
    ------
    OSError
        It cannot be made there.
    """

    def __init__(self, directory: Path) -> None:
        name = f"{os.getpid()}-{process_start(os.getpid())}-{os.urandom(4).hex()}{ENDING}"
        self.path = directory / name
        self._lock = threading.Lock()
        self._places: dict[Key, int] = {}
        unfinished = directory / f".{name}"  # nobody reads it before it is locked
        self._descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._map(FIRST_BYTES)
            self._used = _HEAD
            self._bytes[:8] = MAGIC
            self._write_used()
            os.rename(unfinished, self.path)
        except BaseException:
            os.close(self._descriptor)
            unfinished.unlink(missing_ok=True)
            raise

    def _map(self, size: int) -> None:
        # Space is taken before it is mapped: a store to a page that the disk has no room for would end the process.
        os.posix_fallocate(self._descriptor, 0, size)
        self._unmap()
        self._memory = mmap.mmap(self._descriptor, size)
        self._bytes = memoryview(self._memory)
        self._doubles = self._bytes.cast("d")
        self._size = size

    def _unmap(self) -> None:
        """Give the memory up, and with it the copy of the descriptor, and so of the lock, that belongs to it."""
        if hasattr(self, "_memory"):
            self._doubles.release()
            self._bytes.release()
            self._memory.close()

    def _write_used(self) -> None:
        struct.pack_into("=Q", self._memory, 8, self._used)

    def _place(self, key: Key, width: int) -> int | None:
        """Index of the first number of a series, which is made with zeros if it is new; None where there is no room."""
        place = self._places.get(key)
        if place is not None or self._descriptor < 0:
            return place
        text = json.dumps([key[0], list(key[1])]).encode()
        text += b" " * (-len(text) % 8)
        end = self._used + 8 + len(text) + width * _DOUBLE
        if end > self._size:
            if end > MOST_BYTES:
                return None
            try:
                self._map(min(MOST_BYTES, 2 * max(self._size, end)))
            except OSError:
                return None
        struct.pack_into("=II", self._memory, self._used, len(text), width)
        self._bytes[self._used + 8 : self._used + 8 + len(text)] = text
        place = self._places[key] = (end - width * _DOUBLE) // _DOUBLE
        self._used = end
        self._write_used()
        return place

    def add(self, key: Key, amount: float = 1.0) -> bool:
        """Increase a number; False when there was no room for it."""
        with self._lock:
            place = self._place(key, 1)
            if place is None:
                return False
            self._doubles[place] += amount
            return True

    def set(self, key: Key, value: float) -> bool:
        """Set a number; False when there was no room for it."""
        with self._lock:
            place = self._place(key, 1)
            if place is None:
                return False
            self._doubles[place] = value
            return True

    def observe(self, key: Key, bucket: int, width: int, value: float) -> bool:
        """Count a value in a bucket of a histogram, in none with -1; False when there was no room for it."""
        with self._lock:
            place = self._place(key, width)
            if place is None:
                return False
            if bucket >= 0:
                self._doubles[place + bucket] += 1.0
                self._doubles[place + width - 1] += value
            return True

    def write_progress(self, model: str, facts: dict[str, Any]) -> bool:
        """Replace what is told of a model's start; False when there was no room for it."""
        text = json.dumps(facts).encode()
        if len(text) > PROGRESS_BYTES:
            text = json.dumps({**facts, "reason": "too long to tell", "phase": str(facts.get("phase"))[:40]}).encode()
        with self._lock:
            place = self._place(("", (model,)), 1 + PROGRESS_BYTES // _DOUBLE)
            if place is None:
                return False
            start = (place + 1) * _DOUBLE
            self._doubles[place] += 1
            self._bytes[start : start + PROGRESS_BYTES] = text[:PROGRESS_BYTES].ljust(PROGRESS_BYTES, b"\0")
            self._doubles[place] += 1
            return True

    def close(self, *, forked: bool = False) -> None:
        """Stop writing. With `forked`, in a child: the file goes on belonging to the parent, which holds the lock."""
        if forked:
            self._lock = threading.Lock()  # another thread may have held it
        with self._lock:
            self._places.clear()
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                self._unmap()
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def read_series(path: Path) -> tuple[dict[Key, list[float]], dict[str, dict[str, Any]]]:
    """Numbers by key, and progress by model, of a file of this format; empty where it is none.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    progress: dict[str, dict[str, Any]] = {}
    numbers: dict[Key, list[float]] = {}
    for _ in range(5):
        data, again = path.read_bytes(), False
        numbers, progress = {}, {}
        for (metric, labels), values in _records(data):
            if metric:
                numbers[metric, labels] = list(struct.unpack(f"={len(values) // _DOUBLE}d", values))
                continue
            (turn,) = struct.unpack_from("=d", values)
            try:
                progress[labels[0]] = dict(json.loads(values[_DOUBLE:].rstrip(b"\0")))
            except (TypeError, *UNDECODABLE):
                again = True
            again = again or turn % 2 == 1
        if not again:
            break
        time.sleep(0.001)
    return numbers, progress


def _records(data: bytes) -> Iterator[tuple[Key, bytes]]:
    if len(data) < _HEAD or data[:8] != MAGIC:
        return
    used = min(struct.unpack_from("=Q", data, 8)[0], len(data))
    at = _HEAD
    while at + 8 <= used:
        length, width = struct.unpack_from("=II", data, at)
        begin, end = at + 8 + length, at + 8 + length + width * _DOUBLE
        if end > used or not width:
            return
        try:
            metric, labels = json.loads(data[at + 8 : begin])
            key = str(metric), tuple(map(str, labels))
        except (TypeError, *UNDECODABLE):
            return
        yield key, data[begin:end]
        at = end


def is_over(path: Path) -> bool:
    """Whether the process that wrote a file is gone: nobody holds its lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
