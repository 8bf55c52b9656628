"""A short soak of each kind, with a fixed seed; and that the proofs can fail."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.soak import blame, descriptors, faults, process, race
from tests.soak.command import PARTS, _run_all
from tests.soak.subject import Subject
from tests.soak.tally import MUST_BE_ZERO, Tally
from tests.support import workers
from tests.support.subprocesses import run_python
from ts_handlers.guard import judgement, markers
from ts_handlers.model_process import blame as call_blame
from ts_handlers.store.local import lease

pytestmark = pytest.mark.processes

SOAK = """
    import sys
    from tests.soak.command import main
    sys.exit(main(sys.argv[1:]))
"""
SHORT = {
    "race": 150,
    "race-hosts": 25,
    "flip": 50,
    "fuzz": 350,
    "faults": 40,
    "clocks": 12,
    "requests": 60,
    "blame": 300,
    "descriptors": 20,
    "process": 24,
}
NEEDS_COMPILER = ("faults", "clocks")


@pytest.mark.parametrize("part", SHORT)
def test_short_soak(part: str) -> None:
    if part in NEEDS_COMPILER and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    if part == "requests":
        pytest.importorskip("ts", reason="TorchServe is not installed")
    out = run_python(SOAK, part, "--trials", SHORT[part], "--seed", "7")
    line = out.splitlines()[-1]
    assert line.startswith("soak: ")
    assert int(line.split()[1]) >= SHORT[part]
    for zero in MUST_BE_ZERO.values():
        assert f" 0 {zero}" in line


def test_the_shares_of_the_parts_are_a_whole() -> None:
    assert sum(share for _, share in PARTS.values()) == pytest.approx(1)
    assert set(PARTS) - {"flip-real"} == set(SHORT)


def test_parts_that_run_at_once_are_counted_as_one_after_the_other() -> None:
    parts = {"blame": 40, "no such part": 1}
    found = {name: tally for name, tally, _ in _run_all(parts, 7, 2)}
    (_, alone, _) = next(_run_all({"blame": 40}, 7, 1))
    assert (found["blame"].trials, found["blame"].counts) == (40, alone.counts)
    assert found["no such part"].counts == {"crash": 1}
    assert "KeyError" in found["no such part"].failures[0]


def _blame(tmp_path: Path) -> Tally:
    tally = Tally()
    blame.run(tally, tmp_path, 7, 400)
    return tally


def test_good_artifacts_that_are_blamed_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _blame(tmp_path).clean
    monkeypatch.setattr(markers, "FRESH_SECONDS", 1e12)  # any later kill by the kernel counts
    assert _blame(tmp_path).counts["blamed"] > 0
    monkeypatch.undo()
    monkeypatch.setattr(markers.CrashRecord, "_ended_in_another_thread", False)
    assert _blame(tmp_path).counts["blamed"] > 0
    monkeypatch.undo()
    monkeypatch.setattr(judgement, "full_folder", lambda *measured: None)
    assert _blame(tmp_path).counts["blamed"] > 0
    monkeypatch.undo()
    monkeypatch.setattr(call_blame, "_FAULTS", {*call_blame._FAULTS, signal.SIGKILL})
    assert _blame(tmp_path).counts["blamed"] > 0


def test_causes_that_are_forgotten_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judgement, "FORGIVEN", {"build": 3, "load": 2})
    assert _blame(tmp_path).counts["forgotten"] > 0


def test_files_of_others_that_are_closed_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally()
    monkeypatch.setattr(lease, "close_if_same", lambda descriptor, identity: os.close(descriptor))
    descriptors.run(tally, tmp_path, 7, 20)
    assert tally.counts["neighbour"] > 0


def test_good_entries_that_a_transient_error_costs_are_found(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    code = """
    import sys
    from tests.soak import faults
    from tests.soak.command import main
    from ts_handlers.store.local import store
    store.READ_ATTEMPTS, store._DAMAGE = 1, (5,)  # one EIO in a lookup is damage
    faults.FAULTS = faults.FAULTS[:1]
    all_operations = faults.Operations.all
    faults.Operations.all = lambda self: {"hit": all_operations(self)["hit"]}
    main(["faults", "--trials", "60", "--seed", "7"])
    """
    library = faults.build_library(tmp_path)
    line = run_python(code, fresh=True, LD_PRELOAD=str(library)).splitlines()[-1]
    found = re.search(r"(\d+) lost entries", line)
    assert found is not None
    assert int(found[1]) > 0


def test_innocent_calls_that_are_blamed_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that take any SIGKILL for the fault of the call that ran alone."""
    seeded = "import signal\nfrom ts_handlers.model_process import blame\nblame._FAULTS.add(signal.SIGKILL)\n"
    monkeypatch.setattr(workers, "WORKER", seeded + workers.WORKER)
    monkeypatch.setattr(process, "CALLS", {-0.3: 1})
    monkeypatch.setattr(process, "DISTURBANCES", {"storm": 1})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tally = Tally()
    process.run(tally, tmp_path, 7, 20)
    assert tally.counts["blamed"] > 0
    assert tally.trials >= 20


def _events(tmp_path: Path, subject: Subject, life: Any) -> Tally:
    """What the examination says when every worker's life is `life`."""
    tally = Tally()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(race.LIVES, "worker", life)
        patched.setattr(race, "KINDS", {"worker": 1})
        patched.setattr(race, "_disturb", lambda *arguments: None)
        race.round_of(tally, tmp_path, subject, 1, 8, 1, 4)
    return tally


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(tmp_path / "subject", real=False)


def test_builds_without_a_lease_are_found(tmp_path: Path, subject: Subject) -> None:
    @contextlib.contextmanager
    def no_lease(*arguments: object) -> Iterator[Any]:
        from ts_handlers.store.local.lease import Lease

        yield Lease(None, 0.0)

    begun = tmp_path / "begun"
    begun.mkdir()

    def life(world: race.World, log: race.Log, host: Path, rng: Any) -> None:
        store = world.store(host)
        staging = store.staging

        @contextlib.contextmanager
        def with_another(where: Any) -> Iterator[Path]:
            """Go on when a second build has begun, which the lease would have prevented."""
            (begun / str(os.getpid())).touch()
            for _ in range(6000):
                if len(os.listdir(begun)) > 1:
                    break
                time.sleep(0.01)
            with staging(where) as directory:
                yield directory

        store.lease, store.staging = no_lease, with_another
        race.build(world, log, store, host, race.address(0), rng)

    assert _events(tmp_path, subject, life).counts["duplicate"] > 0


def test_entries_that_somebody_takes_away_are_found(tmp_path: Path, subject: Subject) -> None:
    def life(world: race.World, log: race.Log, host: Path, rng: Any) -> None:
        where = race.address(os.getpid())
        store = world.store(host)
        race.build(world, log, store, host, where, rng)
        shutil.rmtree(store.lookup(where).directory)

    assert _events(tmp_path, subject, life).counts["lost"] == 8


def test_lookups_that_do_not_find_what_is_there_are_found(tmp_path: Path, subject: Subject) -> None:
    def life(world: race.World, log: race.Log, host: Path, rng: Any) -> None:
        where = race.address(os.getpid())
        race.build(world, log, world.store(host), host, where, rng)
        log.write("lookup", key=where.key.digest, began=1e12, ended=1e12, found="Miss", nonce=None, host=host.name)

    assert _events(tmp_path, subject, life).counts["lost"] == 8
