"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import costs, file_backend, remembering_compiler, schedule, slow
from tests.support.models import write_archive
from ts_handlers import register_backend
from ts_handlers.store.local import verified

# Deadlines are durations, and a shared machine has no say about those.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("tests")

Register = Callable[[str, Any], None]


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, and in all that it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for mark, cost in costs.COSTS.items():
        config.addinivalue_line("markers", f"{mark}: {cost}")
    config.addinivalue_line("markers", f"{slow.MARK}: not in continuous integration, see tests/support/slow.py")
    costs.watch()
    if not hasattr(config, "workerinput"):  # workers of a test run with several have its PATH
        folder = tempfile.mkdtemp(prefix=remembering_compiler.PREFIX)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        remembering_compiler.install(folder)
        # A third less of a processor for each server: Java's second compiler pays in minutes, not in a test's seconds.
        os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")


@pytest.hookimpl(wrapper=True)  # before xdist reads the groups and pytest the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    costs.mark_all(items)
    slow.mark_all(items)
    if hasattr(config, "workerinput"):  # of a test run with several workers
        schedule.plan(items)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    costs.begin(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    yield
    costs.end()


@pytest.fixture(autouse=True)
def _no_shared_caches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep a user's own store out of the tests."""
    monkeypatch.setenv("TS_HANDLERS_CACHE", str(tmp_path_factory.getbasetemp() / "default-store"))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive with one linear layer."""
    return write_archive(tmp_path / "archive")


@pytest.fixture
def register() -> Iterator[Register]:
    """Registers a backend under a name, or in the place of a known one, until the test ends."""
    before: list[tuple[str, Any]] = []
    yield lambda name, location: before.append((name, register_backend(name, location)))
    for name, location in reversed(before):
        register_backend(name, location)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, register: Register) -> file_backend.FileBackend:
    """A fresh test backend in place of ``aot_inductor``."""
    register("aot_inductor", "tests.support.file_backend:BACKEND")
    fresh = file_backend.FileBackend()
    monkeypatch.setattr(file_backend, "BACKEND", fresh)
    return fresh


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests that were really computed by `KnownDigests`, in order."""
    computed: list[str] = []
    compute = verified.digest_stream

    def digest_stream(file: object) -> str:
        computed.append(compute(file))  # type: ignore[arg-type]
        return computed[-1]

    monkeypatch.setattr(verified, "digest_stream", digest_stream)
    return computed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, to fill it or to make it read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)
