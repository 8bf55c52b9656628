"""What shapes a model from outside its archive is part of its key: another value is a miss, the old one a hit again."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.test_recording import write_distribution
from tests.support.models import LINEAR_SECTION, archive_source, save_weights, settings_of, write_archive
from tests.support.starts import Start, counters
from ts_handlers import CompiledModel, start_model
from ts_handlers.key.cache_key import explain, only_differing
from ts_handlers.model import recording
from ts_handlers.model.own_code import reached_modules
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.upkeep.scan import scan_entries

MODEL = """
import json, os
import torch
{imports}

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.scale = {scale}

    def forward(self, x):
        return self.layer(x) * self.scale
"""


def write(archive: Path, scale: str, imports: str = "") -> Path:
    write_archive(archive, MODEL.format(scale=scale, imports=imports), seed=None)
    return write_layer(archive, 0)


def write_layer(archive: Path, seed: int) -> Path:
    """The weights of a seed; the model, which reads what is not there yet, is not made."""
    torch.manual_seed(seed)
    state = torch.nn.Linear(4, 3).state_dict()
    save_weights(archive / "model.pt", {f"layer.{name}": tensor for name, tensor in state.items()})
    return archive


@pytest.fixture(autouse=True)
def _scaled(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts hold the scale, as compiled code holds constants."""
    build, load = backend.build, backend.load

    def build_scaled(target: Any, workspace: Any) -> Any:
        (workspace.directory / "scale.json").write_text(json.dumps(float(target.eager().scale)))
        return build(target, workspace)

    def load_scaled(target: Any, directory: Path, description: Any) -> Any:
        import dataclasses

        loaded, scale = load(target, directory, description), json.loads((directory / "scale.json").read_text())
        return dataclasses.replace(loaded, run=lambda tensors: loaded.run(tensors) * scale)

    monkeypatch.setattr(backend, "build", build_scaled)
    monkeypatch.setattr(backend, "load", load_scaled)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "outside"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    forget(folder)


