"""Which model an archive and a handler class give: model files, weights, own ways of building it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import eager_model, save_weights, write_archive, write_weights

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.torch_handler.base_handler import BaseHandler

from tests.support.handlers import ROWS, ask, close, expected, make_context
from ts_handlers import CompiledHandler, CompiledHandlerMixin, CompiledModel
from ts_handlers.errors import ModelError, SettingsError

pytestmark = pytest.mark.usefixtures("cheap_backend")


class OwnInitialize(BaseHandler):  # type: ignore[misc]
    """A handler as one finds them: builds its model itself and knows nothing of this package."""

    def initialize(self, context: Any) -> None:
        self.device = torch.device("cpu")
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        self.model.load_state_dict({f"0.{name}": value for name, value in self.weights(context).items()})
        self.initialized = True

    def weights(self, context: Any) -> Any:
        state = torch.load(Path(context.system_properties["model_dir"]) / "model.pt", weights_only=True)
        return {name.removeprefix("layer."): value for name, value in state.items()}

    def preprocess(self, data: Any) -> Any:
        return torch.cat([torch.tensor(row["body"]) for row in data])

    def postprocess(self, data: Any) -> Any:
        return [row.tolist() for row in data]


def test_mixin_over_a_handler_with_its_own_initialize(archive: Path, tmp_path: Path) -> None:
    class Handler(CompiledHandlerMixin, OwnInitialize):
        pass

    context = make_context(archive, tmp_path / "store", section={"backends": ["eager"]})
    handler = Handler()
    handler.initialize(context)
    assert isinstance(handler.model, CompiledModel)
    answers = ask(handler, context, ROWS[:1], [["a"]], ROWS[1:])
    assert [status for status, _ in answers] == [200, 400, 200]
    assert close(answers[2][1], expected(archive, ROWS[1:])[0])


def test_mixin_over_a_handler_with_its_own_loading(archive: Path, tmp_path: Path) -> None:
    built = []

    class Own(OwnInitialize):
        initialize = BaseHandler.initialize

        def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str) -> Any:
            built.append(model_pt_path)
            return eager_model(Path(model_dir))

    class Handler(CompiledHandlerMixin, Own):
        pass

    for result in ("built", "hit"):
        handler = Handler()
        context = make_context(archive, tmp_path / "store")
        handler.initialize(context)
        assert handler.model.outcome.result == result
        assert ask(handler, context, ROWS[:1])[0][0] == 200
    assert built == [str(archive / "model.pt")]  # the hit did not build the eager model


def test_load_model_is_called_only_to_build(archive: Path, tmp_path: Path) -> None:
    calls = []

    class Handler(CompiledHandler):
        def load_model(self, model_dir: str, model_file: str, weights_path: str | None) -> torch.nn.Module:
            calls.append(model_file)
            return eager_model(Path(model_dir))

    for _ in range(2):
        handler = Handler()
        handler.initialize(make_context(archive, tmp_path / "store"))
    assert calls == ["model.py"]
    assert handler.model.outcome.result == "hit"


@pytest.mark.parametrize("shapes_the_model", [False, True])
def test_handler_file_is_keyed_only_when_it_shapes_the_model(
    shapes_the_model: bool, archive: Path, tmp_path: Path
) -> None:
    body = """
    def load_model(self, model_dir, model_file, weights_path):
        from ts_handlers.model.archive import ArchiveSource
        return ArchiveSource("x", model_dir, model_file, "model.pt").eager()
    """
    code = "from ts_handlers import CompiledHandler\n\n\nclass Handler(CompiledHandler):\n    note = {note}\n"
    keys = []
    for note in (1, 2):
        path = archive / "handler.py"
        path.write_text(code.format(note=note) + (body if shapes_the_model else ""))
        name = f"handler_of_the_test_{note}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        handler = module.Handler()
        handler.initialize(make_context(archive, tmp_path / "store"))
        keys.append(handler.model.outcome.key)
        del sys.modules[name]
    assert (keys[0] != keys[1]) == shapes_the_model


def test_pt2_section_is_ours_and_comes_back(archive: Path, tmp_path: Path) -> None:
    context = make_context(archive, tmp_path / "store", pt2={"compile": {"enable": True, "backend": "inductor"}})
    handler = CompiledHandler()
    handler.initialize(context)
    assert isinstance(handler.model, CompiledModel)
    assert handler.model.outcome.backend == "aot_inductor"  # the explicit fallback order wins
    assert "pt2" in context.model_yaml_config
    assert handler.model_yaml_config is context.model_yaml_config


def test_scripted_model_is_served_as_before(archive: Path, tmp_path: Path) -> None:
    torch.jit.script(eager_model_without_file()).save(str(archive / "scripted.pt"))
    handler = CompiledHandler()
    handler.initialize(make_context(archive, tmp_path / "store", {"serializedFile": "scripted.pt"}))
    assert handler.describe_handle()["backend"] == "torchscript"
    assert handler.inference(torch.zeros(2, 4)).shape == (2, 3)


def eager_model_without_file() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 3))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_without_a_model_file_are_a_model_error(name: str, archive: Path, tmp_path: Path) -> None:
    save_weights(archive / name, {"a": torch.zeros(1)})
    with pytest.raises(ModelError, match="--model-file"):
        CompiledHandler().initialize(make_context(archive, tmp_path / "store", {"serializedFile": name}))


def test_mistakes_of_the_archive_are_raised(archive: Path, tmp_path: Path) -> None:
    context = make_context(archive, tmp_path / "store", section={"bakends": ["eager"]})
    with pytest.raises(SettingsError, match="did you mean 'backends'"):
        CompiledHandler().initialize(context)
    (archive / "model.pt").write_bytes((archive / "model.pt").read_bytes()[:100])
    with pytest.raises(ModelError, match="may be truncated"):
        CompiledHandler().initialize(make_context(archive, tmp_path / "store"))


def test_model_without_weights(tmp_path: Path) -> None:
    code = "import torch\n\n\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return x + 1\n"
    archive = write_archive(tmp_path / "archive", code, seed=None)
    context = make_context(archive, tmp_path / "store", {"modelFile": "model.py"}, section={"backends": ["eager"]})
    handler = CompiledHandler()
    handler.initialize(context)
    assert ask(handler, context, [[0, 0, 0, 0]]) == [(200, [[1, 1, 1, 1]])]


def test_new_weights_in_a_new_archive_are_served(archive: Path, tmp_path: Path) -> None:
    for seed, result in ((1, "built"), (2, "hit")):
        write_weights(archive, seed)
        handler = CompiledHandler()
        context = make_context(archive, tmp_path / "store")
        handler.initialize(context)
        assert handler.model.outcome.result == result
        assert close(ask(handler, context, ROWS)[0][1], expected(archive, ROWS))
