"""Servers of object stores on this machine: Azurite, and the emulator of Google's with the XML calls that it lacks."""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import functools
import hashlib
import hmac
import http.server
import logging
import os
import re
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest

from tests.support.costs import costs

ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, as its documentation gives them."""


def find_azurite() -> list[str] | None:
    """The command of Azurite's blob service: what AZURITE names, or `azurite-blob` on the path."""
    named = os.environ.get("AZURITE")
    found = named or shutil.which("azurite-blob")
    return [found] if found else None


@costs("services")
@contextlib.contextmanager
def azurite(directory: Path) -> Iterator[int]:
    """A server of Azure's blob storage; yields its port."""
    command = find_azurite()
    if command is None:
        pytest.skip("there is no Azurite: npm install -g azurite, or name its azurite-blob in the variable AZURITE")
    options = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck"]
    with open(directory / "azurite.log", "wb") as errors:
        process = subprocess.Popen(
            [*command, *options, "--silent"],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"listens on http://127\.0\.0\.1:(\d+)", line):
                yield int(found[1])
                break
        else:
            raise AssertionError(f"Azurite did not start; see {directory / 'azurite.log'}")
    finally:
        process.terminate()
        process.wait()


def make_container(port: int, name: str) -> str:
    """Make a container; returns the connection string. Signed as described under "Authorize with Shared Key"."""
    date = email.utils.format_datetime(datetime.datetime.now(datetime.timezone.utc), usegmt=True)
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
    signed = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    text = "PUT\n" + "\n" * 11 + signed
    signature = base64.b64encode(hmac.digest(base64.b64decode(ACCOUNT_KEY), text.encode(), "sha256")).decode()
    url = f"http://127.0.0.1:{port}/{ACCOUNT}"
    request = urllib.request.Request(f"{url}/{name}?restype=container", method="PUT", headers=headers)
    request.add_header("Authorization", f"SharedKey {ACCOUNT}:{signature}")
    urllib.request.urlopen(request).close()
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};BlobEndpoint={url};"


@costs("services")
@contextlib.contextmanager
def gcs(bucket: str, conditional: bool) -> Iterator[int]:
    """Google's object store; yields its port.

    The emulator knows the JSON interface, which gcsfs uses, and knows nothing of preconditions. The XML interface,
    which obstore uses, is added here as Google documents it; with its precondition if `conditional`.
    """
    server_module = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.storage import Storage

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)

    class Handler(server_module.RequestHandler):  # type: ignore[misc,name-defined]
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content_Length": str(len(body))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def xml(self) -> bool:
            """Answer, if this is the XML interface."""
            url = urllib.parse.urlsplit(self.path)
            first, _, name = urllib.parse.unquote(url.path).lstrip("/").partition("/")
            if first != bucket:
                return False
            try:
                self.act(name, dict(urllib.parse.parse_qsl(url.query)))
            except NotFound:
                self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return True

        def act(self, name: str, query: dict[str, str]) -> None:
            if self.command == "PUT":
                data = self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    exists = any(item["name"] == name for item in self.storage.get_file_list(bucket, name)[0])
                    if conditional and exists and self.headers["x-goog-if-generation-match"] == "0":
                        self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                        return
                    self.storage.create_file(bucket, name, data, {"name": name, "size": str(len(data))})
                self.answer(200, ETag=etag(data))
            elif self.command == "DELETE":
                self.storage.delete_file(bucket, name)
                self.answer(204)
            elif name:
                data = self.storage.get_file(bucket, name, show_error=False)
                self.answer(200, data, ETag=etag(data), Last_Modified=email.utils.formatdate(usegmt=True))
            else:
                items, prefixes = self.storage.get_file_list(bucket, query.get("prefix"), query.get("delimiter"))
                self.answer(200, listing(items, prefixes))

        def do_GET(self) -> None:
            if not self.xml():
                super().do_GET()

        def do_HEAD(self) -> None:
            assert self.xml()

        def do_PUT(self) -> None:
            if not self.xml():
                super().do_PUT()

        def do_DELETE(self) -> None:
            if not self.xml():
                super().do_DELETE()

    def etag(data: bytes) -> str:
        return f'"{hashlib.md5(data).hexdigest()}"'

    def listing(items: list[dict[str, Any]], prefixes: list[str]) -> bytes:
        date = "2026-01-01T00:00:00.000Z"
        contents = "".join(
            f"<Contents><Key>{escape(item['name'])}</Key><LastModified>{date}</LastModified><ETag>x</ETag>"
            f"<Size>{item['size']}</Size></Contents>"
            for item in items
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in prefixes)
        return f"<ListBucketResult>{contents}{common}</ListBucketResult>".encode()

    lock = threading.Lock()
    storage = Storage(use_memory_fs=True)
    storage.create_bucket(bucket, {"name": bucket})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, storage))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
