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
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entries
import msgspec
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from models import LINEAR_SECTION, settings_of

from soak import forks
from soak.tally import Tally
from ts_handlers.errors import QuarantinedError, RefusedError, SettingsError, StoreError
from ts_handlers.fingerprint import runtime_identity
from ts_handlers.settings import parse_settings
from ts_handlers.store import bundles, exchange
from ts_handlers.store.audit import audit
from ts_handlers.store.base import Hit
from ts_handlers.store.breaker import Breaker, _boot_id
from ts_handlers.store.canaries import load_record
from ts_handlers.store.entry import MANIFEST, Manifest, read_manifest, verify_files
from ts_handlers.store.garbage import find_garbage
from ts_handlers.store.guard import Guard, Marker
from ts_handlers.store.lease import _describe, read_status
from ts_handlers.store.local import LocalStore, entry_path
from ts_handlers.store.pins import pinned_keys
from ts_handlers.store.quarantine import Quarantine, lift_quarantine, read_quarantines
from ts_handlers.store.scan import scan_entries
from ts_handlers.store.sealed import MAGIC, seal
from ts_handlers.store.trust import Trust, generate_keys, load_trust
from ts_handlers.store.verified import KnownDigests, record_name


class WrongError(AssertionError):
    """Something was accepted that must not be."""


Example = Callable[[st.DataObject], bool]
"""Does one example; returns whether it was refused."""

NAMES = ["", ".", "..", "../x", "/etc/passwd", "a\0b", "x" * 300, "code", "code/model.so/x", "manifest.json", "\ud800"]
NUMBERS = [0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, float("inf"), float("nan")]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(NAMES + NUMBERS)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def changed_json(data: st.DataObject, value: Any) -> Any:
    """A copy of a JSON value with a few of its parts replaced, removed, added or exchanged."""
    top = {"": json.loads(json.dumps(value))}
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(_places(top))
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        action = data.draw(st.sampled_from(["replace", "remove", "rename", "exchange", "wrap"]))
        if action == "remove" and container is not top:
            del container[key]
        elif action == "rename" and isinstance(container, dict) and container is not top:
            container[data.draw(st.sampled_from(NAMES) | st.text(max_size=5))] = container.pop(key)
        elif action == "exchange":
            other, second = places[data.draw(st.integers(0, len(places) - 1))]
            container[key] = json.loads(json.dumps(other[second]))
        elif action == "wrap":
            container[key] = [container[key]]
        else:
            container[key] = data.draw(values)
    return top[""]


def _places(value: Any) -> Any:
    found = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(found):
        yield value, key
        yield from _places(inner)


def changed_bytes(data: st.DataObject, raw: bytes) -> bytes:
    """A copy of some bytes with a few regions changed."""
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(0, len(raw) - 1)))
        end = min(len(raw), start + data.draw(st.integers(1, 64)))
        action = data.draw(st.sampled_from(["flip", "cut", "truncate", "zero", "double", "insert", "number"]))
        middle = {
            "flip": lambda part: bytes([part[0] ^ (1 << data.draw(st.integers(0, 7)))]) + part[1:] if part else b"",
            "cut": lambda part: b"",
            "truncate": lambda part: b"",
            "zero": lambda part: bytes(len(part)),
            "double": lambda part: part + part,
            "insert": lambda part: data.draw(st.binary(max_size=16)) + part,
            "number": lambda part: b"9" * len(part),
        }[action](raw[start:end])
        raw = raw[:start] + middle + (b"" if action == "truncate" else raw[end:])
    return raw


