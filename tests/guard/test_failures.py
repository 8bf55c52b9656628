"""Failed builds: what kind they are, how long they hold, and who tries again."""

from __future__ import annotations

import errno
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ts_handlers import Settings
from ts_handlers.backends import get_backend
from ts_handlers.errors import BuildError, CanaryError, FailedBeforeError, LoadError, MissError
from ts_handlers.guard.failures import CIRCUMSTANTIAL, DETERMINISTIC, kind_of, remember_failure
from ts_handlers.guard.guard import Guard
from ts_handlers.guard.quarantine import read_quarantines
from ts_handlers.guard.records import FailedBuild
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.settings.sections import TensorRTSettings
from ts_handlers.store.upkeep.garbage import find_garbage

KEY = CacheKey((("format", "1"), ("backend", "aot_inductor")))


def guard_of(root: Path, retry_since: float | None = None) -> Guard:
    return Guard(root, Settings(), KEY, "model", lambda: "w1", retry_since)


def fail(root: Path, error: Exception) -> FailedBuild:
    """A build that fails; returns what is remembered of it."""
    with pytest.raises(type(error)), guard_of(root).remembered():
        raise error
    (record,) = read_quarantines(root)
    assert isinstance(record, FailedBuild)
    return record


def age(root: Path, seconds: float) -> None:
    """Let the failure be that long ago; negative: in the future, as after a clock was set back."""
    (path,) = (root / "quarantine").iterdir()
    facts: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "failed_at": time.time() - seconds}))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BuildError("torch.export: data-dependent control flow"), DETERMINISTIC),
        (NotImplementedError("aten::nonsense"), DETERMINISTIC),
        (subprocess.CalledProcessError(1, "g++"), DETERMINISTIC),
        (OSError(errno.ENOSPC, "No space left on device"), CIRCUMSTANTIAL),
        (OSError(errno.EIO, "Input/output error"), CIRCUMSTANTIAL),
        (MemoryError(), CIRCUMSTANTIAL),
        (TimeoutError("compile worker"), CIRCUMSTANTIAL),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), CIRCUMSTANTIAL),
        (subprocess.CalledProcessError(-9, "g++"), CIRCUMSTANTIAL),
        (BuildError("g++: fatal error: Killed signal terminated program cc1plus"), CIRCUMSTANTIAL),
        (BuildError("/tmp/x.s: No space left on device"), CIRCUMSTANTIAL),
        (caused(BuildError("compilation failed"), OSError(errno.ENOMEM, "Cannot allocate memory")), CIRCUMSTANTIAL),
    ],
)
def test_kind_of_an_error(error: Exception, kind: str, tmp_path: Path) -> None:
    assert kind_of(error) == kind
    assert fail(tmp_path, error).kind == kind


@pytest.mark.parametrize(
    ("kind", "took", "held"),
    [
        (DETERMINISTIC, 600.0, [3600, 7200, 14400, 28800, 57600, 86400, 86400]),
        (CIRCUMSTANTIAL, 5.0, [60, 120, 240, 480, 960, 1920, 3600, 3600]),
        (CIRCUMSTANTIAL, 700.0, [700, 1400, 2800, 3600]),
    ],
)
def test_each_further_failure_holds_twice_as_long(kind: str, took: float, held: list[float], tmp_path: Path) -> None:
    records = [remember_failure(tmp_path, "k" * 32, "m", "inductor", "no", kind, took) for _ in held]
    assert [record.held_seconds for record in records if record is not None] == held
    assert len(read_quarantines(tmp_path)) == 1


def test_a_failure_of_another_kind_starts_again(tmp_path: Path) -> None:
    assert fail(tmp_path, OSError(errno.ENOSPC, "full")).count == 1
    assert fail(tmp_path, OSError(errno.ENOSPC, "full")).count == 2
    assert (fail(tmp_path, BuildError("no")).count, fail(tmp_path, BuildError("no")).count) == (1, 2)


def test_it_holds_for_its_time_and_not_longer_whatever_the_clock_does(tmp_path: Path) -> None:
    held = fail(tmp_path, BuildError("no")).held_seconds
    for seconds, is_held in ((held - 30, True), (held + 1, False), (30 - held, True), (-held - 1, False)):
        age(tmp_path, seconds)
        if is_held:
            with pytest.raises(FailedBeforeError, match="tried again in"):
                guard_of(tmp_path).refuse()
        else:
            guard_of(tmp_path).refuse()
    assert fail(tmp_path, BuildError("no")).count == 2


def test_a_damaged_record_holds_for_a_day_at_most(tmp_path: Path) -> None:
    fail(tmp_path, BuildError("no"))
    (path,) = (tmp_path / "quarantine").iterdir()
    facts = {**json.loads(path.read_text()), "held_seconds": 1e300, "count": 10**9}
    path.write_text(json.dumps(facts))
    with pytest.raises(FailedBeforeError):
        guard_of(tmp_path).refuse()
    assert fail(tmp_path, BuildError("no")).held_seconds == 86400
    age(tmp_path, 86401)
    guard_of(tmp_path).refuse()


def test_who_tries_again_takes_what_failed_meanwhile_for_its_own_failure(tmp_path: Path) -> None:
    before = time.time()
    fail(tmp_path, BuildError("no"))
    guard_of(tmp_path, time.time()).refuse()
    with pytest.raises(FailedBeforeError, match="no"):
        guard_of(tmp_path, before).refuse()


@pytest.mark.parametrize(
    ("error", "unbuildable"), [(BuildError("no operator"), True), (LoadError("refused"), False), (MemoryError(), False)]
)
def test_a_plan_with_its_weights_inside_is_substituted_after_the_same_failures_as_at_first(
    error: Exception, unbuildable: bool, tmp_path: Path
) -> None:
    settings = Settings(tensorrt=TensorRTSettings(refit=True))
    backend = get_backend("tensorrt")
    fail(tmp_path, error)
    with pytest.raises(FailedBeforeError) as remembered:
        guard_of(tmp_path).refuse()
    assert remembered.value.unbuildable == unbuildable
    for each in (error, remembered.value):
        assert (backend.substitute(settings, each) is None) == unbuildable


def test_a_build_that_ends_well_removes_the_record(tmp_path: Path) -> None:
    fail(tmp_path, BuildError("no"))
    with guard_of(tmp_path).remembered():
        pass
    assert read_quarantines(tmp_path) == []


@pytest.mark.parametrize("error", [MissError("no entry"), CanaryError("wrong"), KeyboardInterrupt()])
def test_what_is_no_failure_of_a_build_is_not_remembered(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), guard_of(tmp_path).remembered():
        raise error
    assert read_quarantines(tmp_path) == []


def test_records_that_are_long_over_are_garbage(tmp_path: Path) -> None:
    fail(tmp_path, BuildError("no"))
    assert find_garbage(tmp_path, time.time() + 7 * 86400) == []
    (item,) = find_garbage(tmp_path, time.time() + 9 * 86400)
    assert item.remove() is None
    assert read_quarantines(tmp_path) == []
