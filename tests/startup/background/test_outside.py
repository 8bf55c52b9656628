"""A build process makes the model from the variables and files that the server's has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.background_builds import Start, settled
from tests.support.models import LINEAR, archive_source, settings_of, write_archive
from ts_handlers.backends import get_backend
from ts_handlers.errors import BuildError
from ts_handlers.startup.address import key_in_store
from ts_handlers.startup.build_child import _check_keys
from ts_handlers.startup.target import new_target
from ts_handlers.store.local.store import LocalStore

pytestmark = pytest.mark.usefixtures("cheap_backends")

READING = LINEAR.replace("import torch\n", "import os\nimport torch\n").replace(
    "        self.layer", "        self.tag = os.environ.setdefault('MODEL_TAG', 'first')\n        self.layer"
)


@pytest.mark.processes
def test_the_child_builds_under_the_servers_key(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the model has set the variable in the server since, and the child inherits that."""
    monkeypatch.delenv("MODEL_TAG", raising=False)
    write_archive(archive, READING)
    os.environ.pop("MODEL_TAG", None)
    facts = settled(start(), archive)
    assert (facts["backend"], facts["result"]) == ("aot_inductor", "swapped"), facts["background"]
    assert os.environ["MODEL_TAG"] == "first"
    os.environ.pop("MODEL_TAG")
    again = start()
    assert (again.outcome.result, again.outcome.key) == ("hit", facts["key"])
    monkeypatch.setenv("MODEL_TAG", "second")
    other = start()
    assert (other.outcome.result, other.outcome.missed) == ("background", ("outside",))
    assert settled(other, archive)["result"] == "swapped"


def test_a_variable_that_only_the_server_has_is_named(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(store=str(tmp_path / "store"), key_environment=["ONLY_THERE", "HERE_TOO"])
    monkeypatch.setenv("HERE_TOO", "1")
    monkeypatch.setenv("ONLY_THERE", "1")
    there = new_target(archive_source(archive), settings, torch.device("cpu"))
    key = key_in_store(get_backend("aot_inductor"), there, LocalStore(tmp_path / "store"))
    expected = {"aot_inductor": [list(part) for part in key.parts]}
    _check_keys(new_target(archive_source(archive), settings, torch.device("cpu")), expected)
    monkeypatch.delenv("ONLY_THERE")
    with pytest.raises(BuildError, match="outside: 'variable:ONLY_THERE=") as raised:
        _check_keys(new_target(archive_source(archive), settings, torch.device("cpu")), expected)
    assert "HERE_TOO" not in str(raised.value)
