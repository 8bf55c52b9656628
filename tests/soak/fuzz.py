"""Fuzzed manifests, bundles, sealed objects, records of the store and settings.

Every kind of file is fuzzed as it is (bytes changed) and with its structure kept (JSON values changed, and the seal or
digest made right again, so that the reader behind it is reached). What is read must be refused by the documented error
or be right; nothing may be written outside the store. Each target runs in a process of its own, as native code
(``torch.load``) is among the readers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from tests.soak import forks
from tests.soak.fuzz_records import records, sections
from tests.soak.mutations import Example, WrongError, changed_bytes, changed_json, dumps, fuzzed_json, tree
from tests.soak.tally import Tally
from tests.support import entries
from tests.support.models import settings_of
from ts_handlers.errors import RefusedError, StoreError
from ts_handlers.store import bundles
from ts_handlers.store.address import entry_path
from ts_handlers.store.base import Hit
from ts_handlers.store.canaries import load_record
from ts_handlers.store.entry import MANIFEST, Manifest, read_manifest, verify_files
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.remote import transfer
from ts_handlers.store.remote.sealed import MAGIC, seal
from ts_handlers.store.remote.signing import Keyring, generate_keys, load_keyring
from ts_handlers.store.upkeep.audit import audit
from ts_handlers.store.upkeep.garbage import find_garbage
from ts_handlers.store.upkeep.scan import scan_entries


def _fuzzed_manifest(data: st.DataObject, value: Any) -> bytes:
    raw = fuzzed_json(data, value)
    with contextlib.suppress(ValueError, RecursionError):
        raw = msgspec.json.encode(msgspec.json.decode(raw, type=Manifest).with_digest())
    return raw


def manifests(folder: Path) -> Example:
    """An entry's manifest; sealed again whenever it is still one."""
    store = LocalStore(folder / "store")
    where = entries.address()
    directory = entries.publish(store, where)
    del store
    original, kept = (directory / MANIFEST).read_bytes(), folder / "kept"
    shutil.copytree(directory, kept)

    def example(data: st.DataObject) -> bool:
        raw = _fuzzed_manifest(data, json.loads(original))
        if not directory.exists():
            shutil.copytree(kept, directory)
        (directory / MANIFEST).write_bytes(raw)
        root = folder / "store"
        scan_entries(root)
        find_garbage(root)
        list(audit(root))
        store = LocalStore(root)
        store.build_estimate(where)
        store.lookup(entries.address(device="another"))
        found = store.lookup(where)
        if not isinstance(found, Hit):
            shutil.rmtree(root / "trash", ignore_errors=True)
            return True
        manifest = found.manifest
        verify_files(directory, manifest)
        inside = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
        if manifest.cache_key != where.key or not set(manifest.files) <= inside:
            raise WrongError(f"accepted {raw!r}")
        return False

    return example


def _import(folder: Path, raw: bytes, trust: Keyring) -> bool:
    """Import a bundle into an empty store; True when it was refused."""
    jail = folder / "jail"
    shutil.rmtree(jail, ignore_errors=True)
    jail.mkdir()
    (jail / "bundle").write_bytes(raw)
    root = jail / "inner" / "store"
    store = LocalStore(root)
    refused = False
    try:
        bundles.import_bundle(store, jail / "bundle", trust)
    except (RefusedError, StoreError):
        refused = True
    published = scan_entries(root)
    if {path for path in tree(jail) if not path.startswith(root.as_posix())} != {
        (jail / "bundle").as_posix(),
        (jail / "inner").as_posix(),
    }:
        raise WrongError("something was written outside the store")
    if refused and published:
        raise WrongError("refused, and something was published")
    for finding in audit(root):
        if finding.problem is not None:
            raise WrongError(f"published damaged: {finding}")
    return refused


def _bundle(folder: Path, trust: Keyring) -> bytes:
    store = LocalStore(folder / "source")
    for device in ("one", "two"):
        where = entries.address(device=device)
        entries.publish(store, where)
        store.write_canary(where, "w", {"cases": [], "tensor": torch.ones(3)})
    bundles.export_bundle(store, scan_entries(store.root), folder / "exported", trust)
    return (folder / "exported").read_bytes()


def _resealed(raw: bytes, change: Callable[[Any], Any]) -> bytes:
    """A sealed file without signature whose header was changed and whose digest fits again."""
    size, _, rest = raw.removeprefix(MAGIC).partition(b"\n")
    header, body = rest[: int(size)], rest[int(size) + 1 :].partition(b"\n")[2]
    header = dumps(change(json.loads(header)))
    return (
        MAGIC
        + b"%d\n" % len(header)
        + header
        + b"\n"
        + hashlib.sha256(MAGIC + header).hexdigest().encode()
        + b" -\n"
        + body
    )


