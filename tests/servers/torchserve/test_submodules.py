"""The setting `models`: parts of what a handler holds are compiled in their place, each by itself."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import Register

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts.torch_handler.base_handler import BaseHandler

from tests.support.handlers import ask, make_context
from ts_handlers import CompiledHandlerMixin
from ts_handlers.errors import MissError, SettingsError
from ts_handlers.settings import parse_settings


@pytest.fixture(autouse=True)
def scripted(register: Register) -> None:
    """A backend that takes any model, in the place of ``aot_inductor``."""
    register("aot_inductor", "tests.support.scripted_backend:BACKEND")


class Sample(NamedTuple):
    """What the parts return unless they are asked for a tuple, as diffusers' outputs."""

    sample: torch.Tensor


class Unet(torch.nn.Module):
    """Has the calls of diffusers' UNet2DConditionModel."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 4}
        self.inside = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.outside = torch.nn.Conv2d(8, 4, 3, padding=1)
        self.states = torch.nn.Linear(6, 8)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        class_labels: Any = None,
        timestep_cond: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(timestep)
        hidden = self.inside(sample) + self.states(encoder_hidden_states.mean(1))[:, :, None, None]
        out = self.outside(torch.nn.functional.silu(hidden)) + timestep.float() / 1000
        out = out if class_labels is None else out + class_labels
        return Sample(out) if return_dict else (out,)


class Vae(torch.nn.Module):
    """Has `encode` and `decode` beside `forward`, as diffusers' AutoencoderKL."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 4, 2, stride=2)
        self.decoder = torch.nn.ConvTranspose2d(4, 3, 2, stride=2)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        out = self.encoder(x)
        return Sample(out) if return_dict else (out,)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        out = self.decoder(z)
        return Sample(out) if return_dict else (out,)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(sample).sample).sample


class Text(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 6)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids)


class Pipeline:
    """No module, but holds three."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.unet = Unet().eval()
        self.vae = Vae().eval()
        self.text_encoder = Text().eval()
        self.steps = 3

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            states = self.text_encoder(ids)
            latents = torch.ones(len(ids), 4, 8, 8)
            for step in reversed(range(self.steps)):
                t = torch.tensor(step)
                noise = self.unet(latents, t, encoder_hidden_states=states, timestep_cond=None, return_dict=False)[0]
                latents = latents - 0.1 * noise
            return self.vae.decode(latents, return_dict=False, generator=None)[0]


class Diffuses(BaseHandler):  # type: ignore[misc]
    """As TorchServe's Stable Diffusion handler: a pipeline in `self.pipe`, and no super()."""

    def initialize(self, context: Any) -> None:
        self.pipe = Pipeline()
        self.initialized = True

    def preprocess(self, data: Any) -> torch.Tensor:
        return torch.tensor([row["body"] for row in data])

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        return self.pipe(data)

    def postprocess(self, data: Any) -> Any:
        return data.tolist()


def tensor(name: str, *shape: Any, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": ["batch", *shape], **more}


BATCH = {"batch": {"min": 1, "max": 4}}
UNET = {
    "path": "pipe.unet",
    "inputs": [
        tensor("sample", 4, 8, 8),
        {"name": "timestep", "dtype": "int64", "shape": []},
        tensor("encoder_hidden_states", 5, 6),
    ],
    "dimensions": BATCH,
    "arguments": {"return_dict": False},
}
DECODE = {
    "path": "pipe.vae",
    "method": "decode",
    "inputs": [tensor("z", 4, 8, 8)],
    "dimensions": BATCH,
    "arguments": {"return_dict": False},
}
TEXT = {"path": "pipe.text_encoder", "inputs": [tensor("input_ids", 5, dtype="int64")], "dimensions": BATCH}
MODELS: dict[str, Any] = {"unet": UNET, "decoder": DECODE, "text": TEXT}
IDS = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]


class Handler(CompiledHandlerMixin, Diffuses):
    pass


def start(tmp_path: Path, models: dict[str, Any], kind: type = Handler, **section: Any) -> tuple[Any, Any]:
    """A handler whose archive holds nothing but itself, started."""
    section = {"inputs": [], "dimensions": {}, "models": models, **section}
    context = make_context(tmp_path, tmp_path / "store", {}, section=section)
    handler = kind()
    handler.initialize(context)
    return handler, context


