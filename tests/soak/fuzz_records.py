"""Fuzzed records of a store, by which processes tell each other things, and fuzzed settings."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import strategies as st

from tests.soak.mutations import Example, WrongError, changed_json, fuzzed_json, tree
from tests.support import entries
from tests.support.models import LINEAR_SECTION, settings_of
from ts_handlers.errors import QuarantinedError, SettingsError
from ts_handlers.guard.guard import Guard
from ts_handlers.guard.markers import Marker
from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines
from ts_handlers.guard.records import Quarantine
from ts_handlers.key.fingerprint import runtime_identity
from ts_handlers.settings import parse_settings
from ts_handlers.store.base import Hit
from ts_handlers.store.local.lease import describe_holder, read_status
from ts_handlers.store.local.pins import pinned_keys
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.local.verified import record_name
from ts_handlers.store.remote.breaker import Breaker
from ts_handlers.store.remote.signing import generate_keys
from ts_handlers.store.upkeep.audit import audit
from ts_handlers.store.upkeep.garbage import find_garbage
from ts_handlers.system.processes import boot_id


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
    subject = os.path.realpath(directory)
    stamp = {"stamp": [1, 2, 3, 4, 5], "sha256": "0" * 64, "computed": time.time()}
    written: dict[str, Any] = {
        f"leases/{key}.json": {"pid": 1, "started": time.time(), "phase": "build", "estimate": 3.0},
        "remote/state": {"boot": boot_id(), "until": time.monotonic() + 5, "reason": "r"},
        f"pins/{key}": "note",
        f"guards/{key}.aa": msgspec.to_builtins(marker),
        f"quarantine/{key}-aa.json": msgspec.to_builtins(record),
        f"verified/{record_name(subject)}": {
            "boot": boot_id(),
            "subject": subject,
            "files": {str(directory / "constants.pt"): stamp},
        },
        f"leases/{key}.background.outcome": {"time": time.time(), "result": "built"},
    }
    outside = tree(folder)

    def example(data: st.DataObject) -> bool:
        name = data.draw(st.sampled_from(sorted(written)))
        raw = fuzzed_json(data, written[name])
        if name.startswith("verified/"):
            raw = hashlib.sha256(raw).hexdigest().encode() + b"\n" + raw
        elif name.startswith("guards/"):
            raw += data.draw(
                st.sampled_from([b"", b"\nTimeout (0:00:01)!\n", b"\nFatal Python error: Aborted\n", b"\n\xff"])
            )
        (root / name).write_bytes(raw)
        read_status(root / "leases", key)
        describe_holder(root / "leases", key, 1.0, None)
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
        new = {path for path in tree(folder) - outside if not path.startswith(root.as_posix())}
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
