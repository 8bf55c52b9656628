"""Real plans on a real GPU: built, stored, loaded, run by several contexts, and refused where they are foreign."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.marks import TENSORRT
from tests.support.models import (
    LINEAR,
    TWO_LAYERS,
    archive_source,
    eager_model,
    settings_of,
    write_archive,
    write_weights,
)
from ts_handlers import CompiledModel, start_model

pytestmark = TENSORRT

CODE = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x, scale):
        y = self.norm(torch.relu(self.conv(x)).mean((2, 3)))
        return {"logits": self.head(y) * scale.unsqueeze(1), "spread": y.abs().amax(1)}
"""
PARTIAL = TWO_LAYERS.replace("torch.relu(self.first(x))", "torch.erfinv(torch.tanh(self.first(x)) * 0.9)")
SECTION: dict[str, Any] = {
    "backends": ["tensorrt"],
    "strict": True,
    "dtype": "float16",
    "inputs": [
        {"name": "x", "dtype": "float16", "shape": ["batch", 3, 8, 8]},
        {"name": "scale", "dtype": "float16", "shape": ["batch"]},
    ],
    "dimensions": {"batch": {"min": 1, "max": 16}},
    "warmup": [{"batch": 8}],
}


def inputs(batch: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(batch, 3, 8, 8, generator=generator), torch.rand(batch, generator=generator) + 0.5]
    return [value.half().cuda() for value in values]


def error_of(model: CompiledModel, directory: Path, tensors: list[torch.Tensor]) -> float:
    """Largest relative error of the answer against the eager model in float32."""
    with torch.inference_mode():
        expected = eager_model(directory).cuda()(*[tensor.float() for tensor in tensors])
        found = model(*tensors)
    assert list(found) == list(expected)
    return max(float((found[k].float() - expected[k]).norm() / expected[k].norm()) for k in expected)


@pytest.fixture(scope="module")
def archive_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"), CODE)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, archive_folder: Path) -> Path:
    """A store that holds the model's plan."""
    root = tmp_path_factory.mktemp("store")
    model = start(archive_folder, root)
    assert model.outcome.result == "built"
    assert model.describe()["artifact"]["in_tensorrt"][0] > 0
    return root


def start(folder: Path, root: Path, **changes: Any) -> CompiledModel:
    settings = settings_of({**SECTION, **changes}, store=str(root))
    return start_model(archive_source(folder), settings, "cuda:0")


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 16])
def test_a_stored_plan_answers_at_every_size(archive_folder: Path, store: Path, batch: int) -> None:
    model = start(archive_folder, store)
    assert model.outcome.result == "hit"
    assert error_of(model, archive_folder, inputs(batch)) < 5e-3


