"""The crash guard: processes that really die, and what the next one makes of it."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.costs import costs
from tests.support.marks import needs_root
from ts_handlers import Settings
from ts_handlers.errors import FailedBeforeError, QuarantinedError
from ts_handlers.guard import guard as guard_module
from ts_handlers.guard import markers as markers_module
from ts_handlers.guard.guard import Guard
from ts_handlers.guard.judgement import FORGIVEN
from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines
from ts_handlers.guard.records import Quarantine
from ts_handlers.guard.state_directory import fallback_directory
from ts_handlers.key.cache_key import CacheKey
from ts_handlers.settings import CanarySettings
from ts_handlers.settings.sections import GuardSettings
from ts_handlers.system.process_limits import oom_kills

KEY = CacheKey((("format", "1"), ("backend", "aot_inductor")))
DIGEST = "d16e57"
LIMITS = GuardSettings(load_seconds=300, load_memory_mb=64)
SHORT = GuardSettings(load_seconds=0.5, load_memory_mb=64)
libc = ctypes.PyDLL(None)  # its calls hold the GIL, as dlopen does


def exhaust_memory() -> None:
    """Allocate and touch memory as C code does that does not look at what malloc returns."""
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    while True:
        ctypes.memset(libc.malloc(1 << 20), 1, 1 << 20)


DEATHS: dict[str, Callable[[], Any]] = {
    "segmentation fault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "endless loop": lambda: libc.sleep(1000),
    "memory": exhaust_memory,
    "terminated": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a store; the folder for stores that cannot be written is the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the limit that runs, instead of a timer that would end this process."""
    running: list[float] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **options: running.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", running.clear)
    return running


def guard_of(root: Path, limits: GuardSettings = LIMITS) -> Guard:
    return Guard(root, Settings(guard=limits), KEY, "model", lambda: "w1")


@costs("processes")
def fork(function: Callable[[], None]) -> int:
    """Run a function in a child process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        function()
        os._exit(0)
    except (QuarantinedError, FailedBeforeError):
        os._exit(42)
    finally:
        os._exit(1)


def status_of(pid: int) -> int:
    """Exit code of a child; the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def attempt(
    root: Path, native: Callable[[], Any], phase: str = "load", digest: str = DIGEST, limits: GuardSettings = LIMITS
) -> None:
    """What a start does: refuse what is quarantined, then run native code."""
    guard = guard_of(root, limits)
    guard.refuse(digest)
    with guard.marked(phase, digest), guard.limited():
        native()


def die(root: Path, how: str, **options: Any) -> int:
    return status_of(fork(lambda: attempt(root, DEATHS[how], **options)))


def markers(root: Path) -> list[Path]:
    return sorted((root / "guards").glob("*"))


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("segmentation fault", -signal.SIGSEGV, "Segmentation fault while loading or warming up, .* bounded to 64 MiB"),
        ("abort", -signal.SIGABRT, "Aborted while loading"),
        ("endless loop", 1, "loading or warming up took longer than 0.5 s"),
        ("memory", -signal.SIGSEGV, "Segmentation fault .* bounded to 64 MiB"),
    ],
)
def test_what_kills_a_process_is_tried_once(how: str, status: int, reason: str, root: Path) -> None:
    assert die(root, how, limits=SHORT if how == "endless loop" else LIMITS) == status
    with pytest.raises(QuarantinedError, match=reason):
        guard_of(root).refuse(DIGEST)
    (record,) = read_quarantines(root)
    assert (record.key, record.model, record.phase, record.digest) == (KEY.digest, "model", "load", DIGEST)
    assert "test_guard.py" in record.details
    assert record.runtime["torch"]
    assert markers(root) == []
    assert die(root, "killed") == 42
    guard_of(root).refuse("another entry")
    guard_of(root).refuse()
    assert lift_quarantine(root, KEY.digest[:8]) == [record]
    guard_of(root).refuse(DIGEST)


def test_processes_that_die_together_leave_one_record(root: Path, tmp_path: Path) -> None:
    def together(me: str) -> None:
        (tmp_path / me).touch()
        while len(list(tmp_path.glob("ready*"))) < 3:
            time.sleep(0.01)
        ctypes.string_at(0)

    children = [fork(lambda me=f"ready{i}": attempt(root, lambda: together(me))) for i in range(3)]  # type: ignore[misc]
    assert [status_of(pid) for pid in children] == [-signal.SIGSEGV] * 3
    assert len(markers(root)) == 3
    restarted = [fork(lambda: attempt(root, DEATHS["segmentation fault"])) for _ in range(3)]
    assert [status_of(pid) for pid in restarted] == [42] * 3
    assert markers(root) == []
    assert {record.reason for record in read_quarantines(root)} == {read_quarantines(root)[0].reason}
    assert len(list((root / "quarantine").iterdir())) == 1


