"""Building ahead of serving: unpacking archives safely, handlers as TorchServe loads them, keys as a start computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import Register
from tests.support.archive_files import files_of, write_zip
from tests.support.handlers import make_context
from tests.support.models import LINEAR_SECTION, eager_model
from tests.support.subprocesses import SUPPORT
from ts_handlers.errors import ModelError
from ts_handlers.guard.quarantine import read_quarantines
from ts_handlers.servers.torchserve.archive_keys import archive_keys
from ts_handlers.servers.torchserve.prewarm import prewarm
from ts_handlers.settings.sections import BackgroundSettings
from ts_handlers.store.local.store import LocalStore

pytest.importorskip("ts", reason="TorchServe is not installed")

# A handler with a way of its own to build the model, which needs what its `initialize` has set, and which must not go
# on in a process that only builds. `build_process_handler` is a name that nothing else has.
HANDLER = """
import os
import torch
from ts.torch_handler.base_handler import BaseHandler
from ts_handlers import CompiledHandlerMixin
from ts_handlers.model.archive_files import load_model_class


class Handler(CompiledHandlerMixin, BaseHandler):
    def initialize(self, context):
        self.model_file = "model.py"
        super().initialize(context)
        with open(os.path.join(os.path.dirname(__file__), "..", "initialized"), "a") as file:
            file.write(f"{os.getpid()} ")

    def load_model(self, model_dir, model_file, weights_path):
        from pathlib import Path

        print("what is printed is no answer")
        module = load_model_class(Path(model_dir) / self.model_file)()
        module.load_state_dict(torch.load(weights_path, weights_only=True))
        return module
"""
MANIFEST = {"modelName": "model", "modelFile": "model.py", "serializedFile": "model.pt"}


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch, register: Register) -> None:
    """The cheap backend, here and in build processes."""
    register("aot_inductor", "tests.support.file_backend:BACKEND")
    monkeypatch.syspath_prepend(str(SUPPORT / "child_site"))


@pytest.fixture
def folder(archive: Path) -> Path:
    """The archive of a handler with its own `load_model`, as a folder."""
    (archive / "build_process_handler.py").write_text(HANDLER)
    (archive / "MAR-INF").mkdir()
    manifest = {"model": {**MANIFEST, "handler": "build_process_handler.py", "configFile": "model-config.yaml"}}
    (archive / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    write_config(archive)
    return archive


def write_config(folder: Path, **changes: Any) -> None:
    section = {**LINEAR_SECTION, "backends": ["aot_inductor", "eager"], **changes}
    (folder / "model-config.yaml").write_text(yaml.safe_dump({"handler": {"ts_handlers": section}}))


@pytest.mark.processes
def test_prewarmed_archive_is_a_hit_for_the_worker(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_model` is the handler's own, so the handler file is part of the key."""
    store, phases = tmp_path / "store", []
    mar = write_zip(tmp_path / "model.mar", files_of(folder))
    done = prewarm(mar, store=store, device="cpu", progress=lambda phase, *times: phases.append((phase, times)))
    assert (done.ok, done.result, done.backend, done.model) == (True, "built", "aot_inductor", "model"), done
    assert [name for name, _ in phases][:3] == ["unpack", "process", "key"]
    assert {"build: compile", "publish", "load", "canary"} <= {name for name, _ in phases}
    elapsed = [times[0] for _, times in phases]
    assert elapsed == sorted(elapsed)
    assert not (tmp_path / "initialized").exists()

    monkeypatch.syspath_prepend(str(folder))
    from build_process_handler import Handler  # type: ignore[import-not-found]

    handler = Handler()
    handler.initialize(make_context(folder, store))
    assert (handler.model.outcome.result, handler.model.outcome.key) == ("hit", done.key)
    assert handler.model.metrics.counters["build"] == 0
    again = prewarm(folder, store=store)
    assert (again.ok, again.result, again.key) == (True, "hit", done.key)


@pytest.mark.processes
def test_background_build_of_a_handler_with_its_own_load_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_LOG", str(tmp_path / "builds"))
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("build_process_handler", None)
    from build_process_handler import Handler

    handler = Handler()
    context = make_context(folder, tmp_path / "store", section={"on_miss": "background", "background": {"nice": 0}})
    handler.initialize(context)
    assert (handler.model.outcome.backend, handler.model.outcome.result) == ("eager", "background")
    assert handler.model.background.wait(120)
    facts = handler.describe_handle()
    assert (facts["backend"], facts["result"]) == ("aot_inductor", "swapped"), facts["background"]
    rows = torch.randn(2, 4)
    with torch.inference_mode():
        assert torch.allclose(handler.inference(rows), eager_model(folder)(rows), atol=1e-5)
    # The child ended its `initialize` where the model starts.
    assert (tmp_path / "initialized").read_text().split() == [str(facts["pid"])]
    assert {"ts_handlers_swap_total", "ts_handlers_background_build_total"} <= set(context.metrics.names)
    assert context.metrics.names.count("ts_handlers_miss_total") == 1


