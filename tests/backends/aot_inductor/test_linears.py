"""Merging linear layers that read the same tensor: the pass alone, and artifacts that are built with it.

Artifacts are built on the CPU, where merging is off because nothing is gained there: the tests switch it on.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor

from tests.support.models import (
    LINEAR,
    LINEAR_SECTION,
    archive_source,
    eager_model,
    save_weights,
    settings_of,
    write_archive,
    write_weights,
)
from tests.support.subprocesses import run_python
from ts_handlers import CompiledModel, ExportedSource, start_model
from ts_handlers.backends.aot_inductor import backend as aot_inductor
from ts_handlers.backends.aot_inductor import load
from ts_handlers.backends.aot_inductor.linears import merge_linears
from ts_handlers.backends.base import Target
from ts_handlers.errors import LoadError, MissError

BLOCK = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 2)

    def split(self, x):
        return x.view(*x.shape[:-1], 2, 8).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(x)
"""
ONES = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)

    def forward(self, x):
        if x.shape[0] == 1:
            return self.first(x) * self.second(x)
        return self.first(x) + self.second(x)
"""
BLOCK_SECTION: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "length", 16]}],
    "dimensions": {"batch": {"min": 1, "max": 4}, "length": {"min": 1, "max": 12}},
}
QUERY_KEY_VALUE = [f"model.{name}.weight" for name in ("query", "key", "value")]


def layer(width: int = 8, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(8, width, bias=bias)


class Model(nn.Module):
    """Layers by name, and a function of them and of the input."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, **self.layers)


class Special(torch.Tensor):
    """A class of tensors of its own."""


class WithParameters(nn.Module):
    """A function of the input and of parameters of these shapes."""

    def __init__(
        self, function: Callable[..., Any], *shapes: torch.Size, of: type[torch.Tensor] = torch.Tensor
    ) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape).as_subclass(of)) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.function(x, *self.weights)
        return result


def export(module: nn.Module, *inputs: torch.Tensor, shapes: Any = None) -> Any:
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)


def linears(program: Any) -> int:
    """How many linear layers a program's graph has."""
    return sum(node.target is torch.ops.aten.linear.default for node in program.graph.nodes)


def merge(program: Any) -> dict[str, list[str]]:
    return merge_linears(program, set(program.state_dict))


def check(program: Any, module: nn.Module, *inputs: torch.Tensor) -> None:
    """The program is sound by torch's own check, its signature fits its graph, and it computes what the module does."""
    program.validate()
    specs = program.graph_signature.input_specs
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    assert placeholders == [spec.arg.name for spec in specs]
    assert {spec.target for spec in specs if spec.target} == {*program.state_dict, *program.constants}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=1e-5, atol=1e-6)


@pytest.fixture
def block(tmp_path: Path) -> nn.Module:
    return eager_model(write_archive(tmp_path / "block", BLOCK))


