"""Two lines over handlers as users write them: their methods run, what can be compiled is, the rest is as before."""

from __future__ import annotations

import asyncio
import collections
import copy
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import LINEAR_SECTION, save_weights, write_archive

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.context import Context, RequestProcessor
from ts.torch_handler.base_handler import BaseHandler

from tests.support.handlers import ROWS, ask, close, expected, make_context
from ts_handlers import CompiledHandler, CompiledHandlerMixin, CompiledModel
from ts_handlers.errors import InputError, MissError, SettingsError

pytestmark = pytest.mark.usefixtures("cheap_backend")
NO_INPUTS: dict[str, Any] = {"inputs": [], "dimensions": {}}


def start(theirs: type, archive: Path, tmp_path: Path, *args: Any, **config: Any) -> tuple[Any, Context]:
    """The two lines, started."""

    class Handler(CompiledHandlerMixin, theirs):  # type: ignore[misc]
        pass

    context = make_context(archive, tmp_path / "store", *args, **config)
    handler: Any = Handler()
    handler.initialize(context)
    return handler, context


def read_rows(data: Any) -> torch.Tensor:
    return torch.cat([torch.tensor(row["body"]) for row in data])


class Classifier(BaseHandler):  # type: ignore[misc]
    """Overrides `inference`, which takes the argmax and looks labels up."""

    labels = ("one", "two", "three")

    def preprocess(self, data: Any) -> torch.Tensor:
        return read_rows(data)

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> list[str]:
        with torch.no_grad():
            return [self.labels[index] for index in self.model(data).argmax(1).tolist()]

    def postprocess(self, data: Any) -> Any:
        return data


def test_their_inference_is_called_and_the_module_is_swapped(archive: Path, tmp_path: Path) -> None:
    wanted = [Classifier.labels[torch.tensor(row).argmax()] for row in expected(archive, ROWS)]
    for result in ("built", "hit"):
        handler, context = start(Classifier, archive, tmp_path)
        assert isinstance(handler.model, CompiledModel)
        assert handler.model.outcome.result == result
        assert ask(handler, context, ROWS[:1], ROWS[1:]) == [(200, label) for label in wanted]
        assert handler.model.metrics.counters["outside_eager"] == 0


def test_their_inference_may_call_the_base_handlers(archive: Path, tmp_path: Path) -> None:
    class Calls(Classifier):
        def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            return BaseHandler.inference(self, data).argmax(1).tolist()

    handler, context = start(Calls, archive, tmp_path)
    assert ask(handler, context, ROWS[:1])[0] == (200, torch.tensor(expected(archive, ROWS)).argmax(1).tolist()[0])


def test_the_model_looks_like_the_module(archive: Path, tmp_path: Path) -> None:
    start(Classifier, archive, tmp_path)
    handler, _ = start(Classifier, archive, tmp_path)
    model = handler.model
    assert model.outcome.result == "hit"
    assert isinstance(model, torch.nn.Module)
    assert isinstance(model, CompiledModel)
    assert handler.model._target.source.built() is None  # looking at it has not built the eager module
    assert next(model.parameters()).device == model.device == torch.device("cpu")
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    assert model._modules["layer"] is model.layer
    assert type(model.layer) is torch.nn.Linear
    assert not model.training
    assert model.eval() is model.to("cpu") is model
    assert type(model).__name__ == "CompiledModel"
    assert model.__class__.__name__ == "Model"
    assert not hasattr(model, "no_such_attribute")
    rows = torch.tensor(ROWS)
    wanted = torch.tensor(expected(archive, ROWS))
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model.layer))):
        with torch.no_grad():
            assert torch.allclose(other(rows), wanted, atol=1e-5)
    torch.save(model.state_dict(), io.BytesIO())
    outer = torch.nn.Sequential(model)
    assert [name for name, _ in outer.named_parameters()] == ["0.layer.weight", "0.layer.bias"]
    assert torch.allclose(outer.eval()(rows), wanted, atol=1e-5)
    assert model.metrics.counters["outside_eager"] == 0


