"""Inputs that the plain model itself refuses blame no backend; masks are tried as requests are padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Register
from tests.support.models import archive_source, settings_of, write_archive
from tests.support.scripted_backend import BACKEND, ScriptedBackend
from tests.support.starts import count_calls, counters
from ts_handlers import CompiledModel, start_model
from ts_handlers.backends.base import Built, Target, Workspace
from ts_handlers.backends.eager import eager_run
from ts_handlers.execution.base import Loaded
from ts_handlers.guard.quarantine import read_quarantines
from ts_handlers.model.signature import Signature
from ts_handlers.settings import Dimension, InputSpec
from ts_handlers.startup.inputs import PADDED, canary_inputs

BOXES = """
import torch


class Model(torch.nn.Module):
    def forward(self, boxes):
        assert bool((boxes[..., 2:] > boxes[..., :2]).all()), "x1 below x0"
        return boxes[..., 2:] - boxes[..., :2]
"""
TABLES = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(size, 4) for size in (10, 24, 7))

    def forward(self, codes):
        return sum(table(codes[:, index]) for index, table in enumerate(self.tables))
"""
NEVER = """
import torch


class Model(torch.nn.Module):
    def forward(self, x):
        raise ValueError("the token count does not match")
"""


@pytest.fixture(autouse=True)
def scripted(register: Register) -> None:
    register("aot_inductor", "tests.support.scripted_backend:BACKEND")


def start(folder: Path, code: str, spec: dict[str, Any], *, seed: int | None = 0, **changes: Any) -> CompiledModel:
    archive = write_archive(folder / "archive", code, seed=seed)
    section = {
        "store": str(folder / "store"),
        "backends": ["aot_inductor", "eager"],
        "inputs": [spec],
        "dimensions": {"batch": {"min": 1, "max": 8}},
        "warmup": [{"batch": 2}],
        **changes,
    }
    return start_model(archive_source(archive, "model.pt" if seed is not None else None), settings_of(section))


BOXES_SPEC = {"name": "boxes", "dtype": "float32", "shape": ["batch", 5, 4], "limits": [0, 640]}
CODES = {"name": "codes", "dtype": "int64", "shape": ["batch", 3], "limits": [0, 24]}


@pytest.mark.filterwarnings("ignore")
def test_boxes_fall_back_to_a_kind_that_the_model_accepts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built = start(tmp_path, BOXES, BOXES_SPEC, seed=None)
    assert (built.outcome.backend, built.outcome.fallbacks) == ("aot_inductor", ())
    (note,) = built.describe()["notes"]
    for part in ("boxes (float32, shape [2, 5, 4])", "refused by the plain model", "x1 below x0", "kind 'ramp'"):
        assert part in note
    assert note in caplog.text
    # A hit draws its warm-up in the same way: its artifact may end the process where eager raises.
    hit = start(tmp_path, BOXES, BOXES_SPEC, seed=None, on_miss="fail", warmup=[{"batch": 7}])
    assert (hit.outcome.result, hit._loaded.signature.kind) == ("hit", "ramp")
    eager = start(tmp_path, BOXES, BOXES_SPEC, seed=None, backends=["eager"])
    assert "kind 'ramp'" in eager.outcome.notes[0]
    assert eager.outcome.independent_rows is True


def test_one_range_for_tables_of_different_sizes(tmp_path: Path) -> None:
    model = start(tmp_path, TABLES, CODES)
    assert (model.outcome.backend, model.outcome.fallbacks) == ("aot_inductor", ())
    (note,) = model.outcome.notes
    for part in ("codes (int64, shape [2, 3])", "IndexError", "limits for each column", "kind 'small'"):
        assert part in note
    columns = {**CODES, "limits": [[0, 10], [0, 24], [0, 7]]}
    assert start(tmp_path, TABLES, columns).outcome.notes == ()


def test_what_the_model_always_refuses_is_no_failure_of_a_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(BACKEND, monkeypatch)
    spec = {"name": "x", "dtype": "float32", "shape": ["batch", 4]}
    for _ in range(2):
        model = start(tmp_path, NEVER, spec, seed=None)
        assert model.outcome.backend == "eager"
        (fallback,) = model.outcome.fallbacks
        assert fallback["reason"].startswith("SampleError: the drawn input x (float32, shape [2, 4]) is refused")
        assert "token count" in fallback["reason"]
        assert counters(model.describe())["fallback"] == 1
    assert calls == []
    assert read_quarantines(tmp_path / "store") == []


POOLED = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding_mask):
        return self.encoder(x, src_key_padding_mask=padding_mask){pool}
