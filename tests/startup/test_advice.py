"""The one line of a start that fell back: it names what serves, the reason and what to do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.support.starts import Start
from ts_handlers.errors import BuildError, CanaryError
from ts_handlers.execution.outcome import Outcome
from ts_handlers.startup.advice import fallback_line

pytestmark = pytest.mark.usefixtures("backend")


def fell_back(backend: str, reason: str) -> Outcome:
    return Outcome("eager", None, "eager", fallbacks=({"backend": backend, "reason": reason},))


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("BuildError: no export", "ts-handlers doctor"),
        ("RuntimeError: the compiler crashed", "leave the backend out of handler.ts_handlers.backends"),
        ("CanaryError: another output", "handler.ts_handlers.canary"),
        ("QuarantinedError: crashed twice", "ts-handlers unquarantine"),
        ("FailedBeforeError: failed before", "ts-handlers prewarm"),
        ("SampleError: index out of range", "limits of the values in handler.ts_handlers.inputs"),
    ],
)
def test_the_line_ends_with_what_to_do(reason: str, advice: str) -> None:
    line = fallback_line("net", fell_back("aot_inductor", reason))
    assert line is not None
    assert line.startswith(f"net: fell back: eager serves, and not aot_inductor: {reason}. What to do: ")
    assert advice in line.partition("What to do: ")[2]


def test_reasons_that_say_it_themselves_stand_alone_and_lines_are_bounded() -> None:
    line = fallback_line("net", fell_back("aot_inductor", "SettingsError: inputs: declare them"))
    assert line == "net: fell back: eager serves, and not aot_inductor: SettingsError: inputs: declare them"
    assert fallback_line("net", Outcome("aot_inductor", "k", "hit")) is None
    long = fallback_line("net", fell_back("aot_inductor", "BuildError: " + "a\n" * 10_000))
    assert long is not None
    assert len(long) < 1000
    assert "\n" not in long


def test_a_store_that_cannot_be_used_is_named(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        start(store=str(tmp_path / "file"))
    (line,) = [text for text in caplog.messages if "fell back: " in text]
    assert "a temporary store is used" in line
    assert "make the store writable" in line


@pytest.mark.parametrize("error", [BuildError("no export"), CanaryError("another output")])
def test_a_start_that_fell_back_logs_one_such_line(
    error: Exception, start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(backend, "build", fail)
    with caplog.at_level(logging.WARNING):
        start()
    (line,) = [text for text in caplog.messages if "fell back: " in text]
    assert f"eager serves, and not aot_inductor: {type(error).__name__}: {error}. What to do: " in line
