"""The wrapper of a remote store that is read and never written to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ts_handlers.errors import StoreError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.base import Remote
from ts_handlers.store.remote.read_only import ReadOnlyRemote


def test_reads_pass_and_writes_are_refused(folder: RemoteSettings, make_remote: Callable[..., Remote]) -> None:
    inner = make_remote(folder)
    inner.put("a/b", b"bytes")
    remote: Remote = ReadOnlyRemote(inner)
    assert remote.get("a/b") == remote.read("a/b", lambda stream: stream.read(100)) == b"bytes"
    assert remote.exists("a/b")
    assert remote.list("a") == remote.list("a", recursive=True) == ["b"]
    assert (remote.name, remote.settings, remote.problem) == (inner.name, folder, None)
    assert remote.budget is inner.budget
    assert inner.accepts_writes
    assert not remote.accepts_writes
    writes: tuple[Callable[[], object], ...] = (
        lambda: remote.create("a/c", b"bytes"),
        lambda: remote.put("a/b", b"other"),
        lambda: remote.delete("a/b"),
        remote.require_exclusive_create,
    )
    for write in writes:
        with pytest.raises(StoreError, match=r"not written to: remote\.read_only is set"):
            write()
    assert inner.list("a") == ["b"]
    assert inner.get("a/b") == b"bytes"