"""
MASKED = [
    {"name": "x", "dtype": "float32", "shape": ["batch", "sequence", 8]},
    {"name": "padding_mask", "dtype": "bool", "shape": ["batch", "sequence"]},
]
DIMENSIONS = {"batch": {"min": 1, "max": 8}, "sequence": {"min": 2, "max": 64}}


def padded(lengths: list[int], length: int) -> list[torch.Tensor]:
    mask = torch.arange(length).unsqueeze(0) >= torch.tensor(lengths).unsqueeze(1)
    return [torch.randn(len(lengths), length, 8), mask]


class SlowPath(ScriptedBackend):
    """Answers as what `torch.export` makes of an encoder: without the path for left-aligned masks."""

    def build(self, target: Target, workspace: Workspace) -> Built:
        (workspace.directory / "artifact").write_text("slow")
        return Built({})

    def load(self, target: Target, directory: Path, description: Any) -> Loaded:
        eager = eager_run(target, target.require_signature().names)

        def run(tensors: list[torch.Tensor]) -> Any:
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                return eager(tensors)
            finally:
                torch.backends.mha.set_fastpath_enabled(True)

        return Loaded(run, target.require_signature())


SLOW_PATH = SlowPath()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("pool", "backend"), [(".mean(1)", "eager"), ("[:, 0]", "aot_inductor")])
def test_an_encoder_with_a_path_of_its_own_for_padding(
    pool: str, backend: str, tmp_path: Path, register: Register
) -> None:
    """Eager answers left-aligned masks with zeros for what is padded; what pools over that is not served compiled."""
    register("aot_inductor", f"{__name__}:SLOW_PATH")
    archive = write_archive(tmp_path / "archive", POOLED.format(pool=pool))
    section = {
        "store": str(tmp_path / "store"),
        "backends": ["aot_inductor", "eager"],
        "inputs": MASKED,
        "dimensions": DIMENSIONS,
    }
    model = start_model(archive_source(archive), settings_of(section))
    assert model.outcome.backend == backend
    inputs = padded([3, 6, 9], 12)
    with torch.inference_mode():
        expected = archive_source(archive).eager()(*inputs)
    assert torch.allclose(model(*inputs), expected, atol=1e-4)


SPECS = [InputSpec("ids", "int64", ("batch", "sequence")), InputSpec("attention_mask", "int64", ("batch", "sequence"))]
SIZES = {"batch": Dimension(1, 8), "sequence": Dimension(1, 64)}


def masks(*specs: InputSpec) -> list[list[list[int]]]:
    signature = Signature(specs, SIZES)
    found = canary_inputs(signature, [{"batch": 1, "sequence": 1}, {"batch": 3, "sequence": 7}], 0)
    return [each.tensors[1].int().tolist() for each in found if each.origin == PADDED]


def test_masks_begin_with_content_and_end_with_padding() -> None:
    (mask,) = masks(*SPECS)
    assert all(row == sorted(row, reverse=True) and 0 < sum(row) < 7 for row in mask)
    assert len({sum(row) for row in mask}) == 3
    (inverse,) = masks(SPECS[0], InputSpec("key_padding_mask", "bool", ("batch", "sequence")))
    assert all(row == sorted(row) and 0 < sum(row) < 7 for row in inverse)


def test_the_random_inputs_stay_and_know_where_they_come_from() -> None:
    found = list(canary_inputs(Signature(SPECS, SIZES), [{"batch": 2, "sequence": 5}], 3))
    assert [each.origin for each in found] == ["random", PADDED]
    expected = Signature(SPECS, SIZES).generate({"batch": 2, "sequence": 5}, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(found[0].tensors, expected, strict=True))


@pytest.mark.parametrize(
    "other",
    [
        InputSpec("types", "int64", ("batch", "sequence")),
        InputSpec("mask", "float32", ("batch", "sequence")),
        InputSpec("mask", "int64", ("batch", 5)),
        InputSpec("mask", "int64", ("batch", "sequence"), limits=(1, 5)),
        InputSpec("mask", "int64", ("batch", "sequence"), excludes=(0,)),
    ],
)
def test_what_is_no_padding_mask_stays_random(other: InputSpec) -> None:
    assert masks(SPECS[0], other) == []


def test_values_of_a_mask_do_not_keep_padding_away() -> None:
    (mask,) = masks(SPECS[0], InputSpec("attention_mask", "int64", ("batch", "sequence"), values=(1, 2)))
    assert {0, 1} == {value for row in mask for value in row}
