"""Evictions by real processes, beside readers and publishers in real processes; any may die at any moment."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.support.entries import address, publish
from tests.support.file_backend import START
from tests.support.subprocesses import finish, run_python, start_python
from tests.support.workers import is_stopped, wait_until
from ts_handlers.store.base import Hit
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.upkeep.eviction import Quotas
from ts_handlers.store.upkeep.garbage import find_garbage
from ts_handlers.store.upkeep.scan import scan_entries
from ts_handlers.store.upkeep.space import make_room

pytestmark = pytest.mark.processes

NOTHING = Quotas(entries=0)

EVICT = """
    import os, shutil, signal, sys
    from pathlib import Path
    from ts_handlers.store.upkeep import eviction
    from ts_handlers.store.upkeep.space import make_room

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(call):
        return lambda *arguments, **options: (call(*arguments, **options), die())

    def delete_half(path, **options):
        (path / "code" / "model.so").unlink()

    def stopped(call):
        return lambda *arguments: (os.kill(os.getpid(), signal.SIGSTOP), call(*arguments))

    root, moment = Path(sys.argv[1]), sys.argv[2]
    if moment == "stopped":
        eviction.os.rename = stopped(os.rename)
    if moment == "before rename":
        eviction.os.rename = lambda *arguments: die()
    elif moment == "after rename":
        eviction.os.rename = dying(os.rename)
    elif moment == "half deleted":
        eviction.shutil.rmtree = dying(delete_half)
    elif moment == "after deletion":
        eviction.shutil.rmtree = dying(shutil.rmtree)
    make_room(root, eviction.Quotas(entries=0), eviction.Quotas())
"""

SERVE = (
    START
    + """
    import signal
    print("serving", flush=True)
    signal.pause()
"""
)

# A worker's way through the store, many times: look up, else build under the lease; then read every file.
USE = """
    import random, sys, time
    from tests.support.entries import address, manifest_of, fill, publish
    from ts_handlers.store.base import Corrupt, Hit
    from ts_handlers.store.local.store import LocalStore
    root, count = sys.argv[1], int(sys.argv[2])
    where, built = address(), 0
    while count > 0 or built < 2:
        count -= 1
        store = LocalStore(root)
        found = store.lookup(where)
        assert not isinstance(found, Corrupt), found
        if isinstance(found, Hit):
            directory = found.directory
        else:
            with store.lease(where, None):
                found = store.lookup(where)
                assert not isinstance(found, Corrupt), found
                directory = found.directory if isinstance(found, Hit) else publish(store, where)
                built += not isinstance(found, Hit)
        assert (directory / "code" / "model.so").read_bytes() == bytes(range(256)) * 8
        assert (directory / "constants.pt").read_bytes() == b"constants"
        del store  # the end of the worker
        time.sleep(0.01 * random.random())
    print(built)
"""

EVICT_OFTEN = """
    import sys
    from pathlib import Path
    from ts_handlers.store.upkeep.eviction import Quotas
    from ts_handlers.store.upkeep.space import make_room
    evicted, failed = 0, []
    while not Path(sys.argv[2]).exists():
        for step in make_room(Path(sys.argv[1]), Quotas(entries=0), Quotas()).steps:
            evicted += step.kind == "evict" and step.refusal is None
            failed += [step.refusal] if "cannot" in (step.refusal or "") else []
    assert failed == []
    print(evicted)
"""


@pytest.mark.parametrize("moment", ["before rename", "after rename", "half deleted", "after deletion"])
def test_evictor_killed_at_any_moment_leaves_nothing_that_counts(moment: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    publish(store, address())
    store.write_canary(address(), "w", {"cases": []})
    store.close()
    finish(start_python(EVICT, store.root, moment), -signal.SIGKILL)
    still_there = moment == "before rename"
    assert len(scan_entries(store.root)) == int(still_there)
    assert isinstance(store.lookup(address()), Hit) == still_there
    publish(store, address())
    assert isinstance(store.lookup(address()), Hit)
    store.close()
    assert make_room(store.root, NOTHING, Quotas()).unmet == ()
    assert scan_entries(store.root) == []
    assert find_garbage(store.root) == []
    assert list((store.root / "trash").iterdir()) == []


def test_entry_of_living_processes_stays_until_the_last_one_is_killed(archive: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    servers = []
    try:
        for expected in ("built", "hit"):
            server = start_python(SERVE, archive, store)
            servers.append(server)
            assert server.stdout is not None
            assert json.loads(server.stdout.readline())["result"] == expected
            assert server.stdout.readline() == "serving\n"
        for server in servers:
            report = make_room(store, NOTHING, Quotas())
            assert report.done == ()
            assert len(report.unmet) == 1
            assert len(scan_entries(store)) == 1
            server.kill()
            server.communicate()
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    assert len(make_room(store, NOTHING, Quotas()).done) == 1
    assert scan_entries(store) == []


def test_workers_beside_two_evictors_hit_or_build_and_never_read_half_an_entry(tmp_path: Path) -> None:
    root, stop = tmp_path / "store", tmp_path / "stop"
    LocalStore(root)
    evictors = [start_python(EVICT_OFTEN, root, stop) for _ in range(2)]
    workers = [start_python(USE, root, 80) for _ in range(2)]
    try:
        built = [int(finish(worker)) for worker in workers]
    finally:
        stop.touch()
    evicted = [int(finish(evictor)) for evictor in evictors]
    assert min(built) >= 2
    assert sum(evicted) >= sum(built) - 1  # each entry that was built was removed, but for the last one


def test_starts_do_not_depend_on_a_collector_that_is_stopped_with_its_lock(archive: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "builds"
    run_python(START, archive, store, BUILD_LOG=str(log))
    (manifest,) = (store / "entries").rglob("manifest.json")
    collector = start_python(EVICT, store, "stopped")
    assert wait_until(lambda: is_stopped(collector.pid))
    serving = start_python(SERVE, archive, store, BUILD_LOG=str(log))
    assert serving.stdout is not None
    facts = json.loads(serving.stdout.readline())
    assert (facts["result"], facts["counters"]["miss"]) == ("hit", 0)
    serving.stdout.readline()
    collector.send_signal(signal.SIGCONT)
    finish(collector)
    assert not manifest.exists()
    assert log.read_text().count("begin") == 1
    serving.kill()
    serving.communicate()
    assert json.loads(run_python(START, archive, store, BUILD_LOG=str(log)))["result"] == "built"
