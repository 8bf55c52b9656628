"""Which library reaches a URL, and what the storage options of fsspec's file systems become for obstore."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ts_handlers.errors import SettingsError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.clients import registry
from ts_handlers.store.remote.clients.obstore_options import translate
from ts_handlers.store.remote.clients.registry import Client
from ts_handlers.store.remote.objects import RemoteObjects

KEYS = {"key": "k", "secret": "s"}
REGION = {"client_kwargs": {"region_name": "here"}}
AZURE_KEY = {"account_name": "name", "account_key": "a2V5"}


@pytest.fixture(autouse=True)
def plain_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without any configuration of a cloud."""
    import os

    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "FSSPEC_", "STORAGE_EMULATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `auto` takes where these packages are installed."""

    def choose(url: str, installed: tuple[str, ...] = ("obstore", "s3fs", "gcsfs", "adlfs"), **options: Any) -> str:
        find = importlib.util.find_spec
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: find("json") if name in installed else None)
            for module, name in (("obstore_client", "ObstoreClient"), ("fsspec_client", "FsspecClient")):
                fake = types.ModuleType(module)
                setattr(fake, name, lambda *_, name=name: name)
                patch.setitem(sys.modules, f"ts_handlers.store.remote.clients.{module}", fake)
            return str(registry.open_client(RemoteSettings(url, options=options)))

    return choose


@pytest.mark.parametrize(
    ("url", "options", "client"),
    [
        ("s3://bucket/x", {**KEYS, **REGION}, "ObstoreClient"),
        ("s3://bucket/x", {**KEYS, "endpoint_url": "http://minio:9000"}, "ObstoreClient"),
        ("s3a://bucket/x", {"anon": True, **REGION}, "ObstoreClient"),
        ("s3://bucket/x", REGION, "ObstoreClient"),  # the instance's or the container's own role
        ("s3://bucket/x", KEYS, "FsspecClient"),  # which region?
        ("s3://bucket/x", {**KEYS, **REGION, "profile": "me"}, "FsspecClient"),
        ("s3://bucket/a b", {**KEYS, **REGION}, "FsspecClient"),
        ("gs://bucket/x", {}, "ObstoreClient"),
        ("gcs://bucket/x", {"token": "cloud"}, "FsspecClient"),
        ("gs://bucket/x", {"token": "anon"}, "FsspecClient"),
        ("abfs://container/x", AZURE_KEY, "ObstoreClient"),
        ("az://container/x", {"account_name": "name"}, "FsspecClient"),
        ("memory://x", {}, "FsspecClient"),
    ],
)
def test_auto(url: str, options: dict[str, Any], client: str, chosen: Callable[..., str]) -> None:
    assert chosen(url, **options) == client


def test_auto_without_one_of_the_packages(chosen: Callable[..., str]) -> None:
    assert chosen("s3://bucket/x", ("s3fs",), **KEYS, **REGION) == "FsspecClient"
    assert chosen("s3://bucket/x", ("obstore",), **KEYS) == "ObstoreClient"
    assert chosen("s3://bucket/x", ("obstore",), profile="me") == "FsspecClient"  # never without what was asked for


def test_auto_leaves_profiles_and_fsspecs_own_configuration_to_fsspec(
    chosen: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".aws").mkdir()
    assert chosen("s3://bucket/x", **REGION) == "FsspecClient"
    assert chosen("s3://bucket/x", **REGION, **KEYS) == "ObstoreClient"
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/token")
    assert chosen("s3://bucket/x", **REGION) == "ObstoreClient"
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another key")
    assert chosen("s3://bucket/x", **REGION, **KEYS) == "FsspecClient"
    assert chosen("s3://bucket/x", **REGION, **KEYS, token="t") == "ObstoreClient"
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", "http://somewhere")
    assert chosen("s3://bucket/x", **REGION, **KEYS) == "FsspecClient"


