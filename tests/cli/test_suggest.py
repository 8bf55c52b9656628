"""`suggest`: what an archive's model takes, with the names of its own parameters, and where that is from."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.models import archive_source, settings_of
from ts_handlers import parse_settings, start_model
from ts_handlers.backends.calling import check_names
from ts_handlers.cli.exit_codes import ExitCode
from ts_handlers.errors import SettingsError
from ts_handlers.model.observed_calls import ObservedCalls, call_kind
from ts_handlers.startup.observation import calls_identity
from ts_handlers.store.local.store import LocalStore

pytest.importorskip("ts", reason="TorchServe is not installed")

Run = Callable[..., Any]
HANDLER = """
import torch
from ts.torch_handler.base_handler import BaseHandler
from ts_handlers import CompiledHandlerMixin


class Handler(CompiledHandlerMixin, BaseHandler):
    def preprocess(self, data):
        print("what an archive prints is no answer")
        return torch.cat([torch.tensor(row["body"]) for row in data])
"""


@pytest.fixture
def pack(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The archive as a folder with a handler, and settings."""
    for name in ("suggested_handler", "model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()

    def write(handler: str = HANDLER, **section: Any) -> Path:
        (archive / "suggested_handler.py").write_text(handler)
        (archive / "sample.json").write_text("[[1.0, 2.0, 3.0, 4.0]]")
        section = {"store": str(tmp_path / "store"), **section}
        (archive / "model-config.yaml").write_text(yaml.safe_dump({"handler": {"ts_handlers": section}}))
        names = {"modelName": "model", "modelFile": "model.py", "serializedFile": "model.pt"}
        manifest = {"model": {**names, "handler": "suggested_handler.py", "configFile": "model-config.yaml"}}
        (archive / "MAR-INF").mkdir(exist_ok=True)
        (archive / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
        return archive

    return write


def suggested(run: Run, folder: Path, tmp_path: Path, *options: str) -> Any:
    return run("suggest", folder, "--device", "cpu", "--store", tmp_path / "store", *options)


def test_a_guess_names_the_parameters_of_forward(run: Run, pack: Any, tmp_path: Path) -> None:
    result = suggested(run, pack(), tmp_path)
    assert result.code == ExitCode.FINDINGS
    assert "# guessed from the parameters of forward of Model" in result.out
    settings = parse_settings(yaml.safe_load(result.out))
    assert [(spec.name, spec.shape) for spec in settings.inputs] == [("x", ("batch", 4))]


def test_samples_tell_it(run: Run, pack: Any, tmp_path: Path) -> None:
    folder = pack(samples=["sample.json"])
    result = suggested(run, folder, tmp_path)
    assert result.code == ExitCode.OK, result.err
    assert result.out.startswith("# told by the samples sample.json, answered by the handler\nhandler:\n  ts_handlers:")
    settings = parse_settings(yaml.safe_load(result.out))
    assert [(spec.name, spec.shape) for spec in settings.inputs] == [("x", ("batch", 4))]
    assert settings.outside == "eager"
    assert not (tmp_path / "store" / "observed").exists()  # it has only looked


def test_samples_that_tell_nothing_are_named(run: Run, pack: Any, tmp_path: Path) -> None:
    folder = pack(samples=["nothing.json"])
    result = suggested(run, folder, tmp_path)
    assert result.code == ExitCode.FINDINGS
    assert "expected a file nothing.json" in result.err
    assert "guessed" in result.out


def test_declared_inputs_are_printed(run: Run, pack: Any, tmp_path: Path) -> None:
    inputs = [{"name": "x", "dtype": "float32", "shape": [2, 4]}]
    result = suggested(run, pack(inputs=inputs), tmp_path, "--json")
    assert (result.code, result.json["origin"]) == (ExitCode.OK, "declared")
    assert "shape: [2, 4]" in result.json["yaml"]


def test_calls_tell_it(run: Run, pack: Any, archive: Path, tmp_path: Path) -> None:
    source = archive_source(pack(), ignored_files=["suggested_handler.py"])
    calls = ObservedCalls()
    for rows in (1, 2, 2):
        calls.add(*call_kind(source.eager(), [torch.zeros(rows, 4)], {}))
    store = LocalStore(tmp_path / "store")
    (archive / "sample.json").unlink()
    store.add_calls(calls_identity("model", source.digest()), calls)
    result = suggested(run, archive, tmp_path, "--json")
    assert (result.code, result.json["origin"]) == (ExitCode.OK, "calls"), result.json
    assert "told by 3 earlier calls" in result.json["why"]
    assert "warmup: [{batch: 2}, {batch: 1}]" in result.json["yaml"]


def test_the_handler_of_json_tensors_gets_a_guess_too(run: Run, pack: Any, tmp_path: Path) -> None:
    code = "from ts_handlers import CompiledHandler\n\n\nclass Handler(CompiledHandler):\n    pass\n"
    result = suggested(run, pack(code), tmp_path)
    assert result.code == ExitCode.FINDINGS, result.err
    assert "name: x, dtype: float32, shape: [batch, 4]" in result.out


def test_a_start_that_asks_for_inputs_proposes_the_same(archive: Path, tmp_path: Path) -> None:
    proposal = "inputs: [{name: x, dtype: float32, shape: [batch, 4]}], dimensions: {batch: {min: 1, max: 16}}"
    settings = settings_of({"store": str(tmp_path / "store"), "strict": True})
    with pytest.raises(SettingsError) as caught:
        start_model(archive_source(archive), settings)
    assert proposal in str(caught.value)
    with pytest.raises(SettingsError, match="name: input1, dtype: float32"):
        check_names(torch.nn.Bilinear(2, 2, 2), ("input2", "x"))
