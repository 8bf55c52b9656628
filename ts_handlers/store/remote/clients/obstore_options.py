"""What obstore is told: translated from the storage options of s3fs, gcsfs and adlfs.

Options are written as fsspec's file systems take them, whichever client reaches the objects, so that the setting
`client` changes nothing else. Nested ones are named with dots here: ``client_kwargs.region_name``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ts_handlers.errors import SettingsError
from ts_handlers.settings.sections import RemoteSettings
from ts_handlers.store.remote.clients.protocols import OBJECT_STORES, protocol_of

WHERE = "handler.ts_handlers.remote"

# Option of the file system: obstore's name of it; a leading underscore marks those that `_finish_...` turns into one.
_S3 = {
    "anon": "skip_signature",
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "endpoint_url": "endpoint",
    "requester_pays": "request_payer",
    "client_kwargs.aws_access_key_id": "access_key_id",
    "client_kwargs.aws_secret_access_key": "secret_access_key",
    "client_kwargs.aws_session_token": "session_token",
    "client_kwargs.endpoint_url": "endpoint",
    "client_kwargs.region_name": "region",
    "client_kwargs.verify": "_verify",
    "config_kwargs.s3.addressing_style": "_addressing_style",
}
_GCS = {"endpoint_url": "base_url", "project": "_project", "token": "_token"}
_AZURE = {
    "account_name": "account_name",
    "account_key": "account_key",
    "anon": "skip_signature",
    "client_id": "client_id",
    "client_secret": "client_secret",
    "connection_string": "_connection_string",
    "sas_token": "sas_key",
    "tenant_id": "tenant_id",
}
_FLAGS = ("skip_signature", "request_payer")
_PLAIN = re.compile(r"[A-Za-z0-9_.=/-]*")


@dataclasses.dataclass(frozen=True)
class StoreArguments:
    """Arguments of ``obstore.store.<kind>``."""

    kind: str
    bucket: str
    prefix: str
    config: dict[str, Any]
    client_options: dict[str, Any]


def translate(url: str, options: Mapping[str, Any]) -> StoreArguments:
    """Arguments for a URL and the storage options of fsspec's file system.

    Raises
    ------
    SettingsError
        Naming what obstore has no counterpart for.

    Examples
    --------
    >>> translate("s3://bucket/a/b", {"endpoint_url": "http://minio:9000", "key": "k", "secret": "s"}).config
    {'endpoint': 'http://minio:9000', 'access_key_id': 'k', 'secret_access_key': 's'}
    """
    parts = urlsplit(url)
    kind, table, finish = _kind(parts.scheme)
    given = dict(_flat(options))
    unknown = sorted(given.keys() - table.keys())
    if unknown:
        raise SettingsError(
            f"{WHERE}.options: the client obstore does not know {', '.join(unknown)}; expected "
            f"{', '.join(sorted(table))}; or set {WHERE}.client: fsspec"
        )
    if not _PLAIN.fullmatch(parts.path) or parts.query or parts.fragment:
        raise SettingsError(
            f"{WHERE}.url: the client obstore takes letters, digits and _ . = / - alone in the path of a URL; change "
            f"it, or set {WHERE}.client: fsspec"
        )
    config = {table[name]: given[name] for name in sorted(given) if given[name] is not None}
    for name in _FLAGS:
        if name in config:
            config[name] = str(config[name]).lower() in ("true", "1")
    client: dict[str, Any] = {}
    bucket, _, account = parts.netloc.partition("@")
    if account:  # abfs://container@account.dfs.core.windows.net/path
        config.setdefault("account_name", account.partition(".")[0])
    finish(config, client)
    if str(config.get("endpoint", config.get("base_url", ""))).startswith("http://"):
        client["allow_http"] = True
    return StoreArguments(kind, bucket, parts.path.strip("/"), config, client)


def _kind(protocol: str) -> tuple[str, dict[str, str], Any]:
    if protocol in ("s3", "s3a"):
        return "S3Store", _S3, _finish_s3
    if protocol in ("gs", "gcs"):
        return "GCSStore", _GCS, _finish_gcs
    if protocol in ("abfs", "abfss", "az"):
        return "AzureStore", _AZURE, _finish_azure
    raise SettingsError(f"{WHERE}.client: obstore serves s3, gs and abfs URLs, found {protocol}; set client: auto")


def _flat(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _finish_s3(config: dict[str, Any], client: dict[str, Any]) -> None:
    if "access_key_id" in config and "session_token" not in config and "AWS_SESSION_TOKEN" in os.environ:
        raise SettingsError(
            f"{WHERE}.options: the client obstore would send AWS_SESSION_TOKEN of the environment with the key of the "
            f"options; give token too, or set {WHERE}.client: fsspec"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        config.setdefault("endpoint", endpoint)
    if config.pop("_addressing_style", "path") == "virtual":
        config["virtual_hosted_style_request"] = True
    verify = config.pop("_verify", os.environ.get("AWS_CA_BUNDLE", True))
    if str(config.get("endpoint")).startswith("http://"):
        return
    if verify is False:
        client["allow_invalid_certificates"] = True
    elif isinstance(verify, str):
        client["root_certificate"] = _read(verify, "client_kwargs.verify")


def _finish_gcs(config: dict[str, Any], client: dict[str, Any]) -> None:
    config.pop("_project", None)  # needed to make buckets only
    if endpoint := os.environ.get("STORAGE_EMULATOR_HOST"):
        config.setdefault("base_url", endpoint)
    token = config.pop("_token", None)
    if token == "anon":
        config["skip_signature"] = True
    elif isinstance(token, str) and os.path.isabs(token):
        config["application_credentials"] = token
    elif token is not None:
        raise SettingsError(
            f"{WHERE}.options.token: the client obstore takes anon or the absolute path of a credentials file; change "
            f"it, or set {WHERE}.client: fsspec"
        )


def _finish_azure(config: dict[str, Any], client: dict[str, Any]) -> None:
    text = config.pop("_connection_string", os.environ.get("AZURE_STORAGE_CONNECTION_STRING"))
    if text is None:
        return
    fields = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    names = {
        "AccountName": "account_name",
        "AccountKey": "account_key",
        "SharedAccessSignature": "sas_key",
        "BlobEndpoint": "endpoint",
    }
    for field, name in names.items():
        if field in fields:
            config.setdefault(name, fields[field])


def _read(path: str, option: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{WHERE}.options.{option}: {path} cannot be read: {error}") from error


def check(settings: RemoteSettings) -> None:
    """Raise `SettingsError` for what obstore cannot do."""
    translate(settings.url, settings.options)


def reason_against(settings: RemoteSettings) -> str | None:
    """Why ``client: auto`` takes fsspec's file system; None when it takes obstore."""
    if importlib.util.find_spec("obstore") is None:
        return "the package obstore is not installed"
    try:
        reason = _reason_for_fsspec(translate(settings.url, settings.options))
    except SettingsError as error:
        return str(error)
    file_system = OBJECT_STORES[protocol_of(settings.url)]
    return reason if reason is not None and importlib.util.find_spec(file_system) is not None else None


