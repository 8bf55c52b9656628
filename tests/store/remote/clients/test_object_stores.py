"""The remote store on live servers of Azure's and Google's protocols, through each client library."""

from __future__ import annotations

import importlib.util
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.store.conftest import PATIENT_SECONDS
from tests.support.object_stores import azurite, gcs, make_container
from ts_handlers.errors import StoreError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.lease import Busy, Grant
from ts_handlers.store.remote.object_lease import ObjectLeases
from ts_handlers.store.remote.objects import RemoteObjects


def through(client: str, file_system: str, url: str, options: dict[str, Any]) -> RemoteSettings:
    name = "obstore" if client == "obstore" else file_system
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return RemoteSettings(url, client=client, options=options, timeout_seconds=PATIENT_SECONDS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def azure_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with azurite(tmp_path_factory.mktemp("azurite")) as port:
        yield port


@pytest.fixture(params=["azure through obstore", "azure through fsspec", "google through obstore"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemoteSettings]:
    """A prefix on each server; the emulator of Google's store is of no use through gcsfs (see below)."""
    server, _, client = request.param.split()
    if server == "google":
        with gcs("bucket", conditional=True) as port:
            yield through(client, "gcsfs", "gs://bucket/some/prefix", options_of(port, client, tmp_path))
        return
    container = f"c{uuid.uuid4().hex[:12]}"
    connection = make_container(request.getfixturevalue("azure_port"), container)
    yield through(client, "adlfs", f"abfs://{container}/some/prefix", {"connection_string": connection})


def options_of(port: int, client: str, tmp_path: Path) -> dict[str, Any]:
    """Storage options for the emulator. obstore writes with an account alone; this one needs no token of a server."""
    token = "anon"
    if client == "obstore":
        rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa", reason="cryptography is missing")
        from cryptography.hazmat.primitives import serialization

        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key = rsa.generate_private_key(65537, 2048).private_bytes(*form).decode()
        account = {"type": "service_account", "disable_oauth": True, "private_key": key, "private_key_id": "key"}
        (tmp_path / "account.json").write_text(json.dumps({**account, "client_email": "somebody@example.com"}))
        token = str(tmp_path / "account.json")
    return {"endpoint_url": f"http://127.0.0.1:{port}", "token": token}


def test_objects(settings: RemoteSettings, tmp_path: Path) -> None:
    remote, other = RemoteObjects(settings, tmp_path / "a"), RemoteObjects(settings, tmp_path / "b")
    data = bytes(range(256)) * 20_000  # more than one chunk and than one part of an upload in parts
    (tmp_path / "data").write_bytes(data)
    assert remote.read("a/b/c.0", lambda stream: stream.read(1)) is None
    assert remote.list("a") == []
    assert remote.create("a/b/c.0", tmp_path / "data")
    assert not other.create("a/b/c.0", b"other bytes")
    assert other.read("a/b/c.0", lambda stream: b"".join(iter(lambda: stream.read(70_000), b""))) == data
    assert other.exists("a/b/c.0")
    assert not other.exists("a/b/c.1")
    assert other.create("a/d", b"")
    assert other.list("a", recursive=True) == ["b/c.0", "d"]
    for text in (b"first", b"second"):
        remote.put("a/sign", text)
        assert other.get("a/sign") == text
    for _ in range(2):
        remote.delete("a/d")
    assert not other.exists("a/d")


def test_one_of_many_writers_wins_and_one_host_holds_the_lease(settings: RemoteSettings, tmp_path: Path) -> None:
    remotes = [RemoteObjects(settings, tmp_path / str(number)) for number in range(4)]
    for remote in remotes:
        remote.require_exclusive_create()
    won: list[int] = []
    grants: list[Grant] = []
    barrier = threading.Barrier(len(remotes))

    def write(number: int) -> None:
        barrier.wait()
        if remotes[number].create("object", b"%d" % number * 1000):
            won.append(number)
        found = ObjectLeases(remotes[number]).acquire("key")
        if isinstance(found, Grant):
            grants.append(found)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(remotes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == len(grants) == 1
    assert remotes[0].get("object") == b"%d" % won[0] * 1000
    waiter = ObjectLeases(remotes[0])
    busy = waiter.acquire("key")
    assert isinstance(busy, Busy)
    taken = waiter.take_over("key", busy.token)
    assert taken is not None
    assert taken.token == grants[0].token + 1
    assert not waiter.renew(grants[0])


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_server_that_ignores_the_condition_is_read_and_not_written(
    client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for the bucket's kind, through gRPC
    with gcs("bucket", conditional=False) as port:
        settings = through(client, "gcsfs", "gs://bucket/x", options_of(port, client, tmp_path))
        remote = RemoteObjects(settings, tmp_path / "state")
        remote.put("there", b"bytes")
        assert remote.read("there", lambda stream: stream.read(100)) == b"bytes"
        for _ in range(2):
            with pytest.raises(StoreError, match="overwrites an object in spite of"):
                remote.require_exclusive_create()