def dumps(value: Any) -> bytes:
    """JSON, with whatever Python's encoder lets through."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _fuzzed_json(data: st.DataObject, value: Any) -> bytes:
    return changed_bytes(data, dumps(value)) if data.draw(st.integers(0, 3)) == 0 else dumps(changed_json(data, value))


def _fuzzed_manifest(data: st.DataObject, value: Any) -> bytes:
    raw = _fuzzed_json(data, value)
    with contextlib.suppress(ValueError, RecursionError):
        raw = msgspec.json.encode(msgspec.json.decode(raw, type=Manifest).sealed())
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


def _tree(folder: Path) -> set[str]:
    return {path.as_posix() for path in folder.rglob("*")}


def _import(folder: Path, raw: bytes, trust: Trust) -> bool:
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
    if {path for path in _tree(jail) if not path.startswith(root.as_posix())} != {
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


def _bundle(folder: Path, trust: Trust) -> bytes:
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
    raw = _bundle(folder, Trust())
    inner = _parts(folder, raw)

    def example(data: st.DataObject) -> bool:
        kind = data.draw(st.sampled_from(["bytes", "header", "inner bytes", "inner header"]))
        if kind == "bytes":
            return _import(folder, changed_bytes(data, raw), Trust())
        if kind == "header":
            return _import(folder, _resealed(raw, functools.partial(changed_json, data)), Trust())
        name = data.draw(st.sampled_from(sorted(inner)))
        change = functools.partial(changed_json, data)
        part = changed_bytes(data, inner[name]) if kind == "inner bytes" else _resealed(inner[name], change)
        target = io.BytesIO()
        seal(target, "bundle", "bundle", {**inner, name: part}, Trust())
        return _import(folder, target.getvalue(), Trust())

    return example


def _parts(folder: Path, raw: bytes) -> dict[str, Path | bytes]:
    from ts_handlers.store.sealed import SealedReader

    target = folder / "parts"
    target.mkdir()
    SealedReader(io.BytesIO(raw), Trust(), "bundle").extract(target)
    return {path.name: path.read_bytes() for path in target.iterdir()}


def signed_bundles(folder: Path) -> Example:
    """A signed bundle: any change of a byte must be refused."""
    generate_keys(folder / "private", folder / "public")
    trust = load_trust(
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
    exchange.seal_entry(buffer, directory, entry_path(where), Trust())
    manifest = json.loads((directory / MANIFEST).read_bytes())
    files = {name: (directory / name).read_bytes() for name in manifest["files"]}

    def example(data: st.DataObject) -> bool:
        if data.draw(st.booleans()):
            raw = changed_bytes(data, buffer.getvalue())
        else:
            changed = _fuzzed_manifest(data, manifest)
            target = io.BytesIO()
            seal(target, "entry", entry_path(where), {**files, MANIFEST: changed}, Trust())
            raw = target.getvalue()
        place = folder / "unsealed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            found, _ = exchange.unseal_entry(io.BytesIO(raw), place, entry_path(where), Trust())
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
    case = {"sizes": {"batch": 2}, "inputs": [torch.ones(2, 4)], "outputs": [torch.zeros(2, 3)]}
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


def records(folder: Path) -> Example:
    """What processes tell each other: lease status, breaker, outcome of a build, pins, markers, quarantine, digests."""
    root = folder / "store"
    store = LocalStore(root)
    where = entries.address()
    directory = entries.publish(store, where)
    key = where.key.digest
    for name in ("leases", "remote", "pins", "guards", "quarantine", "verified"):
        (root / name).mkdir(exist_ok=True)
    marker = Marker(key, "m", "b", "load", "seal", runtime_identity(), 0, 9.0, None, 0, "2026", "host", 7)
    record = Quarantine(key, "m", "b", "load", "other", runtime_identity(), "reason")
    known = KnownDigests(root, directory)
    subject = os.path.realpath(directory)
    stamp = {"stamp": [1, 2, 3, 4, 5], "sha256": "0" * 64, "computed": time.time()}
    written: dict[str, Any] = {
        f"leases/{key}.json": {"pid": 1, "started": time.time(), "phase": "build", "estimate": 3.0},
        "remote/state": {"boot": _boot_id(), "until": time.monotonic() + 5, "reason": "r"},
        f"pins/{key}": "note",
        f"guards/{key}.aa": msgspec.to_builtins(marker),
        f"quarantine/{key}-aa.json": msgspec.to_builtins(record),
        f"verified/{record_name(subject)}": {
            "boot": known._boot,
            "subject": subject,
            "files": {str(directory / "constants.pt"): stamp},
        },
        f"leases/{key}.background.outcome": {"time": time.time(), "result": "built"},
    }
    outside = _tree(folder)

    def example(data: st.DataObject) -> bool:
        name = data.draw(st.sampled_from(sorted(written)))
        raw = _fuzzed_json(data, written[name])
        if name.startswith("verified/"):
            raw = hashlib.sha256(raw).hexdigest().encode() + b"\n" + raw
        elif name.startswith("guards/"):
            raw += data.draw(
                st.sampled_from([b"", b"\nTimeout (0:00:01)!\n", b"\nFatal Python error: Aborted\n", b"\n\xff"])
            )
        (root / name).write_bytes(raw)
        read_status(root / "leases", key)
        _describe(root / "leases", key, 1.0, None)
        assert Breaker(root / "remote" / "state", "r", 1.0).is_open in (True, False)
        pinned_keys(root)
        read_quarantines(root)
        list(audit(root))
        find_garbage(root)
        found = LocalStore(root).lookup(where)
        if not isinstance(found, Hit):
            raise WrongError(f"{found} because of {name}")
        refused = False
        guard = Guard(root, settings_of(), where.key, "m", lambda: "")
        for seal_of in ("seal", ""):
            try:
                guard.refuse(seal_of)
                with guard.marked("load", seal_of):
                    pass
            except QuarantinedError:
                refused = True
        lift_quarantine(root, key)
        (root / name).unlink(missing_ok=True)
        new = {path for path in _tree(folder) - outside if not path.startswith(root.as_posix())}
        if new:
            raise WrongError(f"written outside the store: {new}")
        return refused

    return example


SECTION: dict[str, Any] = {
    **LINEAR_SECTION,
    "store": "/tmp/store",
    "backends": ["aot_inductor", "eager"],
    "on_miss": "compile",
    "strict": False,
    "verify": "changed",
    "outside": "refuse",
    "warmup": [{"batch": 2}],
    "canary": {"tolerance": 0.1, "seed": 3},
    "guard": {"load_seconds": 3.0, "load_memory_mb": 7},
    "contexts": {"count": 2},
    "space": {"store": {"bytes": "3GiB", "entries": 4, "inodes": 5}, "per_model": {"bytes": 7}},
    "remote": {"url": "/tmp/remote", "options": {"a": 1}, "timeout_seconds": 3, "lease": "auto"},
    "background": {},
}


def sections(folder: Path) -> Example:
    """model-config.yaml as a parsed mapping."""
    config: dict[str, Any] = {
        "minWorkers": 1,
        "pt2": {"compile": {"enable": True, "backend": "inductor", "mode": "default", "options": {}}},
        "handler": {"ts_handlers": SECTION},
    }
    generate_keys(folder / "private", folder / "public")
    config["handler"]["ts_handlers"]["trust"] = {
        "public_keys": [str(folder / "public")],
        "signing_key": str(folder / "private"),
        "folders": ["/tmp"],
    }
    parse_settings(config)

    def example(data: st.DataObject) -> bool:
        try:
            parse_settings(changed_json(data, config))
        except SettingsError:
            return True
        return False

    return example


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
