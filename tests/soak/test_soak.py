"""A short soak of each kind, with a fixed seed; and that the proofs can fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.soak import race
from tests.soak.subject import Subject
from tests.soak.tally import Tally
from tests.support.subprocesses import run_python

pytestmark = pytest.mark.processes

SOAK = """
    import sys
    from tests.soak.command import main
    sys.exit(main(sys.argv[1:]))
"""
SHORT = {"race": 150, "race-hosts": 25, "flip": 50, "fuzz": 350, "faults": 40, "clocks": 12}


@pytest.mark.parametrize("part", SHORT)
def test_short_soak(part: str) -> None:
    if part in ("faults", "clocks") and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    out = run_python(SOAK, part, "--trials", SHORT[part], "--seed", "7")
    line = out.splitlines()[-1]
    assert line.startswith("soak: ")
    assert int(line.split()[1]) >= SHORT[part]
    for zero in ("wrong answers", "partial reads", "lost entries", "duplicate builds", "crashes", "escaped errors"):
        assert f" 0 {zero}" in line


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