def test_a_process_asked_to_end_is_no_reason(root: Path) -> None:
    for _ in range(4):
        assert die(root, "terminated") == -signal.SIGTERM
        guard_of(root).refuse(DIGEST)
    assert markers(root) == []


@pytest.mark.parametrize("how", ["killed", "exit"])
@pytest.mark.parametrize("phase", ["load", "build"])
def test_deaths_without_a_trace_are_bounded(how: str, phase: str, root: Path) -> None:
    digest = DIGEST if phase == "load" else ""
    for _ in range(FORGIVEN[phase] + 1):
        assert die(root, how, phase=phase, digest=digest) == {"killed": -signal.SIGKILL, "exit": 3}[how]
    assert die(root, how, phase=phase, digest=digest) == 42
    assert "without a trace" in read_quarantines(root)[0].reason
    lift_quarantine(root, KEY.digest)
    assert die(root, how, phase=phase, digest=digest) != 42


def test_a_scale_down_kills_many_and_counts_once(root: Path) -> None:
    def scale_down(*, one_loads: bool) -> None:
        children = [fork(lambda: attempt(root, lambda: time.sleep(1000), limits=GuardSettings())) for _ in range(3)]
        while not set(children) <= {json.loads(path.read_text() or "{}").get("pid") for path in markers(root)}:
            time.sleep(0.01)
        guard_of(root).refuse(DIGEST)  # the living are not judged
        if one_loads:
            attempt(root, lambda: None)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        assert [status_of(pid) for pid in children] == [-signal.SIGKILL] * 3

    scale_down(one_loads=False)
    scale_down(one_loads=True)
    guard_of(root).refuse(DIGEST)
    assert read_quarantines(root) == []
    scale_down(one_loads=False)
    with pytest.raises(QuarantinedError, match="2 times in a row"):
        guard_of(root).refuse(DIGEST)
    assert markers(root) == []


def test_old_deaths_without_a_trace_are_forgotten(root: Path) -> None:
    assert die(root, "killed") == -signal.SIGKILL
    (marker,) = markers(root)
    os.utime(marker, (time.time() - 25 * 3600,) * 2)
    guard_of(root).refuse(DIGEST)
    assert markers(root) == []


def test_a_success_does_not_forgive_a_crash_of_another_process(root: Path) -> None:
    assert die(root, "segmentation fault") == -signal.SIGSEGV
    guard = guard_of(root)
    with guard.marked("load", DIGEST):
        assert len(markers(root)) == 2
    with pytest.raises(QuarantinedError):
        guard_of(root).refuse(DIGEST)