@pytest.mark.processes
def test_failures_are_results(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    monkeypatch.setenv("BUILD_ERROR", "no way to export")
    fell = prewarm(folder, store=store)
    assert (fell.ok, fell.result, fell.backend) == (False, "eager", "eager")
    assert "no way to export" in fell.fallbacks[0]["reason"]
    strict = prewarm(folder, store=store, config={"handler": {"ts_handlers": {**LINEAR_SECTION, "strict": True}}})
    assert (strict.ok, strict.result) == (False, "failed")
    assert strict.reason == "BuildError: no way to export"
    slow = prewarm(folder, store=store, limits=BackgroundSettings(seconds=0.2))
    assert "took longer" in str(slow.reason)
    if not torch.cuda.is_available():
        assert "no CUDA GPU" in str(prewarm(folder, store=store, device="cuda:0").reason)
    assert not (store / "entries").exists()
    with pytest.raises(ModelError, match="device 'gpu'"):
        prewarm(folder, device="gpu")
    # What failed is remembered, and tried again whenever somebody asks for it.
    assert [record.count for record in read_quarantines(store)] == [2]
    monkeypatch.delenv("BUILD_ERROR")
    assert prewarm(folder, store=store).result == "built"


@pytest.mark.processes
def test_handler_without_the_mixin_has_nothing_to_build(folder: Path, tmp_path: Path) -> None:
    plain = "from ts.torch_handler.base_handler import BaseHandler\n\n\nclass Handler(BaseHandler):\n    pass\n"
    (folder / "build_process_handler.py").write_text(plain)
    done = prewarm(folder, store=tmp_path / "store", config=folder / "model-config.yaml")
    assert done.result == "failed"
    assert "must be a CompiledHandlerMixin" in str(done.reason)


THEIR_PARTS = """
import torch
from ts.torch_handler.base_handler import BaseHandler
from ts_handlers.model.archive_files import load_model_class


class Theirs(BaseHandler):
    def initialize(self, context):
        from pathlib import Path

        folder = Path(context.system_properties["model_dir"])
        self.parts = [load_model_class(folder / "model.py")() for _ in range(2)]
        for part in self.parts:
            part.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
"""
PARTS_HANDLER = """
from their_parts import Theirs
from ts_handlers import CompiledHandlerMixin


class Handler(CompiledHandlerMixin, Theirs):
    pass
"""


@pytest.fixture
def parts(folder: Path) -> Path:
    """An archive whose handler holds two modules, each with settings of its own."""
    (folder / "their_parts.py").write_text(THEIR_PARTS)
    (folder / "parts_handler.py").write_text(PARTS_HANDLER)
    (folder / "MAR-INF" / "MANIFEST.json").write_text(
        json.dumps({"model": {"modelName": "model", "handler": "parts_handler.py", "configFile": "model-config.yaml"}})
    )
    linear = {"inputs": LINEAR_SECTION["inputs"], "dimensions": LINEAR_SECTION["dimensions"]}
    models = {
        "first": {"path": "parts.0", **linear},
        "second": {"path": "parts.1", **linear, "dimensions": {"batch": {"min": 1, "max": 2}}},
    }
    write_config(folder, inputs=[], dimensions={}, warmup=[], models=models)
    return folder


def start_parts(folder: Path, store: Path) -> dict[str, Any]:
    """The parts of a handler that starts on an archive's configuration."""
    sys.modules.pop("parts_handler", None)
    from parts_handler import Handler  # type: ignore[import-not-found]

    section = yaml.safe_load((folder / "model-config.yaml").read_text())["handler"]["ts_handlers"]
    handler = Handler()
    handler.initialize(make_context(folder, store, {}, section={"warmup": [], **section}))
    return {each.name: each.model for each in handler._submodels.all}


@pytest.mark.processes
def test_prewarm_builds_each_part_of_a_handler(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(parts))
    store = tmp_path / "store"
    done = prewarm(parts, store=store, device="cpu")
    assert (done.ok, done.model, [part.result for part in done.parts]) == (True, "model", ["built", "built"]), done
    started = start_parts(parts, store)
    assert [model.outcome.result for model in started.values()] == ["hit", "hit"]
    assert [model.outcome.key for model in started.values()] == [part.key for part in done.parts]
    assert [part.model for part in done.parts] == ["model.first", "model.second"]
    opened = LocalStore(store)
    assert [(key.model, key.key.digest) for key in archive_keys(parts, opened)] == [
        (part.model, part.key) for part in done.parts
    ]


@pytest.mark.processes
def test_parts_are_built_in_the_background_each_in_a_process(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(parts))
    write_models(parts, on_miss="background")
    started = start_parts(parts, tmp_path / "store")
    assert {model.outcome.backend for model in started.values()} == {"eager"}
    for model in started.values():
        assert model.background.wait(60)
        assert (model.outcome.result, model.outcome.backend) == ("swapped", "aot_inductor"), model.describe()
    started = start_parts(parts, tmp_path / "store")
    assert [model.outcome.result for model in started.values()] == ["hit", "hit"]


def write_models(folder: Path, **changes: Any) -> None:
    """Change settings of an archive."""
    config = yaml.safe_load((folder / "model-config.yaml").read_text())
    config["handler"]["ts_handlers"] |= changes
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config))
