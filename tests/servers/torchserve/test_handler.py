"""The handler on TorchServe's own context objects, without a server."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.file_backend import START
from tests.support.models import LINEAR_SECTION, eager_model, save_weights, write_archive, write_weights
from tests.support.subprocesses import finish, start_python

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import Context, RequestProcessor
from ts.torch_handler.base_handler import BaseHandler

from tests.conftest import Register
from ts_handlers import CompiledHandler, CompiledHandlerMixin, CompiledModel, InputError
from ts_handlers.errors import ModelError, QuarantinedError, SettingsError
from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines

ROWS = [[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 0.0, 2.0]]


@pytest.fixture(autouse=True)
def _backend(register: Register) -> None:
    register("aot_inductor", "tests.support.file_backend:BACKEND")


class Metrics:
    """What TorchServe's metrics cache is asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def add_time(self, name: str, *arguments: Any) -> None:
        self.names.append(name)

    def add_counter(self, name: str, *arguments: Any) -> None:
        self.names.append(name)


def make_context(archive: Path, store: Path, manifest: dict[str, str] | None = None, **config: Any) -> Context:
    """The context of a worker that has just loaded an archive."""
    names = {"modelName": "model", "modelFile": "model.py", "serializedFile": "model.pt"}
    names = names if manifest is None else {"modelName": "model", **manifest}
    section = {
        **LINEAR_SECTION,
        "store": str(store),
        "backends": ["aot_inductor", "eager"],
        **config.pop("section", {}),
    }
    yaml = {"handler": {"ts_handlers": section}, **config}
    return Context("model", str(archive), {"model": names}, 1, None, "0.12", metrics=Metrics(), model_yaml_config=yaml)


def ask(handler: Any, context: Context, *bodies: Any, header: dict[str, str] | None = None) -> list[tuple[int, Any]]:
    """Send a batch; returns (status, answer) of each request."""
    context.request_processor = [RequestProcessor(header or {}) for _ in bodies]
    answers = handler.handle([{"body": body} for body in bodies], context)
    assert len(answers) == len(bodies)
    return [(context.get_response_status(index)[0] or 200, answer) for index, answer in enumerate(answers)]


def expected(archive: Path, rows: list[list[float]]) -> list[list[float]]:
    with torch.inference_mode():
        answer: list[list[float]] = eager_model(archive)(torch.tensor(rows)).tolist()
    return answer


def close(found: Any, wanted: Any) -> bool:
    return bool(torch.allclose(torch.tensor(found), torch.tensor(wanted), atol=1e-5))


@pytest.fixture
def context(archive: Path, tmp_path: Path) -> Context:
    return make_context(archive, tmp_path / "store")


@pytest.fixture
def handler(context: Context) -> CompiledHandler:
    made = CompiledHandler()
    made.initialize(context)
    return made


def test_initialize_starts_the_model_and_reports_metrics(handler: CompiledHandler, context: Context) -> None:
    assert isinstance(handler.model, CompiledModel)
    assert handler.model.outcome.result == "built"
    assert handler.initialized
    assert {"ts_handlers_build_ms", "ts_handlers_build_total", "ts_handlers_miss_total"} <= set(context.metrics.names)


def test_second_worker_hits(handler: CompiledHandler, archive: Path, tmp_path: Path) -> None:
    second = CompiledHandler()
    second.initialize(make_context(archive, tmp_path / "store"))
    assert second.model.outcome.result == "hit"


def test_requests_do_not_wait_for_the_collection_of_what_a_start_made(context: Context) -> None:
    import gc

    gc.unfreeze()
    made = CompiledHandler()
    made.initialize(context)
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < gc.get_freeze_count() / 10


def test_describe_says_how_the_start_went(handler: CompiledHandler, context: Context) -> None:
    context.request_processor = [RequestProcessor({"describe": "True"})]
    (facts,) = handler.handle([{}], context)
    facts = json.loads(json.dumps(facts))
    assert {"backend", "key", "result", "missed", "phases_ms", "build_ms", "fallbacks", "counters", "pid"} <= set(facts)
    assert (facts["backend"], facts["result"], facts["fallbacks"]) == ("aot_inductor", "built", [])
    assert len(facts["key"]) == 32
    assert facts["counters"]["build"] == 1
    assert {"key", "lookup", "build", "publish", "load", "canary", "warmup"} <= set(facts["phases_ms"])