def counted(handler: Any, name: str) -> dict[str, dict[str, int]]:
    """A counter of each submodel."""
    rows = handler.describe_handle()["models"]
    return {model: row["counters"][name] for model, row in rows.items()}


def test_each_part_is_compiled_and_the_pipeline_calls_it(tmp_path: Path) -> None:
    plain = Diffuses()
    plain.initialize(None)
    wanted = plain.inference(torch.tensor(IDS))
    for result in ("built", "hit"):
        handler, context = start(tmp_path, MODELS)
        answers = ask(handler, context, *IDS)
        assert [status for status, _ in answers] == [200, 200]
        assert torch.allclose(torch.tensor([answer for _, answer in answers]), wanted, atol=1e-5)
        rows = handler.describe_handle()["models"]
        assert {name: row["result"] for name, row in rows.items()} == dict.fromkeys(MODELS, result)
        assert {name: row["backend"] for name, row in rows.items()} == dict.fromkeys(MODELS, "aot_inductor")
        assert {row["path"] for row in rows.values()} == {"pipe.unet", "pipe.vae", "pipe.text_encoder"}
        assert counted(handler, "build") == dict.fromkeys(MODELS, int(result == "built"))
        assert counted(handler, "outside_eager") == dict.fromkeys(MODELS, 0)
        assert all(row["contexts"]["lent"] > 0 for row in rows.values())
        assert {row["reason"] for row in rows.values()} == {None}  # the artifacts were called, and nothing else


def test_parts_have_settings_of_their_own(tmp_path: Path) -> None:
    handler, _ = start(tmp_path, {"unet": {**UNET, "backends": ["eager"]}, "decoder": DECODE})
    rows = handler.describe_handle()["models"]
    assert rows["unet"]["backend"] == "eager"
    assert rows["decoder"]["backend"] == "aot_inductor"
    assert "forward" not in vars(handler.pipe.unet)  # nothing stands between the pipeline and what serves eagerly
    assert rows["unet"]["key"] is None
    assert rows["decoder"]["key"] is not None


def test_the_module_stays_what_it_is(tmp_path: Path) -> None:
    handler, _ = start(tmp_path, MODELS)
    unet = handler.pipe.unet
    assert type(unet) is Unet
    assert unet.config == {"in_channels": 4}
    assert set(unet.state_dict()) == set(Unet().state_dict())
    assert list(inspect.signature(unet.forward).parameters) == list(inspect.signature(Unet().forward).parameters)
    assert unet.to("cpu") is unet.eval() is unet
    inputs = torch.ones(1, 4, 8, 8), 3, torch.ones(1, 5, 6)
    with torch.no_grad():
        wanted = Unet.forward(unet, *inputs)
        for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
            assert torch.equal(other(*inputs).sample, wanted.sample)
    copied = copy.deepcopy(unet)
    with torch.no_grad():
        copied.outside.bias += 1
        assert torch.allclose(copied(*inputs, return_dict=False)[0], wanted.sample + 1, atol=1e-5)
    torch.save(unet.state_dict(), io.BytesIO())
    assert counted(handler, "outside_eager")["unet"] == 0