class Flexible(torch.nn.Module):
    """Takes its inputs in the ways in which models of libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.register_parameter("dummy", None)

    def forward(self, scale: Any = None, x: Any = None, more: Any = None, return_dict: bool = True) -> Any:
        if isinstance(x, (list, tuple)):
            x = torch.cat(list(x))
        if isinstance(x, collections.abc.Mapping):
            x = x["x"]
        out = self.layer(x.float())
        if scale is not None:
            out = out * scale
        if more is not None:
            out = out + more["deep"][0]
        return collections.OrderedDict(logits=out) if return_dict else (out,)


class Initializes(BaseHandler):  # type: ignore[misc]
    """An `initialize` without super, and an `__init__` without it."""

    def __init__(self) -> None:
        self.initialized = False
        self.settings = "theirs"

    def initialize(self, context: Any) -> None:
        state = torch.load(Path(context.system_properties["model_dir"]) / "model.pt", weights_only=True)
        self.model = self.module()
        self.model.load_state_dict(state)
        self.model.eval()
        self._config = self.settings = "theirs"
        self.initialized = True

    def module(self) -> torch.nn.Module:
        return Flexible()

    def preprocess(self, data: Any) -> Any:
        return read_rows(data)

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        return self.model(x=data)["logits"]

    def postprocess(self, data: Any) -> Any:
        return data.tolist()


X = torch.tensor(ROWS)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], int]] = {
    "as declared": ((), {"x": X}, 0),
    "flag": ((), {"x": X, "return_dict": False}, 1),
    "by position": ((None, X), {}, 1),
    "undeclared argument": ((), {"x": X, "scale": torch.tensor(2.0)}, 1),
    "undeclared argument by position": ((torch.tensor(2.0), X), {}, 1),
    "None": ((), {"x": X, "scale": None}, 1),
    "list": ((), {"x": [X[:1], X[1:]]}, 1),
    "nested": ((), {"x": X, "more": {"deep": [X[:, :3]]}}, 1),
    "dict": ((), {"x": collections.UserDict(x=X)}, 1),
    "another dtype": ((), {"x": X.double()}, 1),
}


@pytest.mark.parametrize("backend", ["aot_inductor", "eager"])
@pytest.mark.parametrize("call", list(CALLS))
def test_calls_of_another_form_are_answered_by_the_eager_module(
    call: str, backend: str, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args, kwargs, outside = CALLS[call]
    handler, _ = start(Initializes, archive, tmp_path, section={"backends": [backend]})
    model = handler.model
    assert isinstance(model, CompiledModel)
    assert model.outcome.backend == backend
    eager = Flexible().eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = eager(*args, **kwargs)
    for _ in range(2):
        found = model(*args, **kwargs)
        if outside or backend == "eager":
            assert type(found) is type(wanted)
            found = found if isinstance(found, tuple) else found["logits"]
        assert close(
            found[0] if isinstance(found, tuple) else found,
            wanted[0] if isinstance(wanted, tuple) else wanted["logits"],
        )
    facts = model.describe()
    assert facts["counters"]["outside_eager"] == 2 * outside
    assert list(facts["other_forms"].values()) == [2] * outside
    assert caplog.text.count("in a form that was not compiled") == outside
    assert facts["counters"]["refused"] == 0


def test_what_the_eager_module_does_not_take_either_is_refused(archive: Path, tmp_path: Path) -> None:
    handler, _ = start(Initializes, archive, tmp_path)
    with pytest.raises(InputError, match="unknown input 'nonsense'"):
        handler.model(x=X, nonsense=1)
    with pytest.raises(InputError, match="outside the declared range"):
        handler.model(x=torch.zeros(9, 4))
    assert handler.model.metrics.counters["refused"] == 2
    assert handler.model.metrics.counters["outside_eager"] == 0


def test_values_outside_their_limits_are_refused_in_every_form(archive: Path, tmp_path: Path) -> None:
    inputs = [{**LINEAR_SECTION["inputs"][0], "limits": [-5, 5]}]
    handler, _ = start(Initializes, archive, tmp_path, section={"inputs": inputs, "backends": ["eager"]})
    assert handler.model(x=X, return_dict=False)[0].shape == (2, 3)
    with pytest.raises(InputError, match="limits"):
        handler.model(x=X + 9, return_dict=False)


def test_arguments_by_position_are_in_the_order_of_forward(tmp_path: Path, archive: Path) -> None:
    class Difference(torch.nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return first - second

    class Theirs(Initializes):
        def initialize(self, context: Any) -> None:
            self.model = Difference()

    inputs = [{"name": name, "dtype": "float32", "shape": ["batch", 4]} for name in ("second", "first")]
    handler, _ = start(Theirs, archive, tmp_path, section={"inputs": inputs, "backends": ["eager"]})
    assert torch.equal(handler.model(X, 2 * X), -X)
    assert torch.equal(handler.model(X, second=2 * X), -X)
    assert handler.model.metrics.counters["outside_eager"] == 0


def test_arguments_of_an_archives_model_mean_the_same_with_every_backend(tmp_path: Path) -> None:
    code = """
    import torch


    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, first, second):
            return self.layer(second) + 0 * first.sum()
    """
    archive = write_archive(tmp_path / "archive", code)
    # The cheap backend computes from the first declared input only, as the model does from `second`.
    inputs = [{"name": name, "dtype": "float32", "shape": ["batch", 4]} for name in ("second", "first")]
    answers = []
    for backend in ("aot_inductor", "eager"):
        handler, _ = start(Classifier, archive, tmp_path, section={"inputs": inputs, "backends": [backend]})
        assert handler.model.outcome.backend == backend
        answers.append(handler.model(X, 2 * X))
    assert close(*answers)


def test_outputs_may_be_changed_in_place(archive: Path, tmp_path: Path) -> None:
    handler, _ = start(Initializes, archive, tmp_path, section={"backends": ["eager"]})
    out = handler.model(x=X)["logits"]
    out += 1
    assert not out.is_inference()


class HandleOnly:
    """No BaseHandler: `initialize` and `handle`, and a model under another name."""

    def initialize(self, context: Any) -> None:
        self.factor = 2

    def handle(self, data: Any, context: Any) -> Any:
        return [[value * self.factor for value in row["body"]] for row in data]


class NoModel(BaseHandler):  # type: ignore[misc]
    def initialize(self, context: Any) -> None:
        self.initialized = True

    def preprocess(self, data: Any) -> Any:
        return [row["body"] for row in data]

    def inference(self, data: Any, *args: Any) -> Any:
        return [[2 * value for value in row] for row in data]

    def postprocess(self, data: Any) -> Any:
        return data


class Pipeline(NoModel):
    """Holds a pipeline, which is no module."""

    def initialize(self, context: Any) -> None:
        self.model = lambda rows: [[2 * value for value in row] for row in rows]

    def inference(self, data: Any, *args: Any) -> Any:
        return self.model(data)


class Describes(HandleOnly):
    def describe_handle(self) -> Any:
        return {"theirs": 1}

    def load_model(self, path: str) -> str:
        return path

    def initialize(self, context: Any) -> None:
        assert self.load_model("a") == "a"
        assert context.model_yaml_config["pt2"]["compile"]["backend"] == "inductor"
        super().initialize(context)


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        (HandleOnly, "no self.model"),
        (NoModel, "no self.model"),
        (Pipeline, "self.model is a function and no torch.nn.Module"),
        (Describes, "no self.model"),
    ],
)
def test_handlers_without_a_module_are_served_as_they_are(
    theirs: type, reason: str, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pt2 = {"compile": {"enable": True, "backend": "inductor"}}
    handler, context = start(theirs, archive, tmp_path, pt2=pt2, section=NO_INPUTS)
    assert ask(handler, context, [1, 2], [3]) == [(200, [2, 4]), (200, [6])]
    context.request_processor = [RequestProcessor({"describe": "True"})]
    (facts,) = handler.handle([{}], context)
    assert reason in facts["reason"]
    assert f"nothing is compiled, the handler serves as it is: {facts['reason']}" in caplog.text
    assert facts.get("theirs") == (1 if theirs is Describes else None)


@pytest.mark.parametrize("theirs", [HandleOnly, NoModel])
def test_describe_and_predictions_with_its_header_are_told_apart(theirs: type, archive: Path, tmp_path: Path) -> None:
    handler, context = start(theirs, archive, tmp_path, section=NO_INPUTS)
    header = {"describe": "True"}
    assert ask(handler, context, [1, 2], [3], header=header) == [(200, [2, 4]), (200, [6])]
    context.request_processor = [RequestProcessor({}), RequestProcessor(header), RequestProcessor({})]
    first, facts, last = handler.handle([{"body": [1]}, {}, {"body": [3]}], context)
    assert (first, last) == ([2], [6])
    assert "no self.model" in facts["reason"]


def test_a_request_that_their_handle_fails_at_leaves_the_others_alone(archive: Path, tmp_path: Path) -> None:
    handler, context = start(HandleOnly, archive, tmp_path, section=NO_INPUTS)
    answers = ask(handler, context, [1], 5, [3])
    assert [status for status, _ in answers] == [200, 503, 200]
    assert (answers[0][1], answers[2][1]) == ([2], [6])


def test_their_handle_is_not_passed_by_for_micro_batches(archive: Path, tmp_path: Path) -> None:
    micro = {"micro_batch_size": 1, "parallelism": {"preprocess": 1, "inference": 1, "postprocess": 1}}
    handler, context = start(HandleOnly, archive, tmp_path, micro_batching=micro)
    assert ask(handler, context, [1, 2], [3]) == [(200, [2, 4]), (200, [6])]


class Modes(torch.nn.Module):
    """Answers otherwise in training mode, if its layer does."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[:, :3]