@pytest.mark.parametrize(
    "body",
    [
        ROWS,
        {"x": ROWS},
        json.dumps(ROWS),
        json.dumps({"x": ROWS}).encode(),
        bytearray(json.dumps(ROWS).encode()),
    ],
    ids=["list", "object", "text", "bytes", "bytearray"],
)
def test_request_forms(body: Any, handler: CompiledHandler, context: Context, archive: Path) -> None:
    ((status, answer),) = ask(handler, context, body)
    assert status == 200
    assert close(answer, expected(archive, ROWS))


def test_batch_is_joined_and_split_again(handler: CompiledHandler, context: Context, archive: Path) -> None:
    calls: list[int] = []
    loaded = handler.model._loaded
    counted = lambda tensors: calls.append(len(tensors[0])) or loaded.run(tensors)  # noqa: E731
    handler.model._loaded = dataclasses.replace(loaded, run=counted)
    answers = ask(handler, context, ROWS, ROWS[:1], ROWS[1:])
    assert [len(answer) for _, answer in answers] == [2, 1, 1]
    assert close(answers[2][1], expected(archive, ROWS[1:]))
    assert calls == [4]


def test_batch_beyond_the_declared_range_is_answered_one_by_one(
    handler: CompiledHandler, context: Context, archive: Path
) -> None:
    answers = ask(handler, context, *[ROWS] * 5)
    assert [status for status, _ in answers] == [200] * 5
    assert close(answers[4][1], expected(archive, ROWS))


BAD: dict[str, Any] = {
    "no JSON": b"{half",
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "none": None,
    "a number": 3,
    "text": json.dumps("hello"),
    "ragged": [[1, 2, 3, 4], [1, 2]],
    "letters": [["a", "b", "c", "d"]],
    "null inside": [[1, 2, 3, None]],
    "wrong width": [[1, 2, 3]],
    "no rows": [],
    "empty rows": [[]],
    "too many rows": [[0, 0, 0, 0]] * 9,
    "one dimension more": [ROWS],
    "unknown input": {"y": ROWS},
    "one input too many": {"x": ROWS, "y": ROWS},
    "nothing named": {},
    "an object as value": {"x": {"a": 1}},
    "endless nesting": b"[" * 100_000,
    "nested lists without end": b"[" * 900 + b"]" * 900,
    "huge number": [[10**400, 0, 0, 0]],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_and_leaves_the_others_alone(
    case: str, handler: CompiledHandler, context: Context, archive: Path
) -> None:
    ((status, answer),) = ask(handler, context, BAD[case])
    assert status == 400
    facts = json.loads(answer)
    assert (facts["code"], facts["type"]) == (400, "InputError")
    assert facts["message"]
    assert context.get_response_headers(0)["content-type"] == "application/json"
    answers = ask(handler, context, ROWS, BAD[case], ROWS[:1])
    assert [status for status, _ in answers] == [200, 400, 200]
    assert close(answers[0][1], expected(archive, ROWS))
    assert close(answers[2][1], expected(archive, ROWS[:1]))


@pytest.mark.parametrize(
    ("dtype", "value", "status"),
    [
        ("int64", [[1, 2]], 200),
        ("int64", [[1.5, 2]], 400),
        ("uint8", [[255, 0]], 200),
        ("uint8", [[256, 0]], 400),
        ("uint8", [[-1, 0]], 400),
        ("int8", [[128, 0]], 400),
        ("bool", [[True, False]], 200),
        ("bool", [[1, 0]], 200),
        ("bool", [[2, 0]], 400),
        ("int64", [[2**70, 0]], 400),
        ("float16", [[1, 2]], 200),
    ],
)
def test_values_are_never_changed_to_fit_a_dtype(
    dtype: str, value: list[list[Any]], status: int, tmp_path: Path
) -> None:
    code = "import torch\n\n\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return x.float()\n"
    archive = write_archive(tmp_path / "archive", code, seed=None)
    section = {"inputs": [{"name": "x", "dtype": dtype, "shape": ["batch", 2]}], "backends": ["eager"]}
    context = make_context(archive, tmp_path / "store", {"modelFile": "model.py"}, section=section)
    handler = CompiledHandler()
    handler.initialize(context)
    ((found, answer),) = ask(handler, context, value)
    assert found == status
    if status == 200:
        assert answer == [[float(item) for item in value[0]]]


def test_answers_keep_the_structure_of_the_output(tmp_path: Path) -> None:
    code = """
        import torch


        class Model(torch.nn.Module):
            def forward(self, x):
                return {"double": x * 2, "pair": (x + 1, [x.sum(1), "text", None])}
    """
    archive = write_archive(tmp_path / "archive", code, seed=None)
    section = {"backends": ["eager"]}
    context = make_context(archive, tmp_path / "store", {"modelFile": "model.py"}, section=section)
    handler = CompiledHandler()
    handler.initialize(context)
    answers = ask(handler, context, [[1, 2, 3, 4]], [[0, 0, 0, 1]])
    assert answers[1] == (200, {"double": [[0, 0, 0, 2]], "pair": [[[1, 1, 1, 2]], [[1], "text", None]]})
    json.dumps(answers)


class Strict(CompiledHandler):
    """Raises what the request names."""

    def preprocess(self, data: Any) -> Any:
        for row in data:
            body = self.request_body(row)
            if isinstance(body, dict) and "raise" in body:
                raise {"value": ValueError, "input": InputError, "key": KeyError, "unicode": _unicode}[body["raise"]](
                    "no"
                )
        return torch.cat([torch.tensor(self.request_body(row)["x"]) for row in data])

    def postprocess(self, data: Any) -> Any:
        return [[row.tolist()] for row in data]


def _unicode(text: str) -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, text)


