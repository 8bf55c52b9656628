"""How another process makes the model of a handler: from its class and context, or from an unpacked archive."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.handlers import make_context
from ts_handlers import CompiledHandler
from ts_handlers.errors import ModelError
from ts_handlers.model.recipes import make_source
from ts_handlers.servers.torchserve.recipes import archive_recipe, handler_recipe

HANDLER = """
    from pathlib import Path
    from ts_handlers import CompiledHandler


    class Handler(CompiledHandler):
        def initialize(self, context):
            super().initialize(context)
            Path(__file__).with_name("behind").touch()
"""
MODULE = "handler_of_the_recipes"


@pytest.fixture
def folder(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unpacked archive with a handler of its own."""
    (archive / f"{MODULE}.py").write_text(textwrap.dedent(HANDLER))
    model = {
        "modelName": "model",
        "handler": f"{MODULE}.py",
        "modelFile": "model.py",
        "serializedFile": "model.pt",
        "configFile": "model-config.yaml",
    }
    (archive / "MAR-INF").mkdir()
    (archive / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": model}))
    (archive / "model-config.yaml").write_text("handler: {ts_handlers: {backends: [eager]}}\n")
    monkeypatch.syspath_prepend(str(archive))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return archive


def test_a_handlers_recipe_survives_json_and_gives_what_the_handler_would_start(folder: Path, tmp_path: Path) -> None:
    from handler_of_the_recipes import Handler  # type: ignore[import-not-found]

    context = make_context(folder, tmp_path / "store")
    recipe = handler_recipe(Handler, context, context.model_yaml_config)
    assert recipe is not None
    made = make_source(json.loads(json.dumps(recipe)))
    assert (made.source.name, made.device) == ("model", torch.device("cpu"))
    assert made.settings is not None
    assert made.settings.store == str(tmp_path / "store")
    assert [spec.name for spec in made.settings.inputs] == ["x"]
    assert not (folder / "behind").exists()  # `initialize` ended where the model would have started
    recipe_of_source = made.source.recipe()
    assert recipe_of_source is not None
    assert recipe_of_source["kind"] == "archive"  # the model file says it all, nobody needs the handler


def test_classes_that_no_other_process_can_import_have_no_recipe(folder: Path, tmp_path: Path) -> None:
    class Local(CompiledHandler):
        pass

    context = make_context(folder, tmp_path / "store")
    assert handler_recipe(Local, context, {}) is None
    script: Any = type("Script", (CompiledHandler,), {"__module__": "__main__"})
    assert handler_recipe(script, context, {}) is None


def test_an_archives_recipe_gives_what_its_handler_would_start(folder: Path) -> None:
    made = make_source(json.loads(json.dumps(archive_recipe(folder, "cpu", None, None))))
    assert (made.source.name, made.device) == ("model", torch.device("cpu"))
    assert made.settings is not None
    assert made.settings.backends == ("eager",)
    assert not (folder / "behind").exists()


@pytest.mark.parametrize(
    ("device", "gpu", "required"),
    [(None, 0, False), ("cpu", None, False), ("cuda", 0, True), ("cuda:3", 3, True)],
)
def test_the_gpu_of_an_archives_recipe(device: str | None, gpu: int | None, required: bool, folder: Path) -> None:
    recipe = archive_recipe(folder, device, None, "other")
    assert (recipe["gpu_id"], recipe["require_gpu"], recipe["model_name"]) == (gpu, required, "other")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps"])
def test_what_is_no_device_is_refused(device: str, folder: Path) -> None:
    with pytest.raises(ModelError, match="expected cpu, cuda or cuda:<index>"):
        archive_recipe(folder, device, None, None)


def test_an_archive_without_a_manifest_names_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="names no model"):
        archive_recipe(tmp_path, None, None, None)