CALLS: dict[str, tuple[dict[str, Any], int]] = {
    "as compiled": ({"return_dict": False}, 0),
    "with a default": ({"return_dict": False, "class_labels": None, "timestep_cond": None}, 0),
    "without the fixed argument": ({}, 1),
    "another value": ({"return_dict": True}, 1),
    "a number for a tensor": ({"return_dict": False, "timestep": 3}, 1),
    "another dtype": ({"return_dict": False, "timestep": torch.tensor(3.0)}, 1),
    "an argument that is not compiled": ({"return_dict": False, "class_labels": torch.ones(())}, 1),
    "a size that is not compiled": ({"return_dict": False, "sample": torch.ones(2, 4, 16, 16)}, 1),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_calls_keep_their_signature(call: str, tmp_path: Path) -> None:
    more, outside = CALLS[call]
    handler, _ = start(tmp_path, {"unet": UNET})
    given = {
        "sample": torch.ones(2, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.ones(2, 5, 6),
    }
    given |= more
    unet = handler.pipe.unet
    with torch.no_grad():
        wanted = Unet.forward(unet, **given)
        found = unet(**given)
    assert type(found) is type(wanted)
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert counted(handler, "outside_eager") == {"unet": outside}
    with torch.no_grad():
        by_position = [given.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")]
        unet(*by_position, **given)
    assert counted(handler, "outside_eager") == {"unet": 2 * outside}
    assert counted(handler, "refused") == {"unet": 0}


def test_two_methods_of_one_module_are_two_models(tmp_path: Path) -> None:
    encode = {**DECODE, "method": "encode", "inputs": [tensor("x", 3, 16, 16)]}
    for result in ("built", "hit"):
        handler, _ = start(tmp_path, {"decoder": DECODE, "encoder": encode})
        rows = handler.describe_handle()["models"]
        assert [row["result"] for row in rows.values()] == [result, result]
        image = torch.ones(2, 3, 16, 16)
        with torch.no_grad():
            wanted = handler.pipe.vae.decoder(handler.pipe.vae.encoder(image))
            latents = handler.pipe.vae.encode(image, return_dict=False)[0]
            assert torch.allclose(handler.pipe.vae.decode(latents, return_dict=False)[0], wanted, atol=1e-5)
        assert counted(handler, "outside_eager") == {"decoder": 0, "encoder": 0}
        assert rows["decoder"]["key"] != rows["encoder"]["key"]


def test_a_changed_module_answers_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, Any] = {
        "in place": lambda unet: unet.outside.bias.add_(1),
        "load_state_dict": lambda unet: unet.load_state_dict({k: v + 1 for k, v in unet.state_dict().items()}),
        "another parameter": lambda unet: setattr(unet.outside, "bias", torch.nn.Parameter(torch.ones(4))),
        "a cast": lambda unet: unet.double(),
        "a hook": lambda unet: unet.outside.register_forward_hook(lambda *given: given[2] + 1),
    }
    inputs = torch.ones(1, 4, 8, 8), torch.tensor(3), torch.ones(1, 5, 6)
    for change in changes.values():
        handler, _ = start(tmp_path, {"unet": UNET})
        unet = handler.pipe.unet
        with torch.no_grad():
            before = unet(*inputs, return_dict=False)[0]
            assert handler.describe_handle()["models"]["unet"]["reason"] is None
            change(unet)
            given = [x.to(next(unet.parameters()).dtype) if x.is_floating_point() else x for x in inputs]
            after = unet(*given, return_dict=False)[0]
            assert torch.equal(after, Unet.forward(unet, *given, return_dict=False)[0])
        assert after.dtype != before.dtype or not torch.allclose(after, before)
    assert "changed after its start" in handler.describe_handle()["models"]["unet"]["reason"]
    assert caplog.text.count("changed after its start") == len(changes)


def test_training_and_gradients_are_the_modules_own(tmp_path: Path) -> None:
    handler, _ = start(tmp_path, {"unet": UNET})
    unet = handler.pipe.unet
    sample = torch.ones(1, 4, 8, 8, requires_grad=True)
    unet(sample, torch.tensor(3), torch.ones(1, 5, 6), return_dict=False)[0].sum().backward()
    assert sample.grad is not None
    unet.train()
    assert unet(torch.ones(1, 4, 8, 8), torch.tensor(3), torch.ones(1, 5, 6), return_dict=False)[0].requires_grad


class Holds(Diffuses):
    """Holds its modules in a list, a dict and a module, and one of them compiled by `torch.compile`."""

    def initialize(self, context: Any) -> None:
        torch.manual_seed(1)
        self.listed = [torch.nn.Linear(4, 3)]
        self.named = {"a": torch.nn.Linear(4, 3)}
        self.whole = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        self.model = torch.compile(torch.nn.Linear(4, 3))
        self.compiled = torch.nn.Linear(4, 3)
        self.compiled.compile()


def test_paths_lead_through_lists_mappings_and_modules(tmp_path: Path) -> None:
    class Theirs(CompiledHandlerMixin, Holds):
        pass

    linear = {"inputs": [tensor("input", 4)], "dimensions": BATCH}
    paths = ("listed.0", "named.a", "whole.0", "model", "compiled")
    handler, _ = start(tmp_path, {f"m{i}": {"path": path, **linear} for i, path in enumerate(paths)}, Theirs)
    rows = torch.ones(2, 4)
    with torch.no_grad():
        for module in (handler.listed[0], handler.named["a"], handler.whole[0], handler.model, handler.compiled):
            assert torch.allclose(module(rows), torch.nn.functional.linear(rows, module.weight, module.bias), atol=1e-5)
        handler.whole(rows)
    assert type(handler.model) is torch.nn.Linear
    lent = {name: row["contexts"]["lent"] for name, row in handler.describe_handle()["models"].items()}
    assert lent["m2"] == lent["m0"] + 1 == lent["m1"] + 1 == lent["m3"] + 1 == lent["m4"] + 1
    handler, _ = start(tmp_path, {"m": {"path": "compiled", **linear, "backends": ["eager"]}}, Theirs)
    assert handler.compiled._compiled_call_impl is not None  # as plain


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"unet": {**UNET, "path": "pipe.une"}}, "the handler.pipe has no 'une' .* unet, vae, text_encoder"),
        ({"unet": {**UNET, "path": "pipe.steps"}}, "'pipe.steps' is a int; expected a torch.nn.Module"),
        ({"unet": {**UNET, "arguments": {"no_such": 1}}}, "unexpected keyword argument 'no_such'; the method takes"),
        ({"text": {**TEXT, "inputs": [tensor("ids", 5, dtype="int64")]}}, "missing a required argument: 'input_ids'"),
        ({"a": DECODE, "b": {**DECODE, "path": "pipe.vae.decoder", "method": "forward"}}, "lies inside pipe.vae"),
        ({"a": TEXT, "b": TEXT}, "name each method once"),
        (
            {"unet": {**UNET, "dimensions": {}}},
            r"models.unet.inputs\[0\].shape\[0\]: dimension 'batch' is not declared",
        ),
        ({"unet": {**UNET, "backends": ["nonsense"]}}, r"models.unet.backends\[0\]: no backend has this name"),
        ({"unet": {**UNET, "mehtod": "x"}}, "models.unet.mehtod: unknown key .* did you mean 'method'"),
        ({"unet": {**UNET, "path": ""}}, "models.unet.path: expected attributes"),
        ({"a/b": UNET}, "no name for a model"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(models: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        start(tmp_path, models)


def test_inputs_beside_models_are_refused() -> None:
    section = {"inputs": [tensor("x", 4)], "dimensions": BATCH, "models": {"unet": UNET}}
    with pytest.raises(SettingsError, match=r"each model has inputs of its own; name self.model there too"):
        parse_settings({"handler": {"ts_handlers": section}})


def test_what_cannot_be_compiled_serves_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = {"unet": {"path": "pipe.unet"}, "no_method": {**DECODE, "method": "no_such"}, "text": TEXT}
    handler, context = start(tmp_path, models)
    assert ask(handler, context, *IDS)[0][0] == 200
    rows = handler.describe_handle()["models"]
    assert rows["unet"]["backend"] == rows["no_method"]["backend"] == "eager"
    assert "models.unet.inputs: a compiling backend needs the inputs of forward" in rows["unet"]["reason"]
    assert "{name: sample, dtype: float32" in rows["unet"]["reason"]
    assert "Vae has no method no_such" in rows["no_method"]["reason"]
    assert rows["text"]["backend"] == "aot_inductor"
    assert caplog.text.count("is not compiled and serves as it is") == 2
    with pytest.raises(SettingsError, match=r"models.unet: .*needs the inputs"):
        start(tmp_path, models, strict=True)


def test_on_miss_fail_fails(tmp_path: Path) -> None:
    with pytest.raises(MissError, match=r"no entry for model.unet"):
        start(tmp_path, {"unet": UNET}, on_miss="fail")
    start(tmp_path, {"unet": UNET})
    handler, _ = start(tmp_path, {"unet": UNET}, on_miss="fail")
    assert handler.describe_handle()["models"]["unet"]["result"] == "hit"


def test_where_the_time_goes_is_measured_over_the_first_batches(tmp_path: Path) -> None:
    handler, context = start(tmp_path, {"unet": UNET})
    vae = handler.pipe.vae
    assert vae.decoder._forward_hooks
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        other(torch.ones(1, 3, 16, 16))
    for _ in range(20):
        assert ask(handler, context, *IDS)[0][0] == 200
    time: dict[str, Any] = handler.describe_handle()["time"]
    assert time["batches"] == 16
    assert set(time["compiled"]) == {"unet"}
    assert set(time["not_compiled"]) == {"pipe.vae", "pipe.text_encoder", "rest of the handler"}
    assert abs(sum((*time["compiled"].values(), *time["not_compiled"].values())) - 1) < 0.01
    assert not vae.decoder._forward_hooks  # nothing is measured any more
    assert vars(handler.pipe.unet)["forward"].measured is None


def test_a_failing_batch_ends_its_measurement(tmp_path: Path) -> None:
    handler, context = start(tmp_path, {"unet": UNET})
    outside_the_table = [1, 2, 99, 4, 5]
    assert [status for status, _ in ask(handler, context, IDS[0], outside_the_table)] == [200, 503]
    assert ask(handler, context, *IDS)[0][0] == 200
    assert handler.describe_handle()["time"]["batches"] == 2


class Speaks(BaseHandler):  # type: ignore[misc]
    """Calls a method of its model that is not compiled, and a module beside it."""

    def initialize(self, context: Any) -> None:
        torch.manual_seed(1)
        self.model = Vae().eval()
        self.vocoder = torch.nn.Linear(16, 16)

    def preprocess(self, data: Any) -> torch.Tensor:
        return torch.ones(len(data), 3, 16, 16)

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.vocoder(self.model.encode(self.model(data)).sample.mean((1, 2)).repeat(1, 2))

    def postprocess(self, data: Any) -> Any:
        return data.tolist()


def test_what_goes_past_a_compiled_model_is_told_apart_from_it(tmp_path: Path) -> None:
    class Ours(CompiledHandlerMixin, Speaks):
        pass

    handler, context = start(tmp_path, {}, Ours, inputs=[tensor("sample", 3, 16, 16)], dimensions=BATCH)
    assert handler.describe_handle()["backend"] == "aot_inductor"
    assert handler.describe_handle()["time"] is None
    for _ in range(20):
        assert ask(handler, context, 1, 1)[0][0] == 200
    time = handler.describe_handle()["time"]
    assert set(time["compiled"]) == {"model"}
    assert set(time["not_compiled"]) == {"model (eager)", "vocoder", "rest of the handler"}
    assert handler.model._measured is None
    assert handler.model.metrics.counters["outside_eager"] == 0


def test_modules_that_torch_compile_runs_get_no_hooks(tmp_path: Path) -> None:
    class Theirs(Speaks):
        def initialize(self, context: Any) -> None:
            super().initialize(context)
            self.wrapped = torch.compile(torch.nn.Linear(2, 2))
            self.vocoder.compile()
            self.scripted = torch.jit.script(torch.nn.Linear(2, 2))
            self.model = None

    class Ours(CompiledHandlerMixin, Theirs):
        pass

    handler, _ = start(tmp_path, {}, Ours)
    for module in (handler.wrapped, handler.wrapped._orig_mod, handler.vocoder, handler.scripted):
        assert not module._forward_hooks


def test_an_archives_own_model_file_gives_the_module_whose_parts_are_compiled(archive: Path, tmp_path: Path) -> None:
    class Theirs(CompiledHandlerMixin, BaseHandler):  # type: ignore[misc]
        pass

    models = {"layer": {"path": "model.layer", "inputs": [tensor("input", 4)], "dimensions": BATCH}}
    for result in ("built", "hit"):
        section = {"inputs": [], "dimensions": {}, "models": models}
        handler: Any = Theirs()
        handler.initialize(make_context(archive, tmp_path / "store", section=section))
        assert handler.describe_handle()["models"]["layer"]["result"] == result
        with torch.no_grad():
            assert handler.inference(torch.ones(2, 4)).shape == (2, 3)