def forget(folder: Path) -> None:
    """Model files, and modules below a folder, are imported again, as in another process."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ts_handlers_model_") or str(folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]
    importlib.invalidate_caches()


def answers_rightly(model: CompiledModel, archive: Path, scale: float) -> bool:
    state = torch.load(archive / "model.pt", weights_only=True)
    rows = torch.arange(8.0).reshape(2, 4)
    wanted = (rows @ state["layer.weight"].t() + state["layer.bias"]) * scale
    return torch.allclose(model(rows), wanted, atol=1e-5)


def builds(model: CompiledModel) -> int:
    return counters(model.describe()).get("build", 0)


def check(start: Start, archive: Path, change: Callable[[float], object]) -> None:
    """Another value is one build, each value is found again, and each answer is right."""
    found = []
    for value in (2.0, 2.0, 3.0, 3.0, 2.0, 3.0):
        change(value)
        model = start(archive)
        assert answers_rightly(model, archive, value), value
        found.append((builds(model), model.outcome.result, model.outcome.missed))
        model.store.close()
    hit = (0, "hit", ())
    assert found == [(1, "built", ()), hit, (1, "built", ("outside",)), hit, hit, hit]


@pytest.mark.parametrize(
    "scale",
    ["float(os.environ['SCALE'])", "float(os.environ.get('SC' + 'ALE', '1'))", "float(dict(os.environ)['SCALE'])"],
)
def test_a_variable_that_the_model_reads(
    scale: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(start, write(tmp_path / "archive", scale), lambda value: monkeypatch.setenv("SCALE", str(value)))


def test_a_variable_that_the_model_sets_by_default(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write(tmp_path / "archive", "float(os.environ.setdefault('SCALE', '2.0'))")
    results = []
    for _ in range(2):
        monkeypatch.delenv("SCALE", raising=False)
        results.append(builds(start(archive)))
    assert results == [1, 0]


@pytest.mark.parametrize(
    "read",
    ["json.load(open({!r}))", "json.loads(__import__('pathlib').Path({!r}).read_text())"],
)
def test_a_file_outside(read: str, start: Start, tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    check(start, write(tmp_path / "archive", read.format(str(path))), lambda value: path.write_text(str(value)))


def test_a_file_outside_that_a_library_opens(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "scale.pt"
    archive = write(tmp_path / "archive", f"float(torch.load({str(path)!r}))")
    check(start, archive, lambda value: torch.save(torch.tensor(value), path))


def test_an_archive_file_that_the_digest_leaves_out(start: Start, tmp_path: Path) -> None:
    read = "float(open(os.path.join(os.path.dirname(__file__), 'vocab.txt')).read())"
    archive = write(tmp_path / "archive", read)
    check(start, archive, lambda value: (archive / "vocab.txt").write_text(str(value)))


def test_a_distribution_behind_an_imported_one(start: Start, tmp_path: Path, outside: Path) -> None:
    write_distribution(outside, "lib_a", "1.0", "from lib_b import SCALE\n")

    def upgrade(value: float) -> None:
        forget(outside)
        write_distribution(outside, "lib_b", str(value), f"SCALE = {value}  # {'x' * int(value)}\n")

    upgrade(1.0)
    check(start, write(tmp_path / "archive", "lib_a.SCALE", "import lib_a"), upgrade)


def test_a_module_of_no_distribution_behind_a_library(start: Start, tmp_path: Path, outside: Path) -> None:
    write_distribution(outside, "lib_a", "1.0", "from helpers import SCALE\n")

    def change(value: float) -> None:
        forget(outside)
        (outside / "helpers.py").write_text(f"SCALE = {value}  # {'x' * int(value)}\n")

    change(1.0)
    check(start, write(tmp_path / "archive", "lib_a.SCALE", "import lib_a"), change)


def test_what_the_settings_name(start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "unseen"
    named = {"key_environment": ["UNSEEN"], "key_files": [str(path)]}
    path.write_text("1")
    write(archive, "1.0")
    found = []
    for variable, content in (("1", "1"), ("1", "1"), ("2", "1"), ("2", "2"), ("1", "1")):
        monkeypatch.setenv("UNSEEN", variable)
        path.write_text(content)
        found.append(builds(start(archive, **named)))
    assert found == [1, 0, 1, 1, 0]


def test_what_a_library_reads_for_itself_is_not_keyed(
    start: Start, tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_distribution(outside, "lib_a", "1.0", "import os\nHOME = os.environ.get('HF_HOME')\nSCALE = 2.0\n")
    archive = write(tmp_path / "archive", "lib_a.SCALE", "import lib_a")
    monkeypatch.setenv("HF_HOME", "/a")
    assert builds(start(archive)) == 1
    monkeypatch.setenv("HF_HOME", "/b")
    forget(outside)
    second = start(archive)
    assert builds(second) == 0
    assert not (tmp_path / "store" / "outside").exists()


def test_another_environment_is_not_checked_against_the_first_ones_answers(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Canary records are those of a key."""
    archive = write(tmp_path / "archive", "float(os.environ['SCALE'])")
    sources = []
    for value in ("2.0", "3.0"):
        monkeypatch.setenv("SCALE", value)
        sources.append(start(archive).outcome.canary["source"])
    assert sources == ["eager", "eager"]
    assert len(list((tmp_path / "store" / "canaries").iterdir())) == 2