@pytest.mark.parametrize("scratch", ["private", "shared"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_threads_share_one_engine_and_get_their_own_answers(
    archive_folder: Path, store: Path, scratch: str, cuda_graphs: bool
) -> None:
    contexts = {"count": 3, "scratch": scratch, "cuda_graphs": cuda_graphs}
    model = start(archive_folder, store, contexts=contexts)
    memory = model.describe()["artifact"]["memory"]
    assert memory["predicted"]["count"] == 3
    assert memory["used"]["torch_bytes"] >= memory["predicted"]["total_bytes"]
    cases = {seed: inputs(1 + seed % 16, seed) for seed in range(24)}
    with torch.inference_mode():
        eager = eager_model(archive_folder).cuda()
        expected = {seed: eager(*[t.float() for t in tensors])["logits"] for seed, tensors in cases.items()}
    errors: list[float] = []

    def work(seeds: list[int]) -> None:
        for _ in range(10):
            for seed in seeds:
                found = model(*cases[seed])["logits"].float()
                errors.append(float((found - expected[seed]).norm() / expected[seed].norm()))

    threads = [threading.Thread(target=work, args=(list(range(start, 24, 6)),)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 240
    assert max(errors) < 5e-3
    assert model.describe()["contexts"]["high_water"] == 3


@pytest.mark.parametrize("scratch", ["private", "shared"])
def test_graphs_are_recorded_before_the_model_serves_and_never_after(
    archive_folder: Path, store: Path, scratch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where they are recorded; sizes with a graph and without one take turns, on both contexts."""
    from ts_handlers.execution.cuda_graphs import GraphRecorder

    record, recorded = GraphRecorder.record, []

    def counted(self: GraphRecorder, work: Any, stream: Any, memory: Any, tensors: Any) -> Any:
        recorded.append(tuple(tensors[0].shape))
        return record(self, work, stream, memory, tensors)

    monkeypatch.setattr(GraphRecorder, "record", counted)
    contexts = {"count": 2, "scratch": scratch, "cuda_graphs": True}
    model = start(archive_folder, store, contexts=contexts)
    assert model.outcome.result == "hit"
    before = len(recorded)
    assert recorded.count((8, 3, 8, 8)) == 2  # the size of warm-up, on each context
    assert model.describe()["artifact"]["cuda_graphs"] == before

    def errors(seed: int) -> list[float]:
        sizes = (8, 3, 8, 1, 16, 8, 5, 8, 8, 2) * 4
        return [error_of(model, archive_folder, inputs(batch, seed)) for batch in sizes]

    assert max(errors(0)) < 5e-3
    found: list[float] = []
    threads = [threading.Thread(target=lambda seed=seed: found.extend(errors(seed))) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 160
    assert max(found) < 5e-3
    assert len(recorded) == before
    assert model.describe()["artifact"]["cuda_graphs"] == before


def test_a_model_that_returns_a_tensor_twice_and_an_input(tmp_path: Path) -> None:
    code = LINEAR.replace("return self.layer(x)", "y = self.layer(x); return {'y': y, 'x': x, 'again': (y, y + 1)}")
    folder = write_archive(tmp_path / "archive", code)
    section = {
        "backends": ["tensorrt"],
        "strict": True,
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
        "dimensions": {"batch": {"min": 1, "max": 8}},
        "store": str(tmp_path / "s"),
    }
    for result in ("built", "hit"):
        model = start_model(archive_source(folder), settings_of(section), "cuda:0")
        assert model.outcome.result == result
        x = torch.randn(5, 4, device="cuda")
        with torch.inference_mode():
            expected = eager_model(folder).cuda()(x)
        found = model(x)
        pairs = [(found[key], expected[key]) for key in ("y", "x")]
        pairs += list(zip(found["again"], expected["again"], strict=True))
        assert all(float((a - b).norm() / b.norm()) < 2e-3 for a, b in pairs)


def test_new_weights_get_a_plan_of_their_own(archive_folder: Path, store: Path, tmp_path: Path) -> None:
    tuned = write_archive(tmp_path / "tuned", CODE)
    write_weights(tuned, seed=7)
    model = start(tuned, store)
    assert model.outcome.result == "built"
    assert model.outcome.missed == ("weights",)
    assert error_of(model, tuned, inputs(8)) < 5e-3
    assert error_of(start(archive_folder, store), archive_folder, inputs(8)) < 5e-3


def test_another_version_is_a_miss_with_its_part_named(
    archive_folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ts_handlers.backends.tensorrt import library as tensorrt_library

    monkeypatch.setattr(tensorrt_library, "version", lambda flavour: f"{flavour}-0.0.1")
    with pytest.raises(Exception, match="missed: toolchain"):
        start(archive_folder, store, on_miss="fail")


def test_a_plan_that_is_not_accepted_is_rebuilt(archive_folder: Path, tmp_path: Path) -> None:
    start(archive_folder, tmp_path / "s")
    (manifest,) = (tmp_path / "s" / "entries").rglob("manifest.json")
    from ts_handlers.store.entry import list_files, read_manifest, write_manifest

    plan = manifest.parent / "plan.engine"
    plan.write_bytes(plan.read_bytes()[:1000])  # a plan of somebody else's TensorRT: whole by its digest, and unusable
    import msgspec

    found = read_manifest(manifest.parent)
    write_manifest(manifest.parent, msgspec.structs.replace(found, files=list_files(manifest.parent)))
    model = start(archive_folder, tmp_path / "s")
    assert model.outcome.result == "built"
    assert model.outcome.missed == ("corrupt",)
    assert error_of(model, archive_folder, inputs(8)) < 5e-3


def test_too_many_contexts_are_refused_with_the_figures(archive_folder: Path, store: Path) -> None:
    from ts_handlers.errors import ContextMemoryError

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - (200 << 20), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(ContextMemoryError, match=r"contexts.count 64 with private scratch needs \d+ bytes"):
            start(archive_folder, store, contexts={"count": 64})
    finally:
        del taken
        torch.cuda.empty_cache()


def test_products_summed_in_float32_are_more_exact(tmp_path: Path) -> None:
    code = LINEAR.replace("Linear(4, 3)", "Linear(768, 64)")
    folder = write_archive(tmp_path / "archive", code)
    section = {
        "backends": ["tensorrt"],
        "strict": True,
        "dtype": "float16",
        "inputs": [{"name": "x", "dtype": "float16", "shape": ["batch", 768]}],
        "dimensions": {"batch": {"min": 1, "max": 16}},
        "warmup": [{"batch": 8}],
        "store": str(tmp_path / "store"),
    }
    x = torch.randn(8, 768, generator=torch.Generator().manual_seed(0)).half().cuda()
    half = eager_model(folder).half().double().cuda()
    errors = {}
    for exact in (False, True):
        settings = settings_of(section, tensorrt={"float32_accumulation": exact})
        model = start_model(archive_source(folder), settings, "cuda:0")
        with torch.inference_mode():
            expected = half(x.double())
            errors[exact] = float((model(x).double() - expected).norm() / expected.norm())
    assert errors[True] < 3e-4  # the rounding of the answers
    assert errors[True] <= errors[False]


@pytest.mark.parametrize("partial", ["next", "module"])
def test_graphs_that_convert_in_part(tmp_path: Path, partial: str) -> None:
    folder = write_archive(tmp_path / "archive", PARTIAL)
    section = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
        "dimensions": {"batch": {"min": 1, "max": 8}},
        "backends": ["tensorrt", "eager"],
        "tensorrt": {"partial": partial},
        "store": str(tmp_path / "s"),
    }
    for result in ("built", "hit"):
        model = start_model(archive_source(folder), settings_of(section), "cuda:0")
        x = torch.randn(5, 4, device="cuda")
        with torch.inference_mode():
            expected = eager_model(folder).cuda()(x)
        assert float((model(x) - expected).norm() / expected.norm()) < 2e-3
        if partial == "next":
            assert model.outcome.backend == "eager"
            assert "operators convert to TensorRT" in model.outcome.fallbacks[0]["reason"]
        else:
            assert (model.outcome.backend, model.outcome.result) == ("tensorrt", result)
            converted, total = model.describe()["artifact"]["in_tensorrt"]
            assert 0 < converted < total