@pytest.mark.parametrize("kind", ["value", "input", "unicode"])
def test_value_errors_of_an_own_preprocess_refuse_that_request(kind: str, context: Context, archive: Path) -> None:
    handler = Strict()
    handler.initialize(context)
    answers = ask(handler, context, {"x": ROWS[:1]}, {"raise": kind}, {"x": ROWS[1:]})
    assert [status for status, _ in answers] == [200, 400, 200]
    assert "no" in json.loads(answers[1][1])["message"]
    assert close(answers[2][1], expected(archive, ROWS[1:]))


def test_other_errors_are_not_hidden(context: Context) -> None:
    handler = Strict()
    handler.initialize(context)
    with pytest.raises(KeyError):
        ask(handler, context, {"raise": "key"})


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


def test_build_that_nearly_took_the_startup_timeout_warns(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    CompiledHandler().initialize(make_context(archive, tmp_path / "store", startupTimeout=0))
    assert "set startupTimeout: 60" in caplog.text
    caplog.clear()
    CompiledHandler().initialize(make_context(archive, tmp_path / "store", startupTimeout=0))
    assert "startupTimeout" not in caplog.text  # a hit builds nothing


def test_requests_have_a_body(handler: CompiledHandler) -> None:
    assert handler.request_body({"data": b"x"}) == b"x"
    assert handler.request_body({"body": "y"}) == "y"
    for row in ({}, {"body": b""}, {"data": ""}, {"body": None}):
        with pytest.raises(InputError, match="Content-Type"):
            handler.request_body(row)


def test_new_weights_in_a_new_archive_are_served(archive: Path, tmp_path: Path) -> None:
    for seed, result in ((1, "built"), (2, "hit")):
        write_weights(archive, seed)
        handler = CompiledHandler()
        context = make_context(archive, tmp_path / "store")
        handler.initialize(context)
        assert handler.model.outcome.result == result
        assert close(ask(handler, context, ROWS)[0][1], expected(archive, ROWS))


@pytest.mark.processes
def test_strict_does_not_load_what_ended_a_process_and_names_the_remedy(archive: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    CompiledHandler().initialize(make_context(archive, store))
    crash = {"CRASH_AT": "load", "BUILD_LOG": str(tmp_path / "log")}
    finish(start_python(START, archive, store, **crash), -signal.SIGSEGV)
    with pytest.raises(QuarantinedError) as caught:
        CompiledHandler().initialize(make_context(archive, store, section={"strict": True}))
    (record,) = read_quarantines(store)
    assert "Segmentation fault while loading" in str(caught.value)
    assert f"`ts-handlers unquarantine {record.key[:12]} --store {store}`" in str(caught.value)
    lenient = CompiledHandler()
    lenient.initialize(make_context(archive, store))
    assert lenient.model.outcome.backend == "eager"
    lift_quarantine(store, record.key)
    handler = CompiledHandler()
    handler.initialize(make_context(archive, store, section={"strict": True}))
    assert handler.model.outcome.result == "hit"
