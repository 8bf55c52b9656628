"""Entries for tests of the store: a key of given parts, and two small files."""

from __future__ import annotations

from pathlib import Path

from ts_handlers.key.cache_key import FORMAT, CacheKey
from ts_handlers.store.address import Address
from ts_handlers.store.entry import Manifest, list_files
from ts_handlers.store.local.store import LocalStore


def address(model: str = "m", **parts: str) -> Address:
    named = {"format": FORMAT, "backend": "aot_inductor", "model": "1f" * 32, "device": "cpu", **parts}
    return Address(model, named["model"], "cpu-x86_64", CacheKey(tuple(named.items())))


def fill(directory: Path) -> None:
    (directory / "code").mkdir()
    (directory / "code" / "model.so").write_bytes(bytes(range(256)) * 8)
    (directory / "constants.pt").write_bytes(b"constants")


def manifest_of(where: Address, directory: Path) -> Manifest:
    key = where.key.parts
    return Manifest(FORMAT, key, where.key["backend"], {"a": 1}, list_files(directory), {}, {"compile": 2000.0})


def publish(store: LocalStore, where: Address) -> Path:
    with store.staging(where) as directory:
        fill(directory)
        return store.publish(where, directory, manifest_of(where, directory))