def bundles_of(folder: Path) -> Example:
    """A bundle without signature: its bytes, its header, or what lies in it."""
    raw = _bundle(folder, Keyring())
    inner = _parts(folder, raw)

    def example(data: st.DataObject) -> bool:
        kind = data.draw(st.sampled_from(["bytes", "header", "inner bytes", "inner header"]))
        if kind == "bytes":
            return _import(folder, changed_bytes(data, raw), Keyring())
        if kind == "header":
            return _import(folder, _resealed(raw, functools.partial(changed_json, data)), Keyring())
        name = data.draw(st.sampled_from(sorted(inner)))
        change = functools.partial(changed_json, data)
        part = changed_bytes(data, inner[name]) if kind == "inner bytes" else _resealed(inner[name], change)
        target = io.BytesIO()
        seal(target, "bundle", "bundle", {**inner, name: part}, Keyring())
        return _import(folder, target.getvalue(), Keyring())

    return example


def _parts(folder: Path, raw: bytes) -> dict[str, Path | bytes]:
    from ts_handlers.store.remote.sealed import SealedReader

    target = folder / "parts"
    target.mkdir()
    SealedReader(io.BytesIO(raw), Keyring(), "bundle").extract(target)
    return {path.name: path.read_bytes() for path in target.iterdir()}


def signed_bundles(folder: Path) -> Example:
    """A signed bundle: any change of a byte must be refused."""
    generate_keys(folder / "private", folder / "public")
    trust = load_keyring(
        settings_of(
            trust={"public_keys": [str(folder / "public")], "signing_key": str(folder / "private")},
        ).trust
    )
    raw = _bundle(folder, trust)

    def example(data: st.DataObject) -> bool:
        changed = changed_bytes(data, raw)
        if data.draw(st.integers(0, 9)) == 0:
            changed = _resealed(raw, lambda header: header)  # not signed
        refused = _import(folder, changed, trust)
        if not refused and changed != raw:
            raise WrongError("accepted what was not signed")
        return refused

    return example


def objects(folder: Path) -> Example:
    """An entry as the remote store holds it, and with its manifest changed and sealed again."""
    store, where = LocalStore(folder / "store"), entries.address()
    directory = entries.publish(store, where)
    buffer = io.BytesIO()
    transfer.seal_entry(buffer, directory, entry_path(where), Keyring())
    manifest = json.loads((directory / MANIFEST).read_bytes())
    files = {name: (directory / name).read_bytes() for name in manifest["files"]}

    def example(data: st.DataObject) -> bool:
        if data.draw(st.booleans()):
            raw = changed_bytes(data, buffer.getvalue())
        else:
            changed = _fuzzed_manifest(data, manifest)
            target = io.BytesIO()
            seal(target, "entry", entry_path(where), {**files, MANIFEST: changed}, Keyring())
            raw = target.getvalue()
        place = folder / "unsealed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            found, _ = transfer.unseal_entry(io.BytesIO(raw), place, entry_path(where), Keyring())
        except (RefusedError, StoreError):
            return True
        verify_files(place, read_manifest(place))
        if found.key != where.key:
            raise WrongError("accepted another key")
        return False

    return example


def canaries(folder: Path) -> Example:
    """``torch.save`` bytes, behind a digest that is right."""
    buffer = io.BytesIO()
    case = {"sizes": {"batch": 2}, "inputs": [torch.ones(2, 4)], "outputs": [torch.zeros(2, 3)], "constants": ["1.5"]}
    torch.save({"cases": [case, case]}, buffer)
    stored = _stored_zip(buffer.getvalue())

    def example(data: st.DataObject) -> bool:
        raw = buffer.getvalue()
        if data.draw(st.booleans()):
            members = dict(stored)
            name = data.draw(st.sampled_from([name for name in members if "pkl" in name or "/data/" in name]))
            members[name] = changed_bytes(data, members[name])
            raw = _zipped(members)
        else:
            raw = changed_bytes(data, raw)
        try:
            load_record(raw)
        except ValueError:
            return True
        return False

    return example


def _stored_zip(raw: bytes) -> dict[str, bytes]:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(members: dict[str, bytes]) -> bytes:
    import zipfile

    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target.getvalue()


TARGETS: dict[str, Callable[[Path], Example]] = {
    "manifests": manifests,
    "bundles": bundles_of,
    "signed bundles": signed_bundles,
    "objects": objects,
    "canaries": canaries,
    "records": records,
    "settings": sections,
}


def _examples(target: str, folder: Path, seed: int, count: int) -> list[int]:
    """Run a target; returns how many examples were tried, and how many of them refused."""
    import logging

    logging.disable(logging.CRITICAL)
    done = [0, 0]
    example = TARGETS[target](folder)

    @seeded(seed)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test(data: st.DataObject) -> None:
        done[1] += example(data)
        done[0] += 1

    test()
    return done


def run(tally: Tally, folder: Path, seed: int, trials: int) -> None:
    """Spread the trials over the targets."""
    for target in TARGETS:
        place = folder / target.replace(" ", "-")
        place.mkdir()
        work = functools.partial(_examples, target, place, seed, max(1, trials // len(TARGETS)))
        code, done, text = forks.call(work, 3600.0)
        what = f"fuzz seed {seed}: {target}: {text[-3000:]}"
        if code < 0:
            tally.trial("crash", what)
        elif code:
            tally.trial("wrong" if "WrongError" in text else "escaped", what)
        else:
            tally.trial("refusal", count=done[1])
            tally.trial("served", count=done[0] - done[1])
        shutil.rmtree(place)
