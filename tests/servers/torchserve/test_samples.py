"""Samples in the archive tell what a handler's model takes: nothing else is declared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import write_archive

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler

from tests.support.handlers import ROWS, ask, close, expected, make_context
from ts_handlers import CompiledHandlerMixin
from ts_handlers.errors import FrozenModelError, SettingsError

pytestmark = pytest.mark.usefixtures("cheap_backend")
PROPOSED = "inputs: [{name: x, dtype: float32, shape: [batch, 4]}], dimensions: {batch: {min: 1, max: 16}}"


def start(theirs: type, archive: Path, tmp_path: Path, *args: Any, **section: Any) -> tuple[Any, Context]:
    """The two lines with samples in the place of inputs, started."""

    class Handler(CompiledHandlerMixin, theirs):  # type: ignore[misc]
        pass

    section = {"inputs": [], "dimensions": {}, "samples": ["sample.json"], **section}
    context = make_context(archive, tmp_path / "store", *args, section=section)
    handler: Any = Handler()
    handler.initialize(context)
    return handler, context


@pytest.fixture(autouse=True)
def _samples(archive: Path) -> None:
    (archive / "sample.json").write_text(json.dumps(ROWS[:1]))


class Rows(BaseHandler):  # type: ignore[misc]
    """Its `initialize` goes on after the model is there, as with a tokenizer."""

    runs = 0

    def initialize(self, context: Any) -> None:
        super().initialize(context)
        self.scale = 1.0

    def preprocess(self, data: Any) -> torch.Tensor:
        type(self).runs += 1
        return torch.cat([torch.tensor(row["body"]) for row in data]) * self.scale

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(data)

    def postprocess(self, data: Any) -> Any:
        return data.tolist()


def test_one_sample_is_enough_and_a_restart_runs_none(archive: Path, tmp_path: Path) -> None:
    for result in ("built", "hit"):
        handler, context = start(Rows, archive, tmp_path)
        ran, type(handler).runs = type(handler).runs, 0
        assert ran == (2 if result == "built" else 0)  # alone, and twice in one batch
        facts = handler.describe_handle()
        assert (facts["backend"], facts["result"]) == ("aot_inductor", result)
        assert facts["counters"]["build"] == (1 if result == "built" else 0)
        assert any(PROPOSED in note for note in facts["notes"]), facts["notes"]
        assert [status for status, _ in ask(handler, context, ROWS[:1], ROWS[1:])] == [200, 200]
        assert close(ask(handler, context, ROWS[:1])[0][1], expected(archive, ROWS[:1])[0])
        assert handler.model.metrics.counters["outside_eager"] == 0
        if result == "hit":
            assert handler.model._target.source.built() is None


def test_calls_outside_what_samples_told_are_answered_eagerly(archive: Path, tmp_path: Path) -> None:
    handler, context = start(Rows, archive, tmp_path)
    answers = ask(handler, context, *[ROWS[:1]] * 17)
    assert {status for status, _ in answers} == {200}
    assert handler.model.metrics.counters["outside_eager"] == 1


def test_samples_are_canary_inputs(archive: Path, tmp_path: Path) -> None:
    handler, _ = start(Rows, archive, tmp_path)
    model = handler.model
    weights = model._target.source.weights_digest()
    (canary,) = (tmp_path / "store" / "canaries").rglob(weights)
    record = torch.load(_payload(canary), weights_only=True)
    samples = [case for case in record["cases"] if case["origin"] == "sample"]
    assert [case["inputs"][0].tolist() for case in samples] == [ROWS[:1], ROWS[:1] * 2]


def _payload(path: Path) -> Any:
    import io

    return io.BytesIO(path.read_bytes().partition(b"\n")[2])


def test_another_sample_or_handler_is_looked_at_again_and_other_files_are_not(archive: Path, tmp_path: Path) -> None:
    start(Rows, archive, tmp_path)
    (archive / "MAR-INF").mkdir()
    (archive / "MAR-INF" / "MANIFEST.json").write_text("{}")
    handler, _ = start(Rows, archive, tmp_path)
    assert type(handler).runs == 0
    (archive / "sample.json").write_text(json.dumps(ROWS))
    handler, _ = start(Rows, archive, tmp_path)
    assert type(handler).runs == 2
    assert handler.model.outcome.result == "hit"  # the samples are no part of the model's key
    (archive / "vocab.txt").write_text("a")
    handler, _ = start(Rows, archive, tmp_path)
    assert (type(handler).runs, handler.model.outcome.result) == (2, "hit")


def test_several_samples_of_other_sizes_are_ranges(tmp_path: Path) -> None:
    code = """
    import torch


    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x, mask=None):
            return self.layer(x)
    """
    archive = write_archive(tmp_path / "longer", code)
    for name, length in (("a.json", 3), ("b.json", 7)):
        (archive / name).write_text(json.dumps([[[0.5] * 4] * length]))
    handler, _ = start(Rows, archive, tmp_path, samples=["a.json", "b.json"])
    (spec,) = handler.model.signature.inputs
    assert spec.shape == ("batch", "length", 4)
    assert {name: (d.min, d.max) for name, d in handler.model.signature.dimensions.items()} == {
        "batch": (1, 16),
        "length": (3, 7),
    }


class OwnModule(Rows):
    def initialize(self, context: Any) -> None:
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3)
        self.model = _Wrapped(self.layer)
        self.device = torch.device("cpu")
        self.scale = 1.0
        self.initialized = True


class _Wrapped(torch.nn.Module):
    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        return self.layer(x)


def test_a_module_of_their_own_initialize(archive: Path, tmp_path: Path) -> None:
    for result in ("built", "hit"):
        handler, context = start(OwnModule, archive, tmp_path)
        assert (handler.model.outcome.backend, handler.model.outcome.result) == ("aot_inductor", result)
        answer = ask(handler, context, ROWS[:1])[0]
        assert answer[0] == 200
        with torch.no_grad():
            assert close(answer[1], handler.layer(torch.tensor(ROWS[:1]))[0].tolist())


def test_integers_are_drawn_from_what_samples_held(tmp_path: Path) -> None:
    code = """
    import torch


    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.float())
    """
    archive = write_archive(tmp_path / "integers", code)
    (archive / "sample.json").write_text("[[3, 9, 4, 7]]")
    handler, _ = start(Rows, archive, tmp_path, backends=["eager"])
    assert handler.model.signature.inputs == ()  # nothing is compiled, so nothing is asked
    from ts_handlers.servers.torchserve.samples import SampleCalls

    calls = SampleCalls(handler.model._target.source)
    calls.note([torch.tensor([[3, 9, 4, 7]])], {})
    assert calls.values == {"x": (3, 10)}


@pytest.mark.parametrize(
    ("body", "samples", "reason"),
    [
        ("[[1.0, 2.0]]", ["sample.json"], "sample.json: RuntimeError: mat1 and mat2"),
        ("{", ["sample.json"], "sample.json cannot be read"),
        ("[]", ["nothing.json"], "expected a file nothing.json in the model's folder"),
    ],
)
def test_samples_that_tell_nothing_leave_the_handler_as_without(
    body: str, samples: list[str], reason: str, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (archive / "sample.json").write_text(body)
    handler, context = start(Rows, archive, tmp_path, samples=samples)
    assert ask(handler, context, ROWS[:1])[0][0] == 200
    facts = handler.describe_handle()
    assert facts["backend"] == "eager"
    assert any(reason in note for note in facts["notes"]), facts["notes"]
    assert reason in caplog.text
    assert PROPOSED in facts["fallbacks"][0]["reason"]


def test_an_artifact_that_must_be_there_is_asked_for_by_samples_too(archive: Path, tmp_path: Path) -> None:
    (archive / "sample.json").write_text("{")
    with pytest.raises(SettingsError, match="needs the model's inputs"):
        start(Rows, archive, tmp_path, strict=True)


def test_a_change_while_the_samples_wait_is_refused_as_of_a_compiled_model(archive: Path, tmp_path: Path) -> None:
    class Casts(Rows):
        def initialize(self, context: Any) -> None:
            super().initialize(context)
            self.model.half()

    with pytest.raises(FrozenModelError):
        start(Casts, archive, tmp_path)


def test_what_samples_leave_in_the_module_is_not_built(tmp_path: Path) -> None:
    code = """
    import torch


    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x)
    """
    archive = write_archive(tmp_path / "counting", code)
    (archive / "sample.json").write_text(json.dumps(ROWS))
    handler, _ = start(Rows, archive, tmp_path)
    assert handler.model.calls == 0


def test_text_and_bytes_arrive_as_from_the_server(archive: Path, tmp_path: Path) -> None:
    bodies: list[Any] = []

    class Reads(Rows):
        def preprocess(self, data: Any) -> torch.Tensor:
            bodies.extend(row["body"] for row in data)
            kinds = [self.context.get_request_header(index, "content-type") for index in range(len(data))]
            assert kinds == [
                {str: "text/plain", bytearray: "application/octet-stream"}[type(row["body"])] for row in data
            ]
            return torch.tensor(ROWS[:1] * len(data))

    (archive / "a.txt").write_text("héllo")
    (archive / "b.bin").write_bytes(b"\x00\xff")
    handler, _ = start(Reads, archive, tmp_path, samples=["a.txt", "b.bin"])
    assert bodies[:2] == ["héllo", bytearray(b"\x00\xff")]
    assert handler.model.outcome.backend == "aot_inductor"


def test_a_class_above_the_mixin_sets_up_what_samples_need(archive: Path, tmp_path: Path) -> None:
    class Above(CompiledHandlerMixin, BaseHandler):  # type: ignore[misc]
        def initialize(self, context: Any) -> None:
            super().initialize(context)
            self.scale = 2.0

        def preprocess(self, data: Any) -> torch.Tensor:
            return torch.cat([torch.tensor(row["body"]) for row in data]) * self.scale

    class Further(Above):
        def initialize(self, context: Any) -> None:
            super().initialize(context)
            self.scale = self.scale / 2

    section = {"inputs": [], "dimensions": {}, "samples": ["sample.json"]}
    for result in ("built", "hit"):
        handler: Any = Further()
        context = make_context(archive, tmp_path / "store", section=section)
        handler.initialize(context)
        assert (handler.model.outcome.backend, handler.model.outcome.result) == ("aot_inductor", result)
        assert close(ask(handler, context, ROWS[:1])[0][1], expected(archive, ROWS[:1])[0])


def test_what_a_handler_has_put_in_the_models_place_stays(archive: Path, tmp_path: Path) -> None:
    class Replaces(Rows):
        pass

    class Handler(CompiledHandlerMixin, Replaces):
        def initialize(self, context: Any) -> None:
            super().initialize(context)
            served = self.model
            self.model = lambda rows: served(rows) + 1

    section = {"inputs": [], "dimensions": {}, "samples": ["sample.json"]}
    context = make_context(archive, tmp_path / "store", section=section)
    handler: Any = Handler()
    handler.initialize(context)
    answer = ask(handler, context, ROWS[:1])[0]
    assert answer[0] == 200
    assert close(answer[1], [value + 1 for value in expected(archive, ROWS[:1])[0]])


def test_fields_of_a_form_arrive_under_their_names(archive: Path, tmp_path: Path) -> None:
    class Fields(Rows):
        def preprocess(self, data: Any) -> torch.Tensor:
            rows = [json.loads(bytes(row["rows"])) for row in data]
            assert {row["more"] for row in data} == {"text"}
            return torch.cat([torch.tensor(row) for row in rows])

    (archive / "rows.bin").write_text(json.dumps(ROWS[:1]))
    (archive / "more.txt").write_text("text")
    handler, _ = start(Fields, archive, tmp_path, samples=[{"rows": "rows.bin", "more": "more.txt"}])
    assert handler.model.outcome.backend == "aot_inductor"