def _reason_for_fsspec(arguments: StoreArguments) -> str | None:
    """Why fsspec's file system may know what neither the options nor the environment tell obstore; None if not."""
    if any(name.startswith("FSSPEC_") for name in os.environ) or os.path.isdir(os.path.expanduser("~/.config/fsspec")):
        return "fsspec has a configuration of its own on this host"
    config = arguments.config
    if config.get("skip_signature"):
        return "obstore does not write to Google's store anonymously" if arguments.kind == "GCSStore" else None
    if arguments.kind == "S3Store":
        return _reason_s3(config)
    if arguments.kind == "GCSStore":
        return _reason_gcs(config)
    known = ("account_key", "sas_key", "client_secret")
    environment = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY")
    if any(name in config for name in known) or any(name in os.environ for name in environment):
        return None
    return "adlfs decides how to log in where neither the options nor the environment hold a key"


def _reason_s3(config: Mapping[str, Any]) -> str | None:
    environ = os.environ
    if not ("region" in config or "endpoint" in config or {"AWS_REGION", "AWS_DEFAULT_REGION"} & environ.keys()):
        return "s3fs finds the region of a bucket out"
    given = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    if "access_key_id" in config or any(name in environ for name in (*given, "AWS_CONTAINER_CREDENTIALS_FULL_URI")):
        return None
    files = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")
    if any(name in environ for name in files) or os.path.isdir(os.path.expanduser("~/.aws")):
        return "s3fs reads the profiles of this host"
    return None


def _reason_gcs(config: Mapping[str, Any]) -> str | None:
    path = config.get("application_credentials") or os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if path is None:
        return None
    try:
        kind = json.loads(Path(path).read_bytes())["type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # its own error says more
    return None if kind in ("service_account", "authorized_user") else f"gcsfs knows credentials of type {kind}"