def test_new_weights_hit_in_the_same_environment(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write(tmp_path / "archive", "float(os.environ['SCALE'])")
    monkeypatch.setenv("SCALE", "2.0")
    start(archive)
    write_layer(archive, 1)
    assert builds(start(archive)) == 0
    monkeypatch.setenv("SCALE", "3.0")
    model = start(archive)
    assert builds(model) == 1
    assert answers_rightly(model, archive, 3.0)


def test_only_a_build_looks_for_the_libraries_behind_the_model(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write(tmp_path / "archive", "2.0")
    found: list[list[str]] = []

    def counted(files: Any) -> Any:
        found.append(list(files))
        return reached_modules(found[-1])

    monkeypatch.setattr(recording, "reached_modules", counted)
    assert start(archive).outcome.result == "built"
    of_the_build = len(found)
    assert of_the_build > 0
    forget(archive)
    write_layer(archive, 1)  # so that the canary asks the eager module
    model = start(archive)
    assert answers_rightly(model, archive, 2.0)
    assert (model.outcome.result, len(found)) == ("hit", of_the_build)


def test_an_entry_of_before_is_a_hit_until_the_model_is_seen_to_read(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry of a version that recorded nothing lies under the key without the part; its name is not asked twice."""
    from ts_handlers.startup import attempt

    archive = write(tmp_path / "archive", "float(os.environ['SCALE'])")
    monkeypatch.setenv("SCALE", "2.0")
    with monkeypatch.context() as patch:
        patch.setattr(attempt.Attempt, "_learn", lambda self: None)
        patch.setattr("ts_handlers.model.recording.Recorder.finish", lambda *_: None)
        start(archive)
    assert builds(start(archive)) == 0
    write_layer(archive, 1)
    assert builds(start(archive)) == 0  # the eager model is made for the canary, and its name is kept
    assert start(archive).outcome.missed == ("outside",)
    assert builds(start(archive)) == 0


def test_explain_names_what_differs(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a scale.json"
    archive = write(tmp_path / "archive", f"float(os.environ['SCALE']) * json.load(open({str(path)!r}))")
    path.write_text("1.0")
    for value in ("2.0", "3.0"):
        monkeypatch.setenv("SCALE", value)
        start(archive)
    first, second = (entry.manifest.cache_key for entry in scan_entries(tmp_path / "store") if entry.manifest)
    [(part, left, right)] = explain(first, second)
    assert part == "outside"
    shown = [text.partition("=")[0] for text in only_differing(left, right)]
    assert shown == ["variable:SCALE", "variable:SCALE"]
    assert "3.0" not in left + right


def test_two_hosts_share_what_they_have_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "remote").mkdir()
    archive = write(tmp_path / "archive", "float(os.environ['SCALE'])")
    remote = {"url": f"file://{tmp_path}/remote", "timeout_seconds": 120}

    def host(name: str, value: str) -> CompiledModel:
        monkeypatch.setenv("SCALE", value)
        section = {"store": str(tmp_path / name), "backends": ["aot_inductor", "eager"], "remote": remote}
        model = start_model(archive_source(archive), settings_of(LINEAR_SECTION, **section))
        assert model.store.write_back.wait(60)
        assert answers_rightly(model, archive, float(value))
        return model

    assert builds(host("a", "2.0")) == 1
    assert builds(host("b", "2.0")) == 0
    assert builds(host("c", "3.0")) == 1
    assert builds(host("a", "3.0")) == 0
    assert builds(host("b", "2.0")) == 0
    third = host("d", "3.0")
    assert (builds(third), third.outcome.canary["source"]) == (0, "record")


def test_bundles_carry_the_names(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ts_handlers.store.bundles import export_bundle, import_bundle
    from ts_handlers.store.remote.signing import Keyring

    archive = write(tmp_path / "archive", "float(os.environ['SCALE'])")
    monkeypatch.setenv("SCALE", "2.0")
    start(archive)
    export_bundle(LocalStore(tmp_path / "store"), scan_entries(tmp_path / "store"), tmp_path / "bundle", Keyring())
    import_bundle(LocalStore(tmp_path / "other"), tmp_path / "bundle", Keyring())
    assert builds(start(archive, store=str(tmp_path / "other"))) == 0


def test_a_damaged_record_is_made_again(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write(tmp_path / "archive", "float(os.environ['SCALE'])")
    monkeypatch.setenv("SCALE", "2.0")
    start(archive)
    for path in (tmp_path / "store" / "outside").glob("*/*"):
        path.write_bytes(b"[1]")
    model = start(archive)
    assert (builds(model), model.outcome.result) == (0, "waited")  # what the eager model reads leads to the entry
    assert start(archive).outcome.result == "hit"
