"""Exported programs (``.pt2``): their own signature, weights inside the artifact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.subprocesses import run_python
from ts_handlers import CompiledModel, ExportedSource, Settings, start_model
from ts_handlers.errors import BuildError, InputError, MissError, ModelError, SettingsError
from ts_handlers.model.exported_program import describe_program, refuse_mutations
from ts_handlers.model.structure import unflatten
from ts_handlers.settings import Dimension, InputSpec

BATCH = torch.export.Dim("batch", min=1, max=6)


class Scaled(torch.nn.Module):
    """Two inputs, a small weight, a nested output with a constant and None."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, Any]:
        y = x * self.scale + shift
        return {"y": y, "more": (y.sum(1), 3, None)}


def export(module: torch.nn.Module, *inputs: torch.Tensor, shapes: Any = None, **kwargs: torch.Tensor) -> Any:
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs, kwargs, dynamic_shapes=shapes)


def export_scaled(scale: float) -> Any:
    shapes = {"x": {0: BATCH}, "shift": None}
    return export(Scaled(scale), torch.ones(3, 4), shift=torch.zeros(4), shapes=shapes)


def test_program_describes_itself() -> None:
    inputs, dimensions, structure = describe_program(export_scaled(2.0), None)
    assert [(spec.name, spec.dtype, spec.shape) for spec in inputs] == [
        ("x", "float32", ("dim0", 4)),
        ("shift", "float32", (4,)),
    ]
    assert {name: (d.min, d.max) for name, d in dimensions.items()} == {"dim0": (1, 6)}
    one, two = torch.ones(1), torch.zeros(1)
    assert unflatten([one, two], structure)["more"] == (two, 3, None)


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.relu_(x * 2)


class InPlace(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)


class InPlaceActivation(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2).relu_()


class Nested(torch.nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0] + pair[1]


@pytest.mark.parametrize(
    ("module", "text"),
    [(Counting(), r"changes its own state while it runs \(calls\)"), (InPlace(), r"changes its inputs in place \(x\)")],
)
def test_programs_with_side_effects_are_refused(module: torch.nn.Module, text: str) -> None:
    with pytest.raises(BuildError, match=text):
        describe_program(export(module, torch.ones(2)), None)


def test_in_place_activation_is_no_side_effect() -> None:
    refuse_mutations(export(InPlaceActivation(), torch.ones(2)))


def test_nested_inputs_are_refused() -> None:
    with pytest.raises(BuildError, match="nested inputs"):
        describe_program(export(Nested(), (torch.ones(2), torch.ones(2))), None)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Built:
    """The exported program of the session and the store that holds its artifact."""

    path: Path
    store: Path
    model: CompiledModel


def start(path: Path, store: Path, **changes: Any) -> CompiledModel:
    changes = {"store": str(store), "backends": ("aot_inductor",), "strict": True, **changes}
    return start_model(ExportedSource("scaled", path), Settings(**changes))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("exported")
    torch.export.save(export_scaled(2.0), folder / "model.pt2")
    return Built(folder / "model.pt2", folder / "store", start(folder / "model.pt2", folder / "store"))


@pytest.mark.compile
def test_artifact_answers_and_refuses_by_the_programs_own_signature(built: Built) -> None:
    for model in (built.model, start(built.path, built.store, on_miss="fail")):
        for batch in range(1, 7):
            x, shift = torch.randn(batch, 4), torch.randn(4)
            out = model(x, shift=shift)
            torch.testing.assert_close(out["y"], x * 2 + shift)
            assert out["more"][1] == 3
        for x in (torch.ones(7, 4), torch.ones(0, 4), torch.ones(2, 5), torch.ones(2, 4).double()):
            with pytest.raises(InputError):
                model(x, torch.ones(4))
    assert model.outcome.result == "hit"
    json.dumps(model.describe())


@pytest.mark.compile
def test_other_weights_are_another_entry(built: Built, tmp_path: Path) -> None:
    torch.export.save(export_scaled(3.0), tmp_path / "model.pt2")
    with pytest.raises(MissError, match="model"):
        start(tmp_path / "model.pt2", built.store, on_miss="fail")