def test_auto_leaves_unusual_google_credentials_to_fsspec(
    chosen: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "credentials.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    for kind, client in (("service_account", "ObstoreClient"), ("external_account", "FsspecClient")):
        path.write_text(json.dumps({"type": kind}))
        assert chosen("gs://bucket/x") == client


def test_translation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.pem").write_bytes(b"certificate")
    nested = {"client_kwargs": {"region_name": "here", "verify": str(tmp_path / "ca.pem")}}
    style = {"config_kwargs": {"s3": {"addressing_style": "virtual"}}}
    found = translate("s3://bucket/a/b/", {**KEYS, "token": None, "anon": "false", **nested, **style})
    assert (found.kind, found.bucket, found.prefix) == ("S3Store", "bucket", "a/b")
    assert found.config == {
        "access_key_id": "k",
        "secret_access_key": "s",
        "skip_signature": False,
        "region": "here",
        "virtual_hosted_style_request": True,
    }
    assert found.client_options == {"root_certificate": b"certificate"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    found = translate("s3://bucket", {"client_kwargs": {"verify": False}})
    assert (found.config, found.client_options) == ({"endpoint": "http://minio:9000"}, {"allow_http": True})
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://minio:9000")
    found = translate("s3://bucket", {"client_kwargs": {"verify": False}})
    assert found.config == {"endpoint": "https://minio:9000"}
    assert found.client_options == {"allow_invalid_certificates": True}
    found = translate("abfs://container@name.dfs.core.windows.net/x", {"sas_token": "sig"})
    assert (found.bucket, found.config) == ("container", {"account_name": "name", "sas_key": "sig"})
    text = "AccountName=name;AccountKey=a2V5==;BlobEndpoint=http://127.0.0.1:1/name"
    found = translate("az://container/x", {"connection_string": text})
    assert found.config == {"account_name": "name", "account_key": "a2V5==", "endpoint": "http://127.0.0.1:1/name"}
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    found = translate("gs://bucket/x", {"token": "/credentials.json", "project": "p"})
    assert found.config == {"application_credentials": "/credentials.json", "base_url": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("s3://b/x", {"profile": "me"}, r"remote\.options: .*does not know profile; expected anon, client_kwargs\."),
        ("s3://b/x", {"client_kwargs": {"foo": 1}}, r"does not know client_kwargs\.foo;.*or set .*client: fsspec"),
        ("s3://b/x y", {}, r"remote\.url: the client obstore takes letters"),
        ("s3://b/x", {"client_kwargs": {"verify": "/no/such/file"}}, r"verify: /no/such/file cannot be read"),
        ("gs://b/x", {"token": "cloud"}, r"options\.token: the client obstore takes anon or the absolute path"),
        ("memory://x", {}, r"remote\.client: obstore serves s3, gs and abfs URLs, found memory; set client: auto"),
    ],
)
def test_what_obstore_cannot_do_is_a_mistake_of_the_settings(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        RemoteObjects(RemoteSettings(url, options=options, client="obstore"), None)


class DictClient:
    """Objects in a dictionary of this process."""

    exclusive_create = "always"
    objects: dict[str, bytes] = {}  # noqa: RUF012

    def __init__(self, settings: RemoteSettings) -> None:
        pass

    def get(self, name: str) -> bytes:
        if name not in self.objects:
            raise FileNotFoundError(name)
        return self.objects[name]

    def exists(self, name: str) -> bool:
        return name in self.objects

    def create(self, name: str, source: bytes) -> None:
        if name in self.objects:
            raise FileExistsError(name)
        self.objects[name] = source


def test_client_is_added_with_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ts_handlers.store.remote.clients.in_memory", sys.modules[__name__])
    monkeypatch.setattr(registry, "CLIENTS", (Client("dict", "in_memory:DictClient", ("dict",)), *registry.CLIENTS))
    remote = RemoteObjects(RemoteSettings("dict://here"), None)
    remote.require_exclusive_create()
    assert remote.get("a") is None
    assert remote.create("a", b"bytes")
    assert not remote.create("a", b"other bytes")
    assert remote.get("a") == b"bytes"