@pytest.mark.parametrize(
    ("layer", "matters"),
    [
        (torch.nn.BatchNorm1d(4), True),
        (torch.nn.Dropout(0.5), True),
        (torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Linear(4, 3)), False),
    ],
)
def test_a_module_in_training_mode_answers_as_it_does_without_us(
    layer: torch.nn.Module, matters: bool, archive: Path, tmp_path: Path
) -> None:
    class Theirs(Initializes):
        def initialize(self, context: Any) -> None:
            self.model = Modes(copy.deepcopy(layer))

    handler, _ = start(Theirs, archive, tmp_path)
    assert isinstance(handler.model, CompiledModel) == (not matters)
    if matters:
        assert f"{type(layer).__name__} answer otherwise; call self.model.eval()" in handler.describe_handle()["reason"]
        torch.manual_seed(0)
        wanted = Modes(copy.deepcopy(layer))(x=X)
        torch.manual_seed(0)
        assert torch.equal(handler.model(x=X), wanted)


def test_micro_batching_of_torchserves_own_is_left_alone(archive: Path, tmp_path: Path) -> None:
    from ts.handler_utils.micro_batching import MicroBatching

    class Theirs(Classifier):
        def __init__(self) -> None:  # as TorchServe's example: without its base's
            self.handle = MicroBatching(self)

    micro = {"micro_batch_size": 1, "parallelism": {"preprocess": 1, "inference": 1, "postprocess": 1}}
    handler, context = start(Theirs, archive, tmp_path, micro_batching=micro)
    try:
        wanted = [Classifier.labels[torch.tensor(row).argmax()] for row in expected(archive, ROWS)]
        assert ask(handler, context, ROWS[:1], ROWS[1:]) == [(200, label) for label in wanted]
        assert handler._micro_batches is None
        assert handler.model.metrics.counters["outside_eager"] == 0
        context.request_processor = [RequestProcessor({"describe": "True"})]
        assert handler.handle([{}], context)[0]["backend"] == "aot_inductor"
    finally:
        handler.handle.shutdown()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_without_a_model_file_that_their_initialize_loads(name: str, archive: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = Flexible()
    save_weights(archive / name, module.state_dict())

    class Theirs(Initializes):
        def initialize(self, context: Any) -> None:
            path = Path(context.system_properties["model_dir"]) / context.manifest["model"]["serializedFile"]
            if name.endswith("pth"):
                state = torch.load(path, weights_only=True)
            else:
                from safetensors.torch import load_file

                state = load_file(path)
            self.model = Flexible()
            self.model.load_state_dict(state)

    for result in ("built", "hit"):
        handler, context = start(Theirs, archive, tmp_path, {"serializedFile": name})
        assert (handler.model.outcome.backend, handler.model.outcome.result) == ("aot_inductor", result)
        handler.inference = lambda data, model=handler.model: model(x=data)
        with torch.no_grad():
            assert close(ask(handler, context, ROWS[:1])[0][1], module(x=X)["logits"][0])


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_module_of_theirs_is_compiled_by_us(in_place: bool, archive: Path, tmp_path: Path) -> None:
    class Theirs(Initializes):
        def initialize(self, context: Any) -> None:
            super().initialize(context)
            if in_place:
                self.model.compile()
            else:
                self.model = torch.compile(self.model)

    handler, _ = start(Theirs, archive, tmp_path)
    assert handler.model.outcome.backend == "aot_inductor"
    assert handler.model._eager_module()._compiled_call_impl is None
    assert close(handler.model(x=X), torch.tensor(expected(archive, ROWS)))


@pytest.mark.parametrize(
    "pt2",
    [
        None,
        *(
            pytest.param(x, marks=pytest.mark.compile)
            for x in ({"compile": {"enable": True, "mode": "default"}}, "inductor")
        ),
    ],
)
def test_without_inputs_eager_serves_and_the_reason_proposes_them(
    pt2: Any, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section: dict[str, Any] = dict(NO_INPUTS)
    handler, context = start(Classifier, archive, tmp_path, section=section, **({"pt2": pt2} if pt2 else {}))
    assert ask(handler, context, ROWS[:1])[0][0] == 200
    facts = handler.describe_handle()
    assert (facts["backend"], facts["counters"]["fallback"]) == ("eager", 1)
    proposal = "inputs: [{name: x, dtype: float32, shape: [batch, 4]}], dimensions: {batch: {min: 1, max: 16}}"
    assert proposal in facts["fallbacks"][0]["reason"]
    assert proposal in caplog.text
    assert isinstance(handler.model, torch._dynamo.OptimizedModule) == (pt2 is not None)
    assert any("at the first request of each process" in note for note in facts["notes"]) == (pt2 is not None)
    assert (facts["counters"]["compile_after_ready"] > 0) == (pt2 is not None)
    wanted = [Classifier.labels[torch.tensor(row).argmax()] for row in expected(archive, ROWS)]
    assert ask(handler, context, ROWS[:1], ROWS[1:]) == [(200, label) for label in wanted]


@pytest.mark.parametrize("asked", [{"strict": True}, {"on_miss": "fail"}])
def test_without_inputs_an_artifact_that_must_be_there_is_an_error(
    asked: dict[str, Any], archive: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="needs the model's inputs"):
        start(Classifier, archive, tmp_path, section={**NO_INPUTS, **asked})


def test_the_handler_of_json_tensors_asks_for_its_inputs_at_the_start(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needed by the default preprocess"):
        CompiledHandler().initialize(make_context(archive, tmp_path / "store", section=NO_INPUTS))


def test_a_module_that_cannot_be_started_is_served_as_it_is(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Refuses(Flexible):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("`.to` is not supported for quantised models")

    class Theirs(Initializes):
        def module(self) -> torch.nn.Module:
            return Refuses()

    handler, context = start(Theirs, archive, tmp_path, section={"backends": ["inductor", "eager"]})
    assert type(handler.model) is Refuses
    assert close(ask(handler, context, ROWS[:1])[0][1], expected(archive, ROWS)[0])
    assert "`.to` is not supported" in handler.describe_handle()["reason"]
    with pytest.raises(MissError):
        start(Theirs, archive, tmp_path, section={"backends": ["aot_inductor"], "on_miss": "fail"})


def test_a_module_on_two_devices_is_served_as_it_is(archive: Path, tmp_path: Path) -> None:
    class Theirs(Initializes):
        def initialize(self, context: Any) -> None:
            super().initialize(context)
            self.model.register_buffer("other", torch.empty(1, device="meta"))

    handler, context = start(Theirs, archive, tmp_path)
    assert ask(handler, context, ROWS[:1])[0][0] == 200
    assert "lie on cpu, meta; expected one device" in handler.describe_handle()["reason"]


class Explained(Classifier):
    """Explains with gradients and a hook on a layer, as captum does."""

    def get_insights(self, tensors: torch.Tensor, raw: Any, target: Any) -> list[Any]:
        seen: list[torch.Tensor] = []
        handle = self.model.layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
        try:
            tensors = tensors.clone().requires_grad_()
            output = self.model(tensors)
            (gradient,) = torch.autograd.grad(output[:, int(target)].sum(), tensors)
        finally:
            handle.remove()
        assert seen[0] is output
        return [gradient.tolist()]


def test_explanations_get_the_eager_module_with_gradients_and_hooks(archive: Path, tmp_path: Path) -> None:
    start(Explained, archive, tmp_path)
    handler, context = start(Explained, archive, tmp_path)
    assert handler.model.outcome.result == "hit"
    with torch.inference_mode():
        _ = handler.model.layer  # parameters made in inference mode would have no gradients
    weight = torch.load(archive / "model.pt", weights_only=True)["layer.weight"]
    for _ in range(2):
        ((status, answer),) = ask(handler, context, ROWS, header={"explain": "True"})
        assert status == 200
        assert close(answer, weight[0].repeat(2, 1))
        context.request_processor = []
        assert ask(handler, context, ROWS[:1])[0][0] == 200  # a prediction is the artifact's again
    out = handler.model(X)
    assert not out.requires_grad
    assert handler.model.metrics.counters["outside_eager"] == 0


def test_mappings_go_to_the_model_by_name(archive: Path, tmp_path: Path) -> None:
    class Encodes(BaseHandler):  # type: ignore[misc]
        def preprocess(self, data: Any) -> Any:
            return collections.UserDict(x=read_rows(data))  # as transformers' BatchEncoding is one

    handler, context = start(Encodes, archive, tmp_path)
    ((status, answer),) = ask(handler, context, ROWS[:1])
    assert status == 200
    assert close(answer, expected(archive, ROWS[:1])[0])


def test_an_asynchronous_handle_is_awaited_by_the_server(archive: Path, tmp_path: Path) -> None:
    class Waits(NoModel):
        async def handle(self, data: Any, context: Any) -> Any:
            return await self.preprocess(data, "more")

        async def preprocess(self, data: Any, more: str) -> Any:
            return [more for _ in data]

    handler, context = start(Waits, archive, tmp_path)
    for count in (1, 2):
        context.request_processor = [RequestProcessor({}) for _ in range(count)]
        assert asyncio.run(handler.handle([{"body": 1}] * count, context)) == ["more"] * count
    context.request_processor = [RequestProcessor({"describe": "True"})]
    (facts,) = asyncio.run(handler.handle([{}], context))
    assert "no self.model" in facts["reason"]


def test_a_torchscript_model_of_theirs_is_served_as_it_is(archive: Path, tmp_path: Path) -> None:
    class Scripted(Classifier):
        def initialize(self, context: Any) -> None:
            super().initialize(context)
            self.model = torch.jit.trace(torch.nn.Linear(4, 3), torch.tensor(ROWS))

    handler, context = start(Scripted, archive, tmp_path)
    assert isinstance(handler.model, torch.jit.ScriptModule)
    assert ask(handler, context, ROWS[:1])[0][0] == 200
    facts = handler.describe_handle()
    assert (facts["backend"], facts["reason"]) == ("torchscript", "self.model is a TorchScript model")


def test_answers_through_an_envelope_are_those_of_plain(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ts.torch_handler.request_envelope.json import JSONEnvelope

    class Rows(Classifier):
        def preprocess(self, data: Any) -> torch.Tensor:
            return torch.tensor([row.get("data") if isinstance(row, dict) else row for row in data])

    body = [{"body": {"instances": [{"data": row} for row in ROWS]}}]
    answers = []
    monkeypatch.syspath_prepend(archive)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    handler, context = start(Rows, archive, tmp_path)
    for each in (Rows(), handler):
        if each is not handler:
            each.initialize(make_context(archive, tmp_path / "store"))
        context.request_processor = [RequestProcessor({})]
        answers.append(JSONEnvelope(each.handle).handle(body, context))
    assert answers[0] == answers[1]
    assert len(json.loads(answers[0][0])["predictions"]) == 2


def test_a_handlers_own_methods_keep_the_names_of_the_mixins_helpers(archive: Path, tmp_path: Path) -> None:
    class Reads(Classifier):
        model_device = "theirs"

        def request_body(self, row: Any, key: str) -> Any:
            return row[key]

        def preprocess(self, data: Any) -> torch.Tensor:
            return torch.cat([torch.tensor(self.request_body(row, "body")) for row in data])

    handler, context = start(Reads, archive, tmp_path)
    assert ask(handler, context, ROWS[:1])[0][0] == 200
    assert handler.model_device == "theirs"


@pytest.mark.parametrize("pt2", [{"compile": {"enable": True, "backend": "aot_eager"}}, "aot_eager"])
def test_a_compiler_that_only_torchserve_knows_is_left_to_it(
    pt2: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(archive)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    none = {"backends": None}
    handler, context = start(Classifier, archive, tmp_path, section=none, pt2=copy.deepcopy(pt2))
    assert isinstance(handler.model, torch._dynamo.OptimizedModule)
    wanted = [Classifier.labels[torch.tensor(row).argmax()] for row in expected(archive, ROWS)]
    assert ask(handler, context, ROWS[:1], ROWS[1:]) == [(200, label) for label in wanted]
    assert "'aot_eager' has no persistent artifact" in handler.describe_handle()["reason"]
    assert "nothing is compiled, the handler serves as it is: pt2.compile.backend: 'aot_eager'" in caplog.text
    for section in ({"strict": True}, {"on_miss": "fail"}):
        with pytest.raises(SettingsError, match="has no persistent artifact"):
            start(Classifier, archive, tmp_path, section={**none, **section}, pt2=copy.deepcopy(pt2))
    with pytest.raises(SettingsError, match="'inductr' has no persistent artifact"):
        start(Classifier, archive, tmp_path, section=none, pt2={"compile": {"enable": True, "backend": "inductr"}})
    with pytest.raises(SettingsError, match="has no persistent artifact"):
        CompiledHandler().initialize(make_context(archive, tmp_path / "store", section=none, pt2=copy.deepcopy(pt2)))


@pytest.mark.parametrize("section", [{}, NO_INPUTS, {"backends": ["eager"]}])
def test_a_start_draws_no_random_numbers_that_a_handler_would_get(
    section: dict[str, Any], archive: Path, tmp_path: Path
) -> None:
    class Samples(Initializes):
        def initialize(self, context: Any) -> None:
            super().initialize(context)
            torch.manual_seed(5)

    torch.manual_seed(5)
    wanted = torch.rand(3)
    for _ in range(2):  # one that builds, one that hits
        handler, _ = start(Samples, archive, tmp_path, section=section)
        assert torch.equal(torch.rand(3), wanted)
        torch.manual_seed(5)
        handler.model(x=X)
        assert torch.equal(torch.rand(3), wanted)
