"""Objects of a remote store: created once, read whole, never half."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest
from fsspec.registry import _registry

from tests.support.marks import needs_root
from tests.support.tcp_proxy import Proxy
from tests.support.workers import wait_until
from ts_handlers.errors import RemoteError, StoreError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.objects import RemoteObjects, redact, redact_url
from ts_handlers.store.remote.sealed import SealedReader, seal
from ts_handlers.store.remote.signing import Keyring
from ts_handlers.store.remote.transfer import fetch

Make = Callable[..., RemoteObjects]


def read(remote: RemoteObjects, name: str) -> bytes | None:
    return remote.read(name, lambda stream: b"".join(iter(lambda: stream.read(1000), b"")))


def test_objects(remote_settings: RemoteSettings, make_remote: Make, tmp_path: Path) -> None:
    remote, other = make_remote(remote_settings), make_remote(remote_settings, "other")
    data = bytes(range(256)) * 1000
    (tmp_path / "data").write_bytes(data)
    assert read(remote, "a/b/c.0") is None
    assert remote.list("a") == remote.list("a", recursive=True) == []
    assert not remote.exists("a/b/c.0")
    assert remote.create("a/b/c.0", tmp_path / "data")
    assert not other.create("a/b/c.0", b"other bytes")
    assert read(other, "a/b/c.0") == data
    assert other.exists("a/b/c.0")
    assert other.create("a/d", b"")
    assert other.list("a", recursive=True) == ["b/c.0", "d"]
    assert "d" in remote.list("a")
    assert other.get("a/sign") is None
    for text in (b"first", b"second"):
        remote.put("a/sign", text)
        assert other.get("a/sign") == text
    remote.delete("a/d")
    remote.delete("a/d")
    assert read(other, "a/d") is None
    remote.require_exclusive_create()
    other.require_exclusive_create()


def test_objects_that_are_overwritten_all_the_time_can_be_read(
    remote_settings: RemoteSettings, make_remote: Make
) -> None:
    remote, reader, end = make_remote(remote_settings), make_remote(remote_settings, "reader"), threading.Event()
    remote.put("sign", b"0" * 32)

    def write() -> None:
        while not end.is_set():
            for digit in b"0123456789":
                remote.put("sign", bytes([digit]) * 32)

    thread = threading.Thread(target=write)
    thread.start()
    found = set()
    reads = 0
    try:
        while reads < 60 or (len(found) < 2 and thread.is_alive()):  # a busy machine may not run the writer at first
            found.add(reader.get("sign"))
            reads += 1
    finally:
        end.set()
        thread.join()
    assert len(found) > 1
    assert all(text is not None and len(text) == 32 and len(set(text)) == 1 for text in found)


def test_one_of_many_writers_wins(remote_settings: RemoteSettings, make_remote: Make) -> None:
    remotes = [make_remote(remote_settings, str(number)) for number in range(6)]
    won: list[int] = []
    barrier = threading.Barrier(len(remotes))

    def write(number: int) -> None:
        barrier.wait()
        if remotes[number].create("object", b"%d" % number * 1000):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(remotes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert read(remotes[0], "object") == b"%d" % won[0] * 1000


def test_a_file_being_written_is_no_object(folder: RemoteSettings, make_remote: Make, tmp_path: Path) -> None:
    (tmp_path / "remote" / "a").mkdir()
    (tmp_path / "remote" / "a" / ".x.0.1234").write_bytes(b"half")
    assert make_remote(folder).list("a") == []


BAD_OBJECTS: dict[str, Callable[[Path], object]] = {
    "link": lambda path: path.symlink_to(path.parent.parent / "outside"),
    "dangling link": lambda path: path.symlink_to("nothing"),
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "truncated": lambda path: path.write_bytes(b"short"),
}


@pytest.mark.parametrize("bad", BAD_OBJECTS)
def test_a_bad_object_in_a_folder_is_refused_and_the_next_version_and_other_keys_are_read(
    bad: str, folder: RemoteSettings, make_remote: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def consume(stream: BinaryIO) -> bytes:
        data = stream.read(6)
        if len(data) < 6:
            raise ValueError("too short")  # as a reader that did not expect this
        return data

    monkeypatch.chdir(tmp_path)  # the paths of sockets are short
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "remote" / "keys").mkdir()
    BAD_OBJECTS[bad](Path("remote/keys/one.0"))
    remote = make_remote(folder)
    for name in ("keys/one.1", "keys/two.0"):
        assert remote.create(name, b"object")
    found = fetch(remote, "keys/one", consume)
    if bad == "dangling link":  # as where there is nothing
        found = fetch(remote, "keys/one", consume)
    assert (found.value, len(found.refused)) == (b"object", 1)
    assert remote.get("keys/one.0") in (None, b"short")
    assert not remote.create("keys/one.0", b"mine")
    remote.delete("keys/nothing")
    assert fetch(remote, "keys/two", consume).value == b"object"
    plain = ["one.0"] if bad == "truncated" else []
    assert sorted(remote.list("keys", recursive=True)) == sorted([*plain, "one.1", "two.0"])
    assert remote.problem is None
    assert (tmp_path / "outside").read_bytes() == b"secret"


def test_no_link_in_a_folder_leads_out_of_it(folder: RemoteSettings, make_remote: Make, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "object.0").write_bytes(b"secret")
    (tmp_path / "remote" / "keys").symlink_to("../outside")
    remote = make_remote(folder)
    assert fetch(remote, "keys/object", lambda stream: stream.read(6)).value is None
    assert (remote.list("keys"), remote.exists("keys/object.0"), remote.get("keys/object.0")) == ([], False, None)
    for write in (lambda: remote.create("keys/new", b"x"), lambda: remote.put("keys/object.0", b"x")):
        with pytest.raises(StoreError, match="no folder that can be entered"):
            write()
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "outside").iterdir()] == [("object.0", b"secret")]
    assert remote.problem is None


@needs_root
def test_a_full_disk_of_this_host_does_not_turn_the_remote_off(
    folder: RemoteSettings, make_remote: Make, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "sealed").open("wb") as target:
        seal(target, "entry", "subject", {"large": bytes(1 << 20)}, Keyring())
    remote = make_remote(folder)
    remote.create("object.0", tmp_path / "sealed")
    roomy = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: roomy)  # it fills up meanwhile

    def consume(stream: BinaryIO) -> None:
        SealedReader(stream, Keyring(), "entry").extract(small_disk)

    with pytest.raises(StoreError, match=r"large cannot be written: .*No space left"):
        fetch(remote, "object", consume)
    assert remote.problem is None


def test_folder_that_is_not_mounted_is_not_made(tmp_path: Path, make_remote: Make) -> None:
    remote = make_remote(RemoteSettings(f"file://{tmp_path}/not-mounted"))
    with pytest.raises(RemoteError, match=r"not-mounted does not exist; make or mount it"):
        remote.create("a", b"x")
    assert not (tmp_path / "not-mounted").exists()


def test_missing_package_is_named(make_remote: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for client, package in (("fsspec", "gcsfs"), ("obstore", "obstore")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.delitem(_registry, "gs", raising=False)  # looked up by an earlier test
            patch.delitem(sys.modules, "ts_handlers.store.remote.clients.obstore_client", raising=False)
            settings = RemoteSettings("gs://bucket/x", client=client)  # type: ignore[arg-type]
            with pytest.raises(RemoteError, match=rf"cannot be imported.*{package}.*pip install 'ts-handlers\[gcs\]'"):
                make_remote(settings, package).exists("a")


@pytest.fixture(params=["obstore", "fsspec"])
def s3_through(request: pytest.FixtureRequest, s3: RemoteSettings) -> RemoteSettings:
    if request.param == "obstore":
        pytest.importorskip("obstore", reason="obstore is not installed")
    return msgspec.structs.replace(s3, client=request.param)


def test_bucket_that_does_not_exist_is_an_error_of_the_write(s3_through: RemoteSettings, make_remote: Make) -> None:
    remote = make_remote(msgspec.structs.replace(s3_through, url="s3://no-such-bucket/x"))
    assert read(remote, "a") is None
    with pytest.raises((OSError, RemoteError)):
        remote.create("a", b"x")


def test_secrets_do_not_appear_in_messages(s3_through: RemoteSettings, make_remote: Make) -> None:
    options = {**s3_through.options, "endpoint_url": "http://127.0.0.1:1", "secret": "topsecret-hunter2"}
    if s3_through.client == "fsspec":
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:1") as caught:
        make_remote(msgspec.structs.replace(s3_through, options=options)).exists("a")
    assert "hunter2" not in str(caught.value)


def test_server_that_never_answers_is_asked_once(s3_through: RemoteSettings, make_remote: Make) -> None:
    with Proxy(mode="swallow") as silent:
        options = {**s3_through.options, "endpoint_url": f"http://127.0.0.1:{silent.port}"}
        remote = make_remote(msgspec.structs.replace(s3_through, options=options, timeout_seconds=0.5))
        for _ in range(2):
            with pytest.raises(RemoteError, match=r"no answer within the 0\.5 s"):
                remote.exists("a")
            assert wait_until(lambda: silent.connections == 1)  # by a thread that nobody waits for any more


def test_server_that_fails_is_asked_again_a_few_times(s3: RemoteSettings, make_remote: Make) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    with Proxy(mode="cut") as broken:
        options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{broken.port}"}
        remote = make_remote(msgspec.structs.replace(s3, options=options))
        with pytest.raises(RemoteError, match="Error performing HEAD"):
            remote.exists("a")
        assert 1 <= broken.connections <= 3  # two retries, where the way in which the connection ended allows one


def test_object_of_any_size_is_written_and_read_in_one_request(
    s3: RemoteSettings, s3_port: int, make_remote: Make, tmp_path: Path
) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed")
    data = os.urandom(12 << 20)  # obstore's own upload in parts begins above 5 MiB
    (tmp_path / "data").write_bytes(data)
    with Proxy(("127.0.0.1", s3_port)) as proxy:
        options = {**s3.options, "endpoint_url": f"http://127.0.0.1:{proxy.port}"}
        remote = make_remote(msgspec.structs.replace(s3, options=options))
        assert remote.create("a/b", tmp_path / "data")
        assert read(remote, "a/b") == data
        assert remote.list("a") == ["b"]
        assert [line.partition(b" ")[0] for line in proxy.requests] == [b"PUT", b"GET", b"GET"]
        del proxy.requests[:]
        assert not remote.create("a/b", tmp_path / "data")
        assert [line.partition(b" ")[0] for line in proxy.requests] == [b"PUT", b"HEAD"]


def test_object_above_the_limit_of_one_request_is_not_sent(
    s3: RemoteSettings, make_remote: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("ts_handlers.store.remote.clients.obstore_client", reason="obstore is not installed")
    monkeypatch.setattr(module, "LARGEST", 10)
    (tmp_path / "data").write_bytes(bytes(11))
    remote = make_remote(s3)
    with pytest.raises(StoreError, match=r"11 bytes.*takes 10; set remote.client: fsspec"):
        remote.create("a", tmp_path / "data")
    assert not remote.exists("a")


def _overwriting(protocol: str) -> None:
    """Register a file system whose create overwrites, as servers that ignore If-None-Match do."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Overwriting(MemoryFileSystem):  # type: ignore[misc]
        store: dict[str, Any] = {}  # noqa: RUF012

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
            super().pipe_file(path, value, mode="overwrite", **kwargs)

    Overwriting.protocol = protocol
    fsspec.register_implementation(protocol, Overwriting, clobber=True)


