"""`explain`: which part of two keys differs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.entries import address, publish
from tests.support.models import LINEAR_SECTION
from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.store.local.store import LocalStore

Run = Callable[..., Any]

CONFIG = "model-config.yaml"
HANDLER = """
from ts_handlers import CompiledHandler

print("what an archive prints is no answer")


class Handler(CompiledHandler):
    pass
"""


def test_explain_names_the_part_and_the_words_that_differ(run: Run, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    keys = []
    for device in ("x86_64 avx avx2", "x86_64 avx"):
        publish(store, address(device=device))
        keys.append(address(device=device).key.digest)
    result = run("explain", *keys, "--store", store.root, "--json")
    assert result.code == ExitCode.FINDINGS
    assert result.json[0]["differs"] == [{"part": "device", "left": "x86_64 avx avx2", "right": "x86_64 avx"}]
    table = run("explain", keys[0][:10], keys[1][:10], "--store", store.root)
    assert "avx2" in table.out
    assert "x86_64" not in table.out
    same = run("explain", keys[0], keys[0], "--store", store.root)
    assert same.code == 0
    assert "the same key" in same.out


def test_explain_of_a_damaged_entry_says_so(run: Run, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    (publish(store, address()) / "manifest.json").write_text("{")
    key = address().key.digest
    result = run("explain", key, key, "--store", store.root)
    assert result.code == ExitCode.USAGE
    assert "damaged" in result.err


@pytest.fixture
def served(archive: Path, filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder, which a TorchServe worker has served once from a store beside other entries."""
    pytest.importorskip("ts", reason="TorchServe is not installed")
    from tests.support.handlers import make_context

    section = {**LINEAR_SECTION, "backends": ["aot_inductor", "eager"], "store": str(filled)}
    (archive / "explained_handler.py").write_text(HANDLER)
    (archive / "model-config.yaml").write_text(json.dumps({"handler": {"ts_handlers": section}}))  # JSON is YAML
    names = {"modelName": "served", "modelFile": "model.py", "serializedFile": "model.pt", "configFile": CONFIG}
    (archive / "MAR-INF").mkdir()
    manifest = {"model": {**names, "handler": "explained_handler.py"}}
    (archive / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    monkeypatch.syspath_prepend(str(archive))
    sys.modules.pop("explained_handler", None)  # of another test's archive
    handler = importlib.import_module("explained_handler").Handler()
    context = make_context(archive, filled)
    context.model_name, context.manifest = "served", manifest
    handler.initialize(context)
    assert handler.model.outcome.result == "built"
    del sys.modules["explained_handler"]
    return archive


def test_explain_of_an_archive_says_whether_a_start_would_hit(run: Run, served: Path, filled: Path) -> None:
    result = run("explain", served, "--store", filled, "--json")
    assert result.code == 0
    (item,) = result.json
    assert item["what"] == "served, aot_inductor"
    assert (item["left"], item["differs"]) == (item["right"], [])
    entries = run("ls", "served", "--store", filled, "--json").json["entries"]
    assert [entry["key"] for entry in entries] == [item["left"]]
    assert "is in the store" in run("explain", served, "--store", filled).out


def test_explain_of_an_archive_names_the_part_that_misses(run: Run, served: Path, filled: Path) -> None:
    with open(served / "model.py", "a") as file:
        file.write("# another model\n")
    result = run("explain", served, "--store", filled, "--json")
    assert result.code == ExitCode.FINDINGS
    assert [part["part"] for part in result.json[0]["differs"]] == ["model"]
    key = run("ls", "linear", "--store", filled, "--json").json["entries"][0]["key"]
    against = run("explain", served, key, "--store", filled, "--json")
    assert [item["right"] for item in against.json] == [key]
    empty = filled.parent / "empty"
    empty.mkdir(mode=0o700)
    alone = run("explain", served, "--store", empty)
    assert alone.code == ExitCode.FINDINGS
    assert "nor is any other entry" in alone.out


def test_explain_of_no_archive_is_a_usage_error(run: Run, filled: Path) -> None:
    result = run("explain", filled / "usage", "--store", filled)
    assert result.code == ExitCode.USAGE
    assert "MANIFEST.json" in result.err
    assert "two keys" in run("explain", "0f0f", "--store", filled).err


MAKES_ITS_MODULE = """
import torch

from ts_handlers import CompiledHandlerMixin


class Made(torch.nn.Linear):
    pass


def handle(data, context):
    theirs = type("Theirs", (), {"initialize": initialize})
    type("Both", (CompiledHandlerMixin, theirs), {})().initialize(context)


def initialize(self, context):
    self.model = Made(4, 3)
    self.model._made_hash = hash("text") | 1 << 62
"""


def test_explain_names_what_was_left_out_of_the_key(
    run: Run, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    folder = tmp_path / "made"
    (folder / "MAR-INF").mkdir(parents=True)
    manifest = {"model": {"modelName": "made", "handler": "made_handler.py", "configFile": CONFIG}}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    section = {**LINEAR_SECTION, "backends": ["aot_inductor"]}
    (folder / CONFIG).write_text(json.dumps({"handler": {"ts_handlers": section}}))
    (folder / "made_handler.py").write_text(MAKES_ITS_MODULE)
    monkeypatch.syspath_prepend(folder)
    result = run("explain", folder, "--store", filled, "--json")
    assert result.json[0]["left_out"] == ["Made._made_hash"], result.err
    assert "differs between processes: Made._made_hash" in run("explain", folder, "--store", filled).out


def test_explain_of_an_archive_names_the_variable_that_differs(
    run: Run, archive: Path, filled: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (archive / "model.py").read_text()
    (archive / "model.py").write_text(text + "\nimport os\nTAG = os.environ.get('MODEL_TAG')\n")
    monkeypatch.setenv("MODEL_TAG", "first")
    served = request.getfixturevalue("served")
    assert run("explain", served, "--store", filled, "--json").json[0]["differs"] == []
    monkeypatch.setenv("MODEL_TAG", "second")
    result = run("explain", served, "--store", filled, "--json")
    assert [part["part"] for part in result.json[0]["differs"]] == ["outside"]
    assert "variable:MODEL_TAG" in run("explain", served, "--store", filled).out