def test_query_key_value_and_gate_up(block: nn.Module) -> None:
    module = nn.Module()
    module.model = block
    module.forward = block.forward  # type: ignore[method-assign]
    x = torch.randn(3, 5, 16)
    shapes = ({0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", max=16)},)
    program = export(module, x, shapes=shapes)
    before = linears(program)
    parts = merge(program)
    assert (before, linears(program)) == (8, 5)
    assert parts == {
        "merged.model.query.weight": QUERY_KEY_VALUE,
        "merged.model.query.bias": [name.replace("weight", "bias") for name in QUERY_KEY_VALUE],
        "merged.model.gate.weight": ["model.gate.weight", "model.up.weight"],
    }
    assert program.state_dict["merged.model.query.weight"].shape == (48, 16)
    for size in ((3, 5), (1, 1), (8, 16)):
        check(program, block, torch.randn(*size, 16))
    assert merge(program) == {}


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_input_of_any_rank(rank: int) -> None:
    module = Model(lambda x, a, b: a(x).tanh() - b(x).relu(), a=layer(), b=layer())
    x = torch.randn(*range(2, rank + 1), 8)
    program = export(module, x)
    assert len(merge(program)) == 2
    assert linears(program) == 1
    check(program, module, x)


def test_order_of_use_and_widths() -> None:
    """A layer may come after what another one has computed was used; the widths need not be the same."""

    def function(x: torch.Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> torch.Tensor:
        first = a(x).sigmoid().sum(-1, keepdim=True)
        second = b(x) * first
        return torch.cat([second * second.mean(), c(x) + first], -1)

    module = Model(function, a=layer(4), b=layer(16), c=layer(8))
    x = torch.randn(3, 8)
    program = export(module, x)
    assert merge(program)["merged.layers.a.weight"] == [f"layers.{name}.weight" for name in "abc"]
    check(program, module, x)


def test_a_part_of_a_product_is_read_by_merged_layers() -> None:
    def function(x: torch.Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> torch.Tensor:
        first, second = a(x), b(x)
        return c(first) * d(first) + second

    module = Model(function, a=layer(), b=layer(), c=layer(), d=layer())
    x = torch.randn(2, 3, 8)
    program = export(module, x, shapes=({0: torch.export.Dim("batch", max=4), 1: None},))
    assert len(merge(program)) == 4
    assert linears(program) == 2
    check(program, module, x)


def test_layers_without_bias_are_merged_among_themselves() -> None:
    module = Model(lambda x, a, b, c: a(x) * b(x) * c(x), a=layer(), b=layer(bias=False), c=layer())
    x = torch.randn(3, 8)
    program = export(module, x)
    assert merge(program)["merged.layers.a.bias"] == ["layers.a.bias", "layers.c.bias"]
    assert linears(program) == 2
    check(program, module, x)


def tied() -> nn.Module:
    module = Model(lambda x, a, b: a(x) * b(x), a=layer(), b=layer())
    module.layers["b"].weight = module.layers["a"].weight
    return module


def changed_between(x: torch.Tensor, a: nn.Module, b: nn.Module) -> torch.Tensor:
    y = x + 1
    first = a(y)
    y.mul_(2)
    return first * b(y)


def changed_through_a_view(x: torch.Tensor, a: nn.Module, b: nn.Module) -> torch.Tensor:
    y = x + 1
    first = a(y)
    y[0].zero_()
    return first * b(y)


def changed_in_a_sub_graph(x: torch.Tensor, a: nn.Module, b: nn.Module) -> torch.Tensor:
    y = x + 1
    first = a(y)
    with torch.enable_grad():
        y[0].zero_()
    return first * b(y)


def viewed_in_a_sub_graph(x: torch.Tensor, a: nn.Module, b: nn.Module) -> tuple[torch.Tensor, ...]:
    first, second = a(x), b(x)
    with torch.enable_grad():
        view = first.t()
    return view, second.tanh()


def in_a_branch(x: torch.Tensor, a: nn.Module, b: nn.Module) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: a(x) * b(x), lambda x: a(x) + b(x), (x,))


# Each differs from `a(x) * b(x)`, which is merged, in one thing.
APART: dict[str, Callable[[], nn.Module]] = {
    "one weight for two layers": tied,
    "a weight that is used elsewhere too": lambda: Model(
        lambda x, a, b: a(x) * b(x) * a.weight.sum(), a=layer(), b=layer()
    ),
    "two inputs": lambda: Model(lambda x, a, b: a(x) * b(x + 1), a=layer(), b=layer()),
    "an input that is changed in between": lambda: Model(changed_between, a=layer(), b=layer()),
    "an input whose view is changed in between": lambda: Model(changed_through_a_view, a=layer(), b=layer()),
    "an input that a sub-graph changes in between": lambda: Model(changed_in_a_sub_graph, a=layer(), b=layer()),
    "a result that is changed in place": lambda: Model(lambda x, a, b: a(x).relu_() * b(x), a=layer(), b=layer()),
    "a result that is an output": lambda: Model(lambda x, a, b: (a(x), b(x).tanh()), a=layer(), b=layer()),
    "a result of which an output is a view": lambda: Model(
        lambda x, a, b: (a(x).t(), b(x).tanh()), a=layer(), b=layer()
    ),
    "a result of which an output of a sub-graph is a view": lambda: Model(viewed_in_a_sub_graph, a=layer(), b=layer()),
    "a bias here and none there": lambda: Model(lambda x, a, b: a(x) * b(x), a=layer(), b=layer(bias=False)),
    "a product in between": lambda: Model(lambda x, a, b: (a(x) @ x.t()).sum() * b(x), a=layer(), b=layer()),
    "another layer in between": lambda: Model(
        lambda x, a, b, c: c(a(x).relu()) * b(x), a=layer(), b=layer(), c=layer()
    ),
    "a part that would not be aligned": lambda: Model(
        lambda x, a, b: a(x) * b(x).sum(-1, keepdim=True), a=layer(), b=layer(1)
    ),
    "weights of one dimension": lambda: WithParameters(
        lambda x, a, b: nn.functional.linear(x, a) * nn.functional.linear(x, b), torch.Size([8]), torch.Size([8])
    ),
    "biases of one number": lambda: WithParameters(
        lambda x, a, b, c, d: nn.functional.linear(x, a, b) * nn.functional.linear(x, c, d),
        *(torch.Size(shape) for shape in ([8, 8], [1], [8, 8], [1])),
    ),
    "weights of another class": lambda: WithParameters(
        lambda x, a, b: nn.functional.linear(x, a) * nn.functional.linear(x, b),
        torch.Size([8, 8]),
        torch.Size([8, 8]),
        of=Special,
    ),
    "a sub-graph": lambda: Model(in_a_branch, a=layer(), b=layer()),
    "weights without rows": lambda: Model(lambda x, a, b: a(x).sum() + b(x).sum(), a=layer(0), b=layer()),
}


def test_what_the_others_differ_from_is_merged() -> None:
    module = Model(lambda x, a, b: a(x) * b(x), a=layer(), b=layer())
    assert len(merge(export(module, torch.randn(3, 8)))) == 2


@pytest.mark.parametrize("case", APART)
def test_left_alone(case: str) -> None:
    module = APART[case]()
    x = torch.randn(3, 8)
    program = export(module, x)
    before, names = str(program.graph), list(program.state_dict)
    assert merge(program) == {}
    assert (str(program.graph), list(program.state_dict)) == (before, names)


def test_only_weights_that_are_allowed() -> None:
    module = Model(lambda x, a, b, c: a(x) * b(x) * c(x), a=layer(), b=layer(), c=layer())
    program = export(module, torch.randn(3, 8))
    parts = merge_linears(program, set(program.state_dict) - {"layers.b.bias"})
    assert parts["merged.layers.a.weight"] == ["layers.a.weight", "layers.c.weight"]


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge on the CPU too."""
    monkeypatch.setattr(aot_inductor, "MERGES_LINEARS", ("cpu",))


def start(archive: Path, store: Path, section: dict[str, Any] = BLOCK_SECTION, **changes: Any) -> CompiledModel:
    changes = {"store": str(store), "backends": ["aot_inductor"], "strict": True, **changes}
    return start_model(archive_source(archive), settings_of(section, **changes))


def compare(model: CompiledModel, archive: Path, *shapes: tuple[int, ...]) -> None:
    """The answers are the eager model's."""
    eager = eager_model(archive)
    for number, shape in enumerate(shapes):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(number))
        with torch.inference_mode():
            found, expected = model(x), eager(x)
        assert found.shape == expected.shape
        assert found.stride() == expected.stride()
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def entry(store: Path) -> tuple[Path, dict[str, Any]]:
    """The store's only entry, and what it says about itself."""
    (manifest,) = (store / "entries").rglob("manifest.json")
    description: dict[str, Any] = json.loads(manifest.read_text())["artifact"]
    return manifest.parent, description


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An archive, and a store with its artifact."""
    archive = write_archive(tmp_path_factory.mktemp("linears") / "archive", BLOCK)
    store = tmp_path_factory.mktemp("linears-store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot_inductor, "MERGES_LINEARS", ("cpu",))
        model = start(archive, store)
    assert model.outcome.result == "built"
    return archive, store


SIZES = ((1, 1, 16), (4, 12, 16), (2, 7, 16))


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
def test_new_weights_are_used_without_a_build(built: tuple[Path, Path], tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", BLOCK)
    for seed in (0, 5, None):
        if seed is None:  # as uniform as weights can be
            state = {name: torch.full_like(tensor, 0.25) for name, tensor in eager_model(archive).state_dict().items()}
            save_weights(archive / "model.pt", state)
        else:
            write_weights(archive, seed)
        model = start(archive, built[1], on_miss="fail")
        facts = model.describe()
        assert (facts["result"], facts["counters"]["build"]) == ("hit", 0)
        assert facts["artifact"]["merged_linears"] == 2
        assert facts["artifact"]["weights_from"] == "archive"
        compare(model, archive, *SIZES)


@pytest.mark.compile
def test_manifest_says_what_the_weights_are_put_together_from(built: tuple[Path, Path]) -> None:
    constants = entry(built[1])[1]["constants"]
    parts = {name: [part["name"] for part in spec["parts"]] for name, spec in constants.items() if "parts" in spec}
    assert parts == {
        "merged.model.query.weight": ["query.weight", "key.weight", "value.weight"],
        "merged.model.query.bias": ["query.bias", "key.bias", "value.bias"],
        "merged.model.gate.weight": ["gate.weight", "up.weight"],
    }
    assert constants["merged.model.gate.weight"]["shape"] == [48, 16]
    rest = {spec["name"] for spec in constants.values() if "parts" not in spec}
    assert rest == {f"{name}.{kind}" for name in ("out", "down", "head") for kind in ("weight", "bias")}
    assert not any(spec["extra"] for spec in constants.values())


@pytest.mark.compile
def test_an_artifact_without_merged_layers_is_another_one(
    built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where nothing is merged, the key is what it was before there was merging."""
    assert aot_inductor.MERGES_LINEARS == ("cuda",)
    with pytest.raises(MissError, match="missed: options"):
        start(*built, on_miss="fail")
    target = Target(archive_source(built[0]), settings_of(BLOCK_SECTION), torch.device("cpu"))
    apart = aot_inductor.BACKEND.options(target)
    monkeypatch.setattr(aot_inductor, "MERGES_LINEARS", ("cpu",))
    assert aot_inductor.BACKEND.options(target) == {**apart, "linears": "merged"}


@pytest.mark.compile
def test_a_warm_start_does_not_import_the_pass(built: tuple[Path, Path]) -> None:
    code = """
        import sys
        from tests.support.models import archive_source, settings_of
        from ts_handlers import start_model
        from ts_handlers.backends.aot_inductor import backend as aot_inductor
        aot_inductor.MERGES_LINEARS = ("cpu",)
        section = {section!r}
        model = start_model(archive_source({archive!r}), settings_of(section, store={store!r}, on_miss="fail"))
        build_only = {{"torch._inductor", "ts_handlers.backends.aot_inductor.linears"}} & set(sys.modules)
        print(model.describe()["artifact"]["merged_linears"], sorted(build_only))
    """
    found = run_python(code.format(section=BLOCK_SECTION, archive=str(built[0]), store=str(built[1])))
    assert found.splitlines()[-1] == "2 []"


@pytest.mark.compile
def test_one_start_places_each_weight_once(built: tuple[Path, Path]) -> None:
    directory, description = entry(built[1])
    target = Target(archive_source(built[0]), settings_of(BLOCK_SECTION), torch.device("cpu"))
    first, second = (load.place_weights(target, directory, description) for _ in range(2))
    assert all(first[name] is second[name] for name in description["constants"])
    weights = target.source.weights()
    merged = first["merged.model.query.weight"]
    assert torch.equal(merged, torch.cat([weights[f"{name}.weight"] for name in ("query", "key", "value")]))


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("code", [LINEAR.replace("(4, 3)", "(4, 316)"), ONES.replace("8)", "316)")])
def test_a_start_that_builds_keeps_nothing_of_the_module(code: str, tmp_path: Path) -> None:
    """Neither the eager weights nor what was merged for the compiler: only what the artifact uses."""
    model = start(write_archive(tmp_path / "archive", code), tmp_path / "store", LINEAR_SECTION)
    assert model.outcome.result == "built"
    parameters = [
        each
        for each in gc.get_objects()
        if isinstance(each, nn.Parameter) and tuple(each.shape[:1]) in ((316,), (632,))
    ]
    assert [each for each in parameters if not isinstance(each, FakeTensor) and each.untyped_storage().nbytes()] == []


@pytest.mark.compile
@pytest.mark.parametrize("name", ["key.weight", "value.bias", "up.weight", "out.weight"])
def test_weights_that_do_not_fit_are_named(name: str, built: tuple[Path, Path]) -> None:
    """The sum of the rows is right in the first case, so that only a check of each part can tell."""
    directory, description = entry(built[1])
    source = archive_source(built[0])
    state = dict(source.weights())
    source.weights = lambda: state  # type: ignore[method-assign]
    target = Target(source, settings_of(BLOCK_SECTION), torch.device("cpu"))
    if name == "key.weight":
        state["key.weight"], state["value.weight"] = torch.ones(24, 16), torch.ones(8, 16)
    else:
        state[name] = state[name][1:]
    with pytest.raises(LoadError, match=rf"weight '{name}' has shape .*the artifact was built for"):
        load.place_weights(target, directory, description)
    del state[name]
    with pytest.raises(LoadError, match=rf"lack '{name}', which the artifact needs"):
        load.place_weights(target, directory, description)


# A loop over the rows has one graph for each batch size.
LOOP = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)

    def forward(self, x):
        rows = self.first(x) * self.second(x)
        for row in range(int(x.shape[0])):
            rows = rows + row
        return rows * x.shape[0]
"""


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
def test_variants_share_the_merged_weights(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", LOOP), tmp_path / "store"
    changes = {"warmup": [{"batch": 2}, {"batch": 5}]}
    for seed, result in ((0, "built"), (1, "hit")):
        write_weights(archive, seed)
        model = start(archive, store, LINEAR_SECTION, **changes)
        facts = model.describe()
        assert facts["result"] == result
        assert (facts["artifact"]["step"], len(facts["artifact"]["variants"])) == ("static", 2)
        assert facts["artifact"]["merged_linears"] == 1
        compare(model, archive, (2, 4), (5, 4))
    assert set(entry(store)[1]["constants"]) == {"merged.model.first.weight", "merged.model.first.bias"}


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
def test_a_variant_for_size_one(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", ONES), tmp_path / "store"
    for seed in (0, 1):
        write_weights(archive, seed)
        model = start(archive, store, LINEAR_SECTION)
        facts = model.describe()["artifact"]
        assert (facts["step"], facts["variants"], facts["merged_linears"]) == (
            "dynamic+ones",
            ["dynamic", "dynamic-batch1"],
            1,
        )
        compare(model, archive, (1, 4), (2, 4), (8, 4))


THREE_OR_TWO = ONES.replace(
    "return self.first(x) * self.second(x)", "return self.first(x) * self.second(x) * self.third(x)"
).replace("self.first, self.second = ", "self.third, self.first, self.second = torch.nn.Linear(4, 8), ")


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
def test_variants_that_would_merge_differently_are_left_alone(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", THREE_OR_TWO), tmp_path / "store"
    facts = start(archive, store, LINEAR_SECTION).describe()["artifact"]
    assert (facts["step"], facts["merged_linears"]) == ("dynamic+ones", 0)
    reasons = entry(store)[1]["steps_failed"]
    assert reasons[-1].startswith(
        "dynamic+ones with merged linear layers: BuildError: the variants put 'merged.model.first"
    )
    write_weights(archive, 1)
    compare(start(archive, store, LINEAR_SECTION, on_miss="fail"), archive, (1, 4), (2, 4), (8, 4))


# A part of a product is not contiguous: this view of it does not exist.
FLATTENED = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)

    def forward(self, x):
        return (self.first(x).view(x.shape[0] * 8) + 1).view(-1, 8) * self.second(x)
"""


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
def test_a_model_that_cannot_do_with_parts_is_built_without_merging(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", FLATTENED), tmp_path / "store"
    model = start(archive, store, LINEAR_SECTION)
    facts = model.describe()
    assert (facts["artifact"]["step"], facts["artifact"]["merged_linears"]) == ("dynamic", 0)
    (reason,) = entry(store)[1]["steps_failed"]
    assert reason.startswith("dynamic with merged linear layers: ")
    compare(model, archive, (1, 4), (8, 4))


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
def test_a_failure_of_the_pass_fails_no_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Any, allowed: Any) -> None:
        program.graph_signature.input_specs.clear()  # half done
        raise KeyError("unforeseen")

    monkeypatch.setattr("ts_handlers.backends.aot_inductor.linears.merge_linears", fail)
    archive, store = write_archive(tmp_path / "archive", ONES), tmp_path / "store"
    model = start(archive, store, {**LINEAR_SECTION, "dimensions": {"batch": {"min": 2, "max": 8}}})
    assert model.describe()["artifact"]["step"] == "dynamic"
    assert entry(store)[1]["steps_failed"] == ["dynamic with merged linear layers: KeyError: 'unforeseen'"]
    compare(model, archive, (2, 4), (8, 4))


CHANGING = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8)

    def load_state_dict(self, state, *args, **kwargs):
        loaded = super().load_state_dict(state, *args, **kwargs)
        self.second.weight.data.mul_(2.0)
        return loaded

    def forward(self, x):
        return self.first(x) * self.second(x)