def test_python_errors_leave_nothing(root: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            attempt(root, lambda error=error: (_ for _ in ()).throw(error()))  # type: ignore[misc]
    assert markers(root) == []
    assert read_quarantines(root) == []


def test_another_runtime_tries_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert die(root, "abort") == -signal.SIGABRT
    with pytest.raises(QuarantinedError):
        guard_of(root).refuse(DIGEST)
    identity = {**guard_module.runtime_identity(), "libstdc++": "libstdc++.so.6.0.99"}
    monkeypatch.setattr(guard_module, "runtime_identity", lambda: identity)
    guard_of(root).refuse(DIGEST)
    assert die(root, "abort") == -signal.SIGABRT
    with pytest.raises(QuarantinedError):
        guard_of(root).refuse(DIGEST)
    assert len(read_quarantines(root)) == 2


def test_wrong_answers_count_for_the_weights_and_settings_that_gave_them(root: Path) -> None:
    guard_of(root).quarantine_canary(DIGEST, ValueError("too far"))
    with pytest.raises(QuarantinedError, match="ValueError: too far"):
        guard_of(root).refuse(DIGEST)
    Guard(root, Settings(guard=LIMITS), KEY, "model", lambda: "w2").refuse(DIGEST)
    lenient = Settings(canary=CanarySettings(tolerance=0.1))
    Guard(root, lenient, KEY, "model", lambda: "w1").refuse(DIGEST)


def test_a_store_that_cannot_be_written_is_guarded_from_the_temporary_folder(root: Path) -> None:
    (root / "guards").write_text("in the way")
    (root / "quarantine").write_text("in the way")
    assert die(root, "segmentation fault") == -signal.SIGSEGV
    assert die(root, "segmentation fault") == 42
    (record,) = read_quarantines(root)
    assert (fallback_directory(root) / "quarantine" / record.file_name).exists()
    assert lift_quarantine(root, "") == [record]
    assert die(root, "segmentation fault") == -signal.SIGSEGV


def test_without_any_place_for_a_marker_the_model_is_served_and_not_limited(root: Path, timers: list[float]) -> None:
    for folder in (root, fallback_directory(root)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "guards").write_text("in the way")
    fallback_directory(root).parent.chmod(0o700)
    guard = guard_of(root, GuardSettings(load_seconds=0.01, load_memory_mb=1))
    with guard.marked("load", DIGEST), guard.limited():
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
        assert timers == []
    assert guard.problem is not None
    assert "no crash guard" in guard.problem


def test_a_temporary_folder_that_others_can_write_is_not_used(root: Path) -> None:
    (root / "guards").write_text("in the way")
    fallback_directory(root).parent.mkdir(mode=0o777)
    fallback_directory(root).parent.chmod(0o777)
    guard = guard_of(root)
    with guard.marked("load", DIGEST):
        assert guard.problem is not None


@pytest.mark.parametrize(
    "text",
    [b"{", b'{"key": "\xff"}', b'{"other": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"],
    ids=["truncated", "no UTF-8", "nested"],
)
def test_damaged_files_are_ignored(text: bytes, root: Path) -> None:
    for folder, name in (("guards", f"{KEY.digest}.torn"), ("quarantine", f"{KEY.digest}-torn.json")):
        (root / folder).mkdir()
        (root / folder / name).write_bytes(text)
    attempt(root, lambda: None)
    assert read_quarantines(root) == []


def test_marker_that_names_another_key_is_no_record(root: Path) -> None:
    """A record's file is named after the key that its marker holds, which damage must not turn into a path."""
    assert die(root, "abort") == -signal.SIGABRT
    (path,) = markers(root)
    path.write_bytes(path.read_bytes().replace(KEY.digest.encode(), b"../../" + KEY.digest.encode()[6:]))
    attempt(root, lambda: None)
    assert read_quarantines(root) == []
    assert not list(root.parent.rglob("*.json"))


def test_limits_end_with_the_block(root: Path, timers: list[float]) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), faulthandler.is_enabled()
    guard = guard_of(root, GuardSettings(load_seconds=200, load_memory_mb=32))
    with guard.marked("load", DIGEST):
        with guard.limited():
            bound = resource.getrlimit(resource.RLIMIT_DATA)[0]
            assert timers == [200.0]
            with pytest.raises(MemoryError):
                bytearray(64 << 20)
        bytearray(64 << 20)
        assert timers == []
    assert bound != resource.RLIM_INFINITY
    assert (resource.getrlimit(resource.RLIMIT_DATA), faulthandler.is_enabled()) == before


def test_the_automatic_limit_grows_with_the_build(root: Path, timers: list[float]) -> None:
    seen: list[float] = []
    guard = guard_of(root, GuardSettings())
    for build_seconds in (1.0, 500.0):
        with guard.marked("load", DIGEST, build_seconds), guard.limited():
            seen += timers
    assert seen == [120.0, 1000.0]


@pytest.mark.parametrize(
    ("group", "file", "text"),
    [
        ("0::/a/b\n", "a/b/memory.events", "low 0\nmax 3\noom 2\noom_kill 2\noom_group_kill 1\n"),
        ("0::/a/b\n", "memory.events", "oom_kill 2\n"),
        (
            "3:cpu:/x\n4:memory:/x\n0::/\n",
            "memory/x/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        ),
    ],
)
def test_kills_by_the_kernel_are_counted(group: str, file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(group)
    path = tmp_path / "mount" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert oom_kills(tmp_path / "cgroup", tmp_path / "mount") == 2
    assert oom_kills(tmp_path / "nothing", tmp_path / "mount") is None


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many processes the kernel has killed in this control group, 3 before."""
    monkeypatch.setattr(guard_module, "oom_kills", lambda: 3)
    for module in (guard_module, markers_module):
        monkeypatch.setattr(module, "memory_group", lambda: "this container")
    monkeypatch.setattr(markers_module, "oom_kills", lambda: 3)
    return lambda count: monkeypatch.setattr(markers_module, "oom_kills", lambda: count)


def test_a_kill_by_the_kernel_is_a_reason_at_once(root: Path, kills: Callable[[int], None]) -> None:
    assert die(root, "killed") == -signal.SIGKILL
    guard_of(root).refuse(DIGEST)
    kills(4)
    with pytest.raises(QuarantinedError, match="killed by the kernel for lack of memory while loading"):
        guard_of(root).refuse(DIGEST)


def test_a_kill_by_the_kernel_of_somebody_else_is_none(
    root: Path, kills: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older death, one in another container, one of another boot, and one kill for two deaths."""
    assert die(root, "killed") == -signal.SIGKILL
    kills(4)
    (marker,) = markers(root)
    now = time.time()
    os.utime(marker, (now - 3600,) * 2)
    guard_of(root).refuse(DIGEST)
    os.utime(marker, (now,) * 2)
    with monkeypatch.context() as patch:
        patch.setattr(markers_module, "memory_group", lambda: "another container")
        guard_of(root).refuse(DIGEST)
    with monkeypatch.context() as patch:
        patch.setattr(markers_module, "boot_id", lambda: "another boot")
        guard_of(root).refuse(DIGEST)
    other = marker.with_name(f"{'0' * 32}.other")
    other.write_bytes(marker.read_bytes().replace(KEY.digest.encode(), b"0" * 32))
    guard_of(root).refuse(DIGEST)
    assert read_quarantines(root) == []
    other.unlink()
    with pytest.raises(QuarantinedError, match="lack of memory"):
        guard_of(root).refuse(DIGEST)


def test_a_certain_cause_is_not_replaced_by_an_uncertain_one(root: Path, kills: Callable[[int], None]) -> None:
    """Two workers load at once: one crashes, and afterwards the kernel kills the other one for lack of memory."""
    other = fork(lambda: attempt(root, lambda: time.sleep(1000), limits=GuardSettings()))
    while other not in {json.loads(path.read_text() or "{}").get("pid") for path in markers(root)}:
        time.sleep(0.01)
    assert die(root, "segmentation fault") == -signal.SIGSEGV
    with pytest.raises(QuarantinedError, match="Segmentation fault"):
        guard_of(root).refuse(DIGEST)
    (before,) = read_quarantines(root)
    os.kill(other, signal.SIGKILL)
    assert status_of(other) == -signal.SIGKILL
    kills(4)
    with pytest.raises(QuarantinedError, match="Segmentation fault"):
        guard_of(root).refuse(DIGEST)
    assert read_quarantines(root) == [before]
    assert markers(root) == []


def test_a_marker_of_an_older_version_is_read_and_blames_nobody_for_memory(
    root: Path, kills: Callable[[int], None]
) -> None:
    assert die(root, "killed") == -signal.SIGKILL
    kills(4)
    (marker,) = markers(root)
    facts = json.loads(marker.read_bytes())
    for name in ("thread", "boot", "group", "free"):
        del facts[name]
    marker.write_text(json.dumps(facts) + "\n")
    guard_of(root).refuse(DIGEST)
    assert read_quarantines(root) == []
    kills(3)
    assert die(root, "killed") == -signal.SIGKILL
    with pytest.raises(QuarantinedError, match="2 times in a row"):
        guard_of(root).refuse(DIGEST)


def quarantine_without_a_trace(root: Path) -> Quarantine:
    for _ in range(FORGIVEN["load"] + 1):
        assert die(root, "killed") == -signal.SIGKILL
    with pytest.raises(QuarantinedError, match="without a trace"):
        guard_of(root).refuse(DIGEST)
    (record,) = read_quarantines(root)
    assert isinstance(record, Quarantine)
    return record


def change(root: Path, **fields: Any) -> None:
    """Rewrite the only record."""
    (path,) = (root / "quarantine").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_quarantine_without_a_trace_ends_after_a_day_and_then_after_two(root: Path) -> None:
    assert quarantine_without_a_trace(root).held_seconds == 86400
    change(root, failed_at=time.time() - 86401)
    guard_of(root).refuse(DIGEST)
    again = quarantine_without_a_trace(root)
    assert (again.count, again.held_seconds) == (2, 2 * 86400)
    change(root, failed_at=time.time() - 86401)
    with pytest.raises(QuarantinedError):
        guard_of(root).refuse(DIGEST)
    change(root, failed_at=time.time() - 2 * 86401)
    attempt(root, lambda: None)
    assert read_quarantines(root) == []  # it loads: the next one begins with a day again


@pytest.mark.parametrize("years", [-30, 30])
def test_a_wrong_clock_keeps_no_death_without_a_trace_alive(years: int, root: Path) -> None:
    wrong = time.time() + years * 365.25 * 86400
    quarantine_without_a_trace(root)
    change(root, failed_at=wrong)
    guard_of(root).refuse(DIGEST)
    lift_quarantine(root, KEY.digest)
    assert die(root, "killed") == -signal.SIGKILL
    (marker,) = markers(root)
    os.utime(marker, (wrong,) * 2)
    guard_of(root).refuse(DIGEST)
    assert markers(root) == []


def test_a_record_without_a_trace_of_an_older_version_ends_too(root: Path) -> None:
    quarantine_without_a_trace(root)
    old = {"count": 1, "failed_at": 0.0, "held_seconds": 0.0}
    change(root, **old)
    with pytest.raises(QuarantinedError):
        guard_of(root).refuse(DIGEST)
    change(root, **old, time="2024-01-01T00:00:00Z")
    guard_of(root).refuse(DIGEST)
    assert die(root, "segmentation fault") == -signal.SIGSEGV
    change(root, **old)  # a cause is no matter of time
    with pytest.raises(QuarantinedError, match="Segmentation fault"):
        guard_of(root).refuse(DIGEST)


def test_a_crash_in_another_thread_is_not_the_artifacts(root: Path) -> None:
    def crash_elsewhere() -> None:
        threading.Thread(target=ctypes.string_at, args=(0,)).start()
        time.sleep(1000)

    assert status_of(fork(lambda: attempt(root, crash_elsewhere))) == -signal.SIGSEGV
    guard_of(root).refuse(DIGEST)
    assert read_quarantines(root) == []
    assert status_of(fork(lambda: attempt(root, crash_elsewhere))) == -signal.SIGSEGV  # bounded all the same
    with pytest.raises(QuarantinedError, match="2 times in a row"):
        guard_of(root).refuse(DIGEST)


@pytest.mark.parametrize("reused", [False, True])
def test_native_code_that_closes_descriptors_fails_no_load(reused: bool, root: Path, tmp_path: Path) -> None:
    """As daemonizing code does, which closes everything above 2."""
    guard = guard_of(root)
    with guard.marked("load", DIGEST):
        descriptor = guard._descriptor
        assert descriptor is not None
        with guard.limited():
            os.close(descriptor)
        if reused:
            foreign = os.open(tmp_path / "foreign", os.O_RDWR | os.O_CREAT)
            if foreign != descriptor:
                os.dup2(foreign, descriptor)
                os.close(foreign)
    assert markers(root) == []
    if reused:
        os.write(descriptor, b"still open")
        os.close(descriptor)
        assert (tmp_path / "foreign").read_bytes() == b"still open"


def test_a_crash_after_native_code_has_closed_descriptors_is_still_seen(root: Path) -> None:
    def attempt_twice() -> None:
        guard = guard_of(root)
        with guard.marked("load", DIGEST):
            with guard.limited():
                os.closerange(3, 200)
            with guard.limited():
                ctypes.string_at(0)

    assert status_of(fork(attempt_twice)) == -signal.SIGSEGV
    with pytest.raises(QuarantinedError, match="Segmentation fault"):
        guard_of(root).refuse(DIGEST)


@needs_root
@pytest.mark.parametrize("how", ["abort", "killed"])
def test_a_build_that_dies_on_a_full_disk_is_tried_again_when_there_is_room(
    how: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = small_disk / "store"
    root.mkdir()

    def build() -> None:
        with guard_of(root).marked("build"):
            DEATHS[how]()

    for times in (1, 2):
        assert status_of(fork(build)) == {"abort": -signal.SIGABRT, "killed": -signal.SIGKILL}[how]
        with pytest.raises(FailedBeforeError, match=rf"no space left, \d+ bytes in {root}: .*while building"):
            guard_of(root).refuse()
        (record,) = read_quarantines(root)
        assert (record.phase, record.count) == ("build", times)
    for size, full in (("8m", False), ("64k", True)):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
        with pytest.raises(FailedBeforeError) if full else contextlib.nullcontext():
            guard_of(root).refuse()