def test_file_systems_without_exclusive_create_are_not_written_to(make_remote: Make) -> None:
    with pytest.raises(StoreError, match=r"memory has no atomic create.*read from it and not written"):
        make_remote(RemoteSettings("memory://somewhere")).require_exclusive_create()
    _overwriting("az")
    remote = make_remote(RemoteSettings("az://container/x", client="fsspec"))
    for _ in range(2):
        with pytest.raises(StoreError, match="overwrites an object in spite of"):
            remote.require_exclusive_create()


def test_redaction() -> None:
    assert redact_url("s3://bucket/prefix") == "s3://bucket/prefix"
    assert redact_url("https://user:pass@host/x?sig=abc") == "https://host/x"
    options = {
        "key": "AKIA",
        "client_kwargs": {"region_name": "here", "token": ["t0ken"]},
        "endpoint_url": "http://e:1",
    }
    text = "AKIA t0ken here http://e:1 user:pa55word redis://x:y@host abcd=efgh"
    cleaned = redact(text, "redis://user:pa55word@h?abcd=efgh", options)
    assert cleaned == "*** *** here http://e:1 ***:*** redis://***@host ***"
    assert (
        redact("GET https://a.blob/c/x?sig=abc%3D&se=1 failed", "az://c/x", {}) == "GET https://a.blob/c/x?*** failed"
    )
