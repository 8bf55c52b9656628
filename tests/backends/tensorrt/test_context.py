"""Plans on execution contexts: CUDA graphs, buffers that grow, outputs that are inputs, on a TensorRT that is stood in.

Layer 3: what is recorded, and when, and which memory is used; tests/gpu/test_tensorrt.py runs real plans.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fake_tensorrt import Driver, use_fake_tensorrt, write_fake_plan
from tests.support.models import archive_source, settings_of, write_archive
from ts_handlers import CompiledModel, start_model
from ts_handlers.backends.base import Built, Description, Target, Workspace
from ts_handlers.backends.tensorrt import backend as tensorrt
from ts_handlers.backends.tensorrt import plan
from ts_handlers.backends.tensorrt.profiles import bounds_of, profile_ranges
from ts_handlers.execution import cuda_graphs
from ts_handlers.execution.base import Loaded
from ts_handlers.model.structure import flatten

SUMS = """
import torch


class Model(torch.nn.Module):
    def forward(self, x):
        return x.sum(1)
"""
SECTION: dict[str, Any] = {
    "backends": ["tensorrt"],
    "strict": True,
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
    "dimensions": {"batch": {"min": 1, "max": 16}},
    "warmup": [{"batch": 8}, {"batch": 3}],
}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return use_fake_tensorrt(monkeypatch)


def describe(
    target: Target, directory: Path, outputs: list[str], returns: list[list[Any]], structure: Any
) -> Description:
    """Leave a plan of the fake in `directory`, with the profiles of the settings; its description."""
    profiles = [bounds_of(ranges) for ranges in profile_ranges(target)]
    shapes = [[[bounds["batch"][part], 4] for part in range(3)] for bounds in profiles]
    write_fake_plan(directory / plan.PLAN, outputs, shapes)
    return {
        "flavour": "tensorrt_rtx",
        "profiles": profiles,
        "inputs": ["x"],
        "outputs": outputs,
        "returns": returns,
        "in_tensorrt": [1, 1],
        "quantized": {},
        "output": flatten(structure)[1],
    }


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Any:
    """Start a model of row sums with the backend `tensorrt`, which checks what it has built as with a real plan."""

    def build(self: Any, target: Target, workspace: Workspace) -> Built:
        directory = workspace.directory
        description = describe(target, directory, ["y"], [["output", 0]], torch.zeros(1))
        return Built(description, plan.verify(target, directory, description))

    def load(self: Any, target: Target, directory: Path, description: Description) -> Loaded:
        return plan.load_plan(target, directory, description)[0]

    monkeypatch.setattr(tensorrt.TensorRTBackend, "build", build)
    monkeypatch.setattr(tensorrt.TensorRTBackend, "load", load)
    monkeypatch.setattr(tensorrt.TensorRTBackend, "toolchain", lambda self, request: "fake")
    folder = write_archive(tmp_path / "archive", SUMS, seed=None)

    def run(**contexts: Any) -> CompiledModel:
        settings = settings_of({**SECTION, "contexts": contexts}, store=str(tmp_path / "store"))
        return start_model(archive_source(folder, None), settings)

    return run


def check(model: CompiledModel, *batches: int) -> None:
    for batch in batches:
        x = torch.randn(batch, 4)
        assert torch.allclose(model(x), x.sum(1), atol=1e-5)


def test_graphs_are_recorded_for_declared_sizes_only_and_never_once_the_model_serves(
    start: Any, driver: Driver
) -> None:
    for result in ("built", "hit"):
        driver.log.clear()
        model = start(cuda_graphs=True)
        assert model.outcome.result == result
        assert driver.log.count("record") == model.describe()["artifact"]["cuda_graphs"] == 2
        contexts = driver.contexts
        driver.log.clear()
        check(model, *range(1, 17), *range(1, 17))
        assert (driver.log.count("record"), driver.contexts) == (0, contexts)
        assert driver.log.count("replay") == 4  # sizes 8 and 3, twice
        assert driver.log.count("run") == 28
        assert model.describe()["artifact"]["cuda_graphs"] == 2


def test_without_the_setting_nothing_is_recorded(start: Any, driver: Driver) -> None:
    model = start()
    check(model, *range(1, 17))
    assert "record" not in driver.log
    assert "cuda_graphs" not in model.describe()["artifact"]


def test_what_cannot_be_recorded_runs_all_the_same(
    start: Any, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended = []
    monkeypatch.setattr(cuda_graphs.GraphRecorder, "_end_broken_capture", lambda self, memory: ended.append(memory))
    driver.fails_in_capture = True
    model = start(cuda_graphs=True)
    check(model, 8, 3, 5)
    assert model.describe()["artifact"]["cuda_graphs"] == 0
    assert "replay" not in driver.log
    assert len(ended) == caplog.text.count("no CUDA graph for inputs of") == 1


def runner_of(tmp_path: Path, driver: Driver, count: int) -> Any:
    """A runner of the engine whose output ``pad`` grows as ``x`` gets narrower."""
    from tests.support.fake_tensorrt import Device
    from ts_handlers.backends.tensorrt.runtime import TensorRTEngine
    from ts_handlers.execution.runner import EngineRunner
    from ts_handlers.settings.sections import ContextSettings

    write_fake_plan(tmp_path / "plan", ["y", "pad"], [[[1, 1], [8, 16], [16, 16]]])
    engine: Any = TensorRTEngine(
        "tensorrt_rtx",
        tmp_path / "plan",
        name="growing",
        inputs=["x"],
        outputs=["y", "pad"],
        device=torch.device("cpu"),
        cuda_graphs=True,
    )
    return EngineRunner([engine], ContextSettings(count=count, cuda_graphs=True), Device()), engine.recorder


def answers_rightly(runner: Any, rows: int, width: int) -> bool:
    x = torch.randn(rows, width)
    y, pad = runner.run(0, [x])
    return torch.allclose(y, x.sum(1), atol=1e-5) and pad.tolist() == [width] * (64 // width)


def test_every_context_records_its_own_graphs(tmp_path: Path, driver: Driver) -> None:
    runner, recorder = runner_of(tmp_path, driver, count=3)
    for width in (16, 8):
        for _ in range(6):  # slots are lent in turn
            assert answers_rightly(runner, 2, width)
    assert recorder.recorded == driver.log.count("record") == 6
    with recorder.paused():
        assert answers_rightly(runner, 5, 16)
    assert recorder.recorded == 6
    assert answers_rightly(runner, 5, 16)
    assert recorder.recorded == 7


@pytest.mark.parametrize("sealed", [False, True])
def test_graphs_outlive_an_output_that_outgrows_its_buffer(tmp_path: Path, driver: Driver, sealed: bool) -> None:
    """``pad`` of a narrow input is larger than that of the largest one, for which its buffer was made."""
    runner, recorder = runner_of(tmp_path, driver, count=1)
    for width in (16, 8):
        assert answers_rightly(runner, 2, width)
    facts: dict[str, Any] = {}
    if sealed:
        recorder.stop_recording(facts)
    for width in (1, 2, 1):
        assert answers_rightly(runner, 2, width)
    driver.log.clear()
    for _ in range(2):
        for width in (16, 8, 1, 2):
            assert answers_rightly(runner, 2, width)
    replays = 4 if sealed else 8
    assert (driver.log.count("replay"), driver.log.count("record")) == (replays, 0)
    assert recorder.recorded == (2 if sealed else 4)
    memory = {"torch_bytes": 128, "graph_bytes": 64}  # the fake's figures
    assert facts == ({"cuda_graphs": 2, "gpu_memory": memory} if sealed else {})


def test_outputs_that_are_one_tensor_or_an_input_are_put_where_the_model_has_them(
    tmp_path: Path, driver: Driver
) -> None:
    target = Target(archive_source(write_archive(tmp_path / "a")), settings_of(SECTION), torch.device("cpu"))
    tensor = torch.zeros(1)
    structure = {"sum": tensor, "all": (tensor, 3), "again": tensor}
    description = describe(target, tmp_path, ["y"], [["output", 0], ["input", 0], ["output", 0]], structure)
    loaded, _ = plan.load_plan(target, tmp_path, description)
    x = torch.randn(5, 4)
    answer = loaded.run([x])
    assert torch.allclose(answer["sum"], x.sum(1), atol=1e-5)
    assert answer["all"][0] is x
    assert answer["all"][1] == 3
    assert answer["again"] is answer["sum"]


def test_an_allocator_that_keeps_no_account_fails_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's does with PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync."""

    def snapshot() -> None:
        raise RuntimeError("Calling snapshot with backend:cudaMallocAsync is not meaningful.")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    facts: dict[str, Any] = {}
    cuda_graphs.GraphRecorder(torch.device("cuda")).stop_recording(facts)
    assert facts == {"cuda_graphs": 0}
