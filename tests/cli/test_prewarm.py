"""`ts-handlers prewarm` says what it has built, and ends with 1 when something fell back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.cli.verbs import prewarm as verb
from ts_handlers.servers.torchserve.prewarm import Prewarmed

Run = Callable[..., Any]
BUILT = Prewarmed("m", "built", "aot_inductor", "ab12", published=True, device="cpu", seconds=2.0)
FELL = {"backend": "aot_inductor", "reason": "BuildError: no export"}


@pytest.mark.parametrize(
    ("done", "code", "parts"),
    [
        (BUILT, ExitCode.OK, ["m: aot_inductor on cpu: built, key ab12, 2.0 s"]),
        (Prewarmed("m", "hit", "inductor", "ab12", published=True, device="cpu"), ExitCode.OK, ["already there"]),
        (
            Prewarmed("m", "built", "inductor", "ab12", published=True, device="cpu", fallbacks=(FELL,)),
            ExitCode.FINDINGS,
            ["inductor on cpu: built", "aot_inductor fell back: BuildError: no export"],
        ),
        (
            Prewarmed("m", "built", "inductor", "ab12", device="cpu", notes=("disk full",)),
            ExitCode.FINDINGS,
            ["not published: disk full"],
        ),
        (Prewarmed("m", "eager", "eager", fallbacks=(FELL,)), ExitCode.FINDINGS, ["no backend works", "no export"]),
        (Prewarmed("m", "failed", reason="killed"), ExitCode.FINDINGS, ["m: failed: killed"]),
    ],
    ids=lambda value: value.result if isinstance(value, Prewarmed) else "",
)
def test_sentences(done: Prewarmed, code: ExitCode, parts: list[str]) -> None:
    text = verb._sentence(done)
    assert all(part in text for part in parts), text
    assert (ExitCode.OK if done.ok else ExitCode.FINDINGS) == code


def test_what_is_no_archive_is_a_usage_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.mar").write_text("no archive")
    result = run("prewarm", tmp_path / "text.mar", "--store", tmp_path / "store")
    assert result.code == ExitCode.USAGE
    assert "expected a zip file" in result.err
    assert not (tmp_path / "store").exists()
