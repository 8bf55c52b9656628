"""What the trials start: a tiny archive with two sets of weights, and the judgement of a start."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.soak import forks
from tests.soak.tally import Tally
from tests.support import file_backend
from tests.support.models import LINEAR, TWO_LAYERS, archive_source, eager_model, settings_of, write_archive
from ts_handlers import register_backend, start_model
from ts_handlers.store.upkeep.scan import scan_entries

EXPECTED = ("CanaryError", "LoadError", "MissError", "QuarantinedError", "StoreError")
"""Errors of a start that end on the next backend as they should."""
INPUTS = [torch.ones(2, 4), torch.linspace(-3, 3, 20).reshape(5, 4)]


class Subject:
    """An archive, and what its model must answer.

    `real` builds with the real ``aot_inductor`` (minutes on a small machine); otherwise with the backend of the tests.
    """

    def __init__(self, folder: Path, *, real: bool) -> None:
        self.real = real
        self.archive = write_archive(folder / "archive", TWO_LAYERS if real else LINEAR)
        self.other = write_archive(folder / "other", TWO_LAYERS if real else LINEAR, seed=1)
        with torch.inference_mode():
            self.answers = {name: self._eager(name) for name in ("archive", "other")}

    def _eager(self, name: str) -> list[Any]:
        model = eager_model(getattr(self, name))
        return [model(tensor).tolist() for tensor in INPUTS]

    def start(self, root: Path, weights: str = "archive", **changes: Any) -> dict[str, Any]:
        """A start in this process; what it came to, JSON-compatible."""
        with backend_of(self.real):
            section = {"store": str(root), "backends": ["aot_inductor", "eager"], **changes}
            model = start_model(archive_source(getattr(self, weights)), settings_of(**section))
        expected = self.answers[weights]
        right = all(
            torch.allclose(model(tensor), torch.tensor(answer), rtol=1e-3, atol=1e-4)
            for tensor, answer in zip(INPUTS, expected, strict=True)
        )
        outcome = model.outcome
        if model.store is not None:
            model.store.write_back.wait()
        return {
            "right": right,
            "backend": outcome.backend,
            "result": outcome.result,
            "fallbacks": [fallback["reason"] for fallback in outcome.fallbacks],
            "notes": list(outcome.notes),
            "counters": dict(model.metrics.counters),
        }

    def prepare(self, root: Path) -> Path:
        """A store with the entry and the canary records of both sets of weights; returns the entry's folder."""
        for weights in ("archive", "other"):
            code, facts, text = forks.call(lambda weights=weights: self.start(root, weights), 900.0)  # type: ignore[misc]
            assert code == 0, text
            assert facts["right"], facts
            assert facts["result"] in ("built", "hit"), facts
        (entry,) = scan_entries(root)
        return entry.directory


@contextlib.contextmanager
def backend_of(real: bool) -> Iterator[None]:
    """``aot_inductor`` as it is, or the backend of the tests under its name."""
    if real:
        yield
        return
    before = register_backend("aot_inductor", f"{file_backend.__name__}:BACKEND")
    try:
        yield
    finally:
        register_backend("aot_inductor", before)


def judge(tally: Tally, what: str, result: tuple[int, Any, str], *, may_serve: bool) -> None:
    """Count a start that `forks.call` ran.

    `may_serve` is false when what was stored must not be used any more.
    """
    code, facts, text = result
    tail = " | ".join(text.strip().splitlines()[-3:])
    if code < 0:
        tally.trial("crash", f"{what}: signal {-code}: {text[-600:]}")
    elif code > 0:
        tally.trial("escaped", f"{what}: {tail}")
    elif not facts["right"]:
        tally.trial("wrong", f"{what}: {facts}")
    elif facts["result"] == "hit":
        tally.trial("served" if may_serve else "wrong", f"{what}: served although it was changed")
    elif facts["result"] == "built":
        tally.trial("rebuild")
    elif any(reason.split(":")[0] not in EXPECTED for reason in facts["fallbacks"]):
        tally.trial("escaped", f"{what}: {facts['fallbacks']}")
    else:
        tally.trial("refusal")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder, in which processes find their temporary folder, home and caches too."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder, before = Path(name), dict(os.environ)
        for variable, part in (("TMPDIR", "tmp"), ("HOME", "home"), ("XDG_CACHE_HOME", "cache")):
            (folder / part).mkdir(mode=0o700)
            os.environ[variable] = str(folder / part)
        os.environ.pop("TS_HANDLERS_CACHE", None)
        tempfile.tempdir = None
        try:
            yield folder
        finally:
            os.environ.clear()
            os.environ.update(before)
            tempfile.tempdir = None
