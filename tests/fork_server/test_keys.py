"""A start in a process of the fork server has the key of an ordinary one, whatever the fork server has imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server.conftest import MakePlace, Place
from tests.support.file_backend import START
from tests.support.models import write_archive
from ts_handlers.servers.torchserve.workers import preloaded_modules

MODEL = """
import os
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        if os.environ.get("LAYERS") == "two":
            import yaml  # which the fork server has imported by now
        import fork_server_helpers as helpers
        self.layer = torch.nn.Linear(4, 3)
        self.scale = helpers.SCALE

    def forward(self, x):
        return self.layer(x)
"""


def described(place: Place, forked: bool, *arguments: object, **changes: str) -> dict[str, Any]:
    code, out, err = place.run(f"import sys\nif True:\n{START}", *arguments, forked=forked, **changes)
    assert code == 0, err
    assert "starts without the fork server" not in err
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


def test_builds_of_either_are_hits_of_the_other(
    make: MakePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers = {"fork_server_helpers": "SCALE = 2.0"}
    place = make(*preloaded_modules(["yaml", "numpy.random", *helpers]), **helpers)
    monkeypatch.syspath_prepend(place.modules)
    archive = write_archive(tmp_path / "archive", MODEL)
    starts = [
        described(place, forked, archive, tmp_path / store)
        for store, forked in [("one", True), ("one", False), ("other", False), ("other", True)]
    ]
    assert [start["fallbacks"] for start in starts] == [[], [], [], []]
    assert len({start["key"] for start in starts}) == 1
    assert [start["result"] for start in starts] == ["built", "hit", "built", "hit"]
    assert [start["counters"]["build"] for start in starts] == [1, 0, 1, 0]
    assert all(start["answer"] == starts[0]["answer"] for start in starts)
