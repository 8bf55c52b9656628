"""Which ends of a process a call that ran alone can have caused."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ts_handlers.model_process import blame
from ts_handlers.model_process.folder import Folder, Holder

HOLDER = Holder(7, 8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(blame, "EVIDENCE_SECONDS", 0.0)
    monkeypatch.setattr(blame, "oom_kills", lambda: 3)
    return Folder(tmp_path)


@pytest.mark.parametrize("number", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"])
def test_a_fault_is(number: str, folder: Folder) -> None:
    folder.write_ended(HOLDER, -getattr(signal, number))
    assert blame.what_ended_it(folder, HOLDER, 3) == f"was killed by {number}"
    assert blame.what_ended_it(folder, Holder(7, 9), 3) is None  # another process of that number


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, 0, blame.HANGS_STATUS])
def test_what_comes_from_outside_is_not(code: int, folder: Folder) -> None:
    folder.write_ended(HOLDER, code)
    assert blame.what_ended_it(folder, HOLDER, 3) is None


def test_exit_and_lack_of_memory_are(folder: Folder) -> None:
    folder.write_ended(HOLDER, 9)
    assert blame.what_ended_it(folder, HOLDER, 3) == "ended with status 9"
    folder.write_ended(HOLDER, -signal.SIGKILL)
    assert blame.what_ended_it(folder, HOLDER, 2) == "was killed for lack of memory"
    assert blame.what_ended_it(folder, HOLDER, None) is None


@pytest.mark.parametrize(("cause", "blamed"), [("silent", True), ("stopped", False)])
def test_a_worker_that_ended_it_says_why(cause: str, blamed: bool, folder: Folder) -> None:
    folder.write_killed(HOLDER, cause)
    folder.write_ended(HOLDER, -signal.SIGKILL)
    assert (blame.what_ended_it(folder, HOLDER, 3) is not None) == blamed


def test_no_word_is_no_evidence(folder: Folder) -> None:
    assert blame.what_ended_it(folder, HOLDER, 3) is None