"""


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
def test_weights_that_the_model_changes_are_taken_from_the_model(tmp_path: Path) -> None:
    """They are not merged: each load would keep a copy of its own."""
    archive, store = write_archive(tmp_path / "archive", CHANGING), tmp_path / "store"
    for seed, result in ((0, "built"), (1, "hit")):
        write_weights(archive, seed)
        model = start(archive, store, LINEAR_SECTION)
        facts = model.describe()
        assert (facts["result"], facts["artifact"]["weights_from"]) == (result, "module")
        assert facts["artifact"]["merged_linears"] == 0
        compare(model, archive, (1, 4), (8, 4))


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
def test_exported_programs_stay_as_they_are(tmp_path: Path) -> None:
    module = Model(lambda x, a, b: a(x) * b(x), a=layer(), b=layer())
    x = torch.randn(3, 8)
    torch.export.save(export(module, x), tmp_path / "model.pt2")
    settings = settings_of({}, store=str(tmp_path / "store"), backends=["aot_inductor"], strict=True)
    model = start_model(ExportedSource("exported", tmp_path / "model.pt2"), settings)
    assert model.outcome.result == "built"
    assert model.describe()["artifact"]["merged_linears"] == 0
    target = Target(ExportedSource("exported", tmp_path / "model.pt2"), settings, torch.device("cpu"))
    assert "linears" not in aot_inductor.BACKEND.options(target)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.compile
@pytest.mark.usefixtures("merging")
def test_two_loads_in_16_bits(tmp_path: Path) -> None:
    """The parts are converted on their way to their places."""
    archive, store = write_archive(tmp_path / "archive", ONES), tmp_path / "store"
    section = copy.deepcopy(LINEAR_SECTION)
    section["inputs"][0]["dtype"] = "bfloat16"
    section["dimensions"]["batch"]["min"] = 2
    for seed, result in ((0, "built"), (1, "hit")):
        write_weights(archive, seed)
        model = start(archive, store, section, dtype="bfloat16")
        assert (model.outcome.result, model.describe()["artifact"]["merged_linears"]) == (result, 1)
        x = torch.randn(3, 4, dtype=torch.bfloat16)
        with torch.inference_mode():
            expected = eager_model(archive).bfloat16()(x)
            torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


WIDE = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8192, 4096), torch.nn.Linear(8192, 4096)

    def forward(self, x):
        return self.first(x) * self.second(x)
"""
START = """
    import sys
    import torch
    from tests.support.models import archive_source, settings_of
    from ts_handlers import start_model
    model = start_model(archive_source(sys.argv[1]), settings_of({section!r}, store=sys.argv[2]), "cuda:0")
    merged = model.describe()["artifact"]["merged_linears"]
    print(model.outcome.result, merged, torch.cuda.memory_reserved() >> 20)
"""


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_on_a_gpu_new_weights_are_used_without_a_build(cuda_graphs: bool, tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", BLOCK), tmp_path / "store"
    contexts = {"count": 2, "cuda_graphs": cuda_graphs}
    for seed, result in ((0, "built"), (0, "hit"), (5, "hit")):
        write_weights(archive, seed)
        settings = settings_of(
            BLOCK_SECTION, store=str(store), strict=True, backends=["aot_inductor"], contexts=contexts
        )
        model = start_model(archive_source(archive), settings, "cuda:0")
        assert (model.outcome.result, model.describe()["artifact"]["merged_linears"]) == (result, 2)
        eager = eager_model(archive).cuda()
        for shape in SIZES:
            x = torch.randn(*shape, device="cuda")
            with torch.inference_mode():
                torch.testing.assert_close(model(x), eager(x), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_merged_weights_lie_there_once(tmp_path: Path) -> None:
    """They are 256 MiB; what libraries keep for each stream comes on top."""
    archive = write_archive(tmp_path / "archive", WIDE)
    section = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 8192]}],
        "dimensions": {"batch": {"min": 2, "max": 8}},
        "backends": ["aot_inductor"],
        "strict": True,
    }
    code = START.format(section=section)
    found = [run_python(code, archive, tmp_path / "store").splitlines()[-1].split() for _ in range(2)]
    assert [(result, merged) for result, merged, _ in found] == [("built", "1"), ("hit", "1")]
    assert all(256 <= int(reserved) < 256 + 128 for _, _, reserved in found)