def test_program_that_cannot_be_loaded_is_a_model_error(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/version", "0")
    with pytest.raises(ModelError, match="cannot be loaded as an exported program"):
        start(tmp_path / "model.pt2", tmp_path / "store")


def test_a_quantised_program_is_loaded_where_nobody_has_registered_its_operators(tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt2")
    save = f"""
import torch
from tests.support.quantized_models import quantized_code
names = {{}}
exec(quantized_code("int8"), names)
torch.export.save(torch.export.export(names["Model"]().eval(), (torch.randn(3, 64),)), {path!r})
"""
    load = f"""
from ts_handlers.model.exported import ExportedSource
print([node.name for node in ExportedSource("m", {path!r}).program.graph.nodes])
"""
    run_python(save)
    assert "dequantize_per_channel" in run_python(load)


class Branching(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] != 7 else x * 3


class Halving(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, -1, 4).sum(0)


@pytest.mark.parametrize(("module", "guard"), [(Branching(), "!= 7"), (Halving(), "% 8")])
def test_a_program_that_is_right_for_some_sizes_of_a_range_only_is_refused(
    module: torch.nn.Module, guard: str, tmp_path: Path
) -> None:
    dynamic: Any = torch.export.Dim.AUTO(min=1, max=16)  # type: ignore[attr-defined]
    program = torch.export.export(module, (torch.ones(6, 4),), dynamic_shapes=({0: dynamic},))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(BuildError, match="holds only where") as refused:
        start(tmp_path / "model.pt2", tmp_path / "store")
    assert guard in str(refused.value)


@pytest.mark.compile
def test_an_unbounded_dimension(tmp_path: Path) -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    inputs = (torch.ones(6, 4), torch.ones(6, 4))
    program = torch.export.export(Sum(), inputs, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 2)
    torch.export.save(program, tmp_path / "model.pt2")
    model = start(tmp_path / "model.pt2", tmp_path / "store")
    assert model.outcome.result == "built"
    for rows in (2, 5, 1000):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(model(x, x), x + x)


class Pairs(torch.nn.Module):
    """Two dimensions, of which one is that of two inputs; a dimension of a fixed size; float32 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.words(ids).sum(1) * scale


def write_pairs(path: Path) -> Path:
    batch, length = torch.export.Dim("b", min=1, max=6), torch.export.Dim("l", min=2, max=8)
    shapes = {"ids": {0: batch, 1: length}, "scale": {0: batch}}
    torch.export.save(export(Pairs(), torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 4), shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "model.pt2")


IDS = InputSpec("ids", "int64", ("batch", "length"), limits=(0, 9))
SCALE = InputSpec("scale", "float32", ("batch", 4))
RANGES = {"batch": Dimension(1, 6), "length": Dimension(2, 8)}
EAGER = {"backends": ("eager",)}


def with_shape(spec: InputSpec, *shape: int | str) -> InputSpec:
    return InputSpec(spec.name, spec.dtype, shape)


@pytest.mark.parametrize(
    ("inputs", "dimensions"),
    [
        ((IDS, SCALE), RANGES),
        ((IDS, SCALE), {"batch": Dimension(2, 3), "length": Dimension(8, 8)}),
        ((with_shape(IDS, 5, "length"), with_shape(SCALE, 5, 4)), {"length": Dimension(3, 8)}),
        ((with_shape(IDS, 5, "length"), SCALE), {"batch": Dimension(5, 5), "length": Dimension(3, 8)}),
        ((with_shape(IDS, "one", "one"), with_shape(SCALE, "one", 4)), {"one": Dimension(2, 6)}),
        ((IDS, with_shape(SCALE, "batch", "width")), {**RANGES, "width": Dimension(4, 4)}),
    ],
)
def test_a_declaration_that_the_program_takes_is_what_holds(
    pairs: Path, inputs: tuple[InputSpec, ...], dimensions: dict[str, Dimension]
) -> None:
    model = start(pairs, pairs.parent / "store", inputs=inputs, dimensions=dimensions, dtype="float32", **EAGER)
    sizes = {name: dimension.max for name, dimension in dimensions.items()}
    tensors = model.signature.generate(sizes)
    assert model(*tensors).shape == tensors[1].shape
    specs, ranges, _ = describe_program(ExportedSource("m", pairs).program, model.signature)
    assert (specs, ranges) == (model.signature.inputs, dimensions)
    for name, dimension in dimensions.items():
        with pytest.raises(InputError, match=f"dimension '{name}'"):
            model(*model.signature.generate({**sizes, name: dimension.max + 1}))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dtype": "float16"}, [".dtype: float16", "program is in float32", "remove it"]),
        ({"inputs": (SCALE, IDS)}, [".inputs: scale, ids", "takes ids, scale", "in this order"]),
        ({"inputs": (IDS,)}, [".inputs: ids,", "takes ids, scale"]),
        (
            {"inputs": (IDS, InputSpec("scale", "float16", ("batch", 4)))},
            [".inputs[1].dtype: float16", "takes 'scale' in float32", "write float32"],
        ),
        ({"inputs": (IDS, with_shape(SCALE, "batch"))}, [".inputs[1].shape: 1 dimensions", "'scale' with 2"]),
        ({"inputs": (IDS, with_shape(SCALE, "batch", 5))}, [".inputs[1].shape[1]: 5", "takes 4", "write 4"]),
        (
            {"inputs": (IDS, with_shape(SCALE, "batch", "width")), "dimensions": {**RANGES, "width": Dimension(1, 4)}},
            [".dimensions.width: 1..4", "takes 4 as dimension 1 of 'scale'", "write 4", "torch.export.Dim"],
        ),
        (
            {"dimensions": {**RANGES, "batch": Dimension(1, 7)}},
            [".dimensions.batch: 1..7", "takes 1..6 as dimension 0 of 'ids'", "narrow it", "torch.export.Dim"],
        ),
        (
            {"dimensions": {**RANGES, "length": Dimension(1, 8)}},
            [".dimensions.length: 1..8", "takes 2..8", "min=1) there"],
        ),
        ({"inputs": (with_shape(IDS, 7, "length"), SCALE)}, [".inputs[0].shape[0]: 7", "takes 1..6"]),
        (
            {"inputs": (IDS, with_shape(SCALE, "rows", 4)), "dimensions": {**RANGES, "rows": Dimension(1, 6)}},
            [".inputs[1].shape[0]: rows", "dimension 0 of 'ids' are one size", "declared as batch", "both the same"],
        ),
        ({"inputs": (IDS, with_shape(SCALE, 3, 4))}, [".inputs[1].shape[0]: 3", "are one size", "declared as batch"]),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "inductor", "aot_inductor"])
def test_a_declaration_that_the_program_does_not_take_is_refused(
    pairs: Path, tmp_path: Path, backend: str, changes: dict[str, Any], parts: list[str]
) -> None:
    """Before anything is compiled, and not with the next backend."""
    declared = {"inputs": (IDS, SCALE), "dimensions": RANGES, **changes}
    with pytest.raises(SettingsError) as refused:
        start(
            pairs, tmp_path / "store", backends=(backend, "eager")[: 1 + (backend != "eager")], strict=False, **declared
        )
    for part in parts:
        assert part in str(refused.value)
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_a_dtype_is_compared_with_the_inputs_where_there_are_no_weights(tmp_path: Path) -> None:
    torch.export.save(export(InPlaceActivation(), torch.ones(2)), tmp_path / "model.pt2")
    assert start(tmp_path / "model.pt2", tmp_path / "s", dtype="float32", **EAGER)(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(SettingsError, match="program is in float32"):
        start(tmp_path / "model.pt2", tmp_path / "s", dtype="float64", **EAGER)


def test_a_program_in_half_precision_may_hold_buffers_in_another(tmp_path: Path) -> None:
    """The buffers stay as they are: rounded, they would be another model."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2).to(torch.bfloat16)
            self.register_buffer("table", torch.tensor([1.0009765625, 3.0]), persistent=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.layer(x), self.table * 1.0

    torch.export.save(export(Scaled(), torch.ones(2, dtype=torch.bfloat16)), tmp_path / "model.pt2")
    model = start(tmp_path / "model.pt2", tmp_path / "s", dtype="bfloat16", **EAGER)
    assert model(torch.ones(2, dtype=torch.bfloat16))[1].tolist() == [1.0009765625, 3.0]
    with pytest.raises(SettingsError, match="program is in bfloat16"):
        start(tmp_path / "model.pt2", tmp_path / "s", dtype="float32", **EAGER)


@pytest.mark.compile
def test_an_artifact_is_as_narrow_as_what_is_declared(pairs: Path, tmp_path: Path) -> None:
    declared = {"inputs": (IDS, SCALE), "dimensions": {"batch": Dimension(2, 3), "length": Dimension(2, 5)}}
    eager = ExportedSource("m", pairs).eager()
    for result in ("built", "hit"):
        model = start(pairs, tmp_path / "store", dtype="float32", **declared)
        assert model.outcome.result == result
        assert model.describe()["artifact"]["ranges"] == {"batch": [2, 3], "length": [2, 5]}
        ids, scale = torch.randint(0, 9, (3, 5)), torch.randn(3, 4)
        with torch.inference_mode():
            torch.testing.assert_close(model(ids, scale=scale), eager(ids, scale))
        for wrong in (ids[:1], ids.repeat(2, 1), torch.ones(3, 6, dtype=torch.int64), ids + 9):
            with pytest.raises(InputError):
                model(wrong, scale[: len(wrong)] if len(wrong) < 4 else scale.repeat(2, 1))
