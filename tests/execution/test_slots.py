"""Slots of modules and artifacts: as many calls at once as `contexts.count` says, right answers from every thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Register
from tests.support.models import LINEAR_SECTION, archive_source, eager_model, settings_of
from tests.support.subprocesses import run_python
from ts_handlers import CompiledModel, ModuleSource, start_model
from ts_handlers.backends.torch_compile import compiles_nothing
from ts_handlers.errors import BusyError
from ts_handlers.execution.base import Loaded
from ts_handlers.execution.contexts import ContextPool
from ts_handlers.execution.slots import ModuleSlots
from ts_handlers.metrics import Metrics
from ts_handlers.model.signature import Signature
from ts_handlers.servers.torchserve.metrics import Emitter
from ts_handlers.settings.sections import ContextSettings

Forward = Callable[[torch.Tensor], torch.Tensor]


class Calls(torch.nn.Module):
    """Counts how many calls are inside at once; each of a model that is ready may wait for others."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        super().__init__()
        self.inside = self.most = 0
        self.ready = False
        self._wait = wait
        self._count = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self._count:
            self.inside += 1
            self.most = max(self.most, self.inside)
        if self.ready:
            self._wait()
        with self._count:
            self.inside -= 1
        return x + 1


def model_of(module: torch.nn.Module, declared: bool, **contexts: Any) -> CompiledModel:
    section = LINEAR_SECTION if declared else {}
    model = start_model(ModuleSource("calls", module), settings_of(section, backends=["eager"], contexts=contexts))
    module.ready = True  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("declared", [True, False], ids=["declared inputs", "no inputs"])
def test_one_call_at_a_time_unless_more_are_asked_for(declared: bool) -> None:
    module = Calls(wait=lambda: threading.Event().wait(0.002))
    model = model_of(module, declared)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(model, [torch.full((1, 4), float(i)) for i in range(20)]))
    assert [answer.tolist()[0][0] for answer in answers] == [i + 1 for i in range(20)]
    assert module.most == 1
    contexts = model.describe()["contexts"]
    assert (contexts["size"], contexts["high_water"], contexts["lent"], contexts["refused"]) == (1, 1, 20, 0)


def test_as_many_calls_at_once_as_there_are_contexts() -> None:
    together = threading.Barrier(2)
    module = Calls(wait=lambda: together.wait(60))  # two calls must be inside, or none gets out
    model = model_of(module, True, count=2)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(model, [torch.zeros(1, 4)] * 8))
    assert module.most == 2
    assert model.describe()["contexts"]["high_water"] == 2


def test_a_call_beyond_the_wait_is_refused_and_counted() -> None:
    entered, leave = threading.Event(), threading.Event()
    model = model_of(Calls(wait=lambda: (entered.set(), leave.wait(60))), True, wait_seconds=0.01)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(model, torch.zeros(1, 4))
        entered.wait(60)
        with pytest.raises(BusyError):
            model(torch.zeros(1, 4))
        leave.set()
        assert first.result(60).tolist() == [[1, 1, 1, 1]]
    facts = model.describe()
    assert (facts["counters"]["busy"], facts["contexts"]["refused"]) == (1, 1)


def test_waits_and_refusals_reach_torchserve_once() -> None:
    seen: list[tuple[str, float]] = []

    class TorchServeMetrics:
        def add_counter(self, name: str, value: float) -> None:
            seen.append((name, value))

        def add_time(self, name: str, value: float, idx: None, unit: str) -> None:
            seen.append((name, value))

    emitter, pool = Emitter(Metrics()), ContextPool([1], wait_seconds=0)
    with pool.lend():
        emitter.emit_contexts(TorchServeMetrics(), pool.stats())
        assert seen == []
        for _ in range(2):
            with pytest.raises(BusyError):
                pool.lend().__enter__()
    for _ in range(2):
        emitter.emit_contexts(TorchServeMetrics(), pool.stats())
    assert [name for name, _ in seen] == [
        "ts_handlers_context_waits_total",
        "ts_handlers_context_wait_ms",
        "ts_handlers_context_refused_total",
    ]
    assert (seen[0][1], seen[2][1]) == (2, 2)


def test_what_is_not_reentrant_runs_one_call_at_a_time() -> None:
    module = Calls(wait=lambda: threading.Event().wait(0.002))
    slots = ModuleSlots(ContextSettings(count=3), torch.device("cpu"))
    loaded = slots.wrap(Loaded(lambda tensors: module(tensors[0]), Signature((), {}), reentrant=False))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(loaded.run, [[torch.zeros(1)]] * 12))
    assert module.most == 1
    assert loaded.pool is not None
    assert loaded.pool.stats().lent == 12


def test_requests_outside_the_ranges_are_counted_too(archive: Path, register: Register) -> None:
    register("aot_inductor", "tests.support.file_backend:BACKEND")
    settings = settings_of(outside="eager", backends=["aot_inductor"], store=str(archive.parent / "store"))
    model = start_model(archive_source(archive), settings)
    before = model.describe()["contexts"]["lent"]
    x = torch.randn(20, 4)
    assert torch.allclose(model(x), eager_model(archive)(x), atol=1e-6)
    assert model.describe()["contexts"]["lent"] == before + 1


def ask_from_threads(model: Any, eager: Any, width: int = 4) -> None:
    """Forty different requests from four threads, each answered as eager does."""
    torch.manual_seed(0)
    inputs = [torch.randn(1 + i % 8, width) for i in range(40)]
    with torch.inference_mode():
        expected = [eager(x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(model, inputs))
    for found, right in zip(answers, expected, strict=True):
        assert torch.allclose(found, right, atol=1e-5)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_inductor", "inductor"])
def test_compiled_models_answer_right_from_four_threads(backend: str, archive: Path, tmp_path: Path) -> None:
    run_python(FROM_THREADS, archive, tmp_path / "store", backend)


FROM_THREADS = """
    import pathlib, sys
    import torch
    from tests.execution.test_slots import ask_from_threads
    from tests.support.models import archive_source, eager_model, settings_of
    from ts_handlers import start_model

    archive, store, backend = sys.argv[1:]
    settings = settings_of(store=store, backends=[backend], strict=True, contexts={"count": 2})
    model = start_model(archive_source(archive), settings)
    before = model.describe()
    ask_from_threads(model, eager_model(pathlib.Path(archive)))
    after = model.describe()
    assert after["contexts"]["size"] == 2
    assert after["contexts"]["lent"] == before["contexts"]["lent"] + 40
    assert after["contexts"]["in_use"] == 0
    assert after["graphs_in_process"] == before["graphs_in_process"]
    import torch._dynamo.eval_frame as frame
    assert frame._stance.stance == "default"
"""


def test_one_stance_for_calls_that_overlap() -> None:
    """The last call resets it, whatever the order in which they end."""
    import torch._dynamo.eval_frame as frame

    first, second, warming_up = compiles_nothing(), compiles_nothing(), compiles_nothing(False)
    with warming_up:
        assert frame._stance.stance == "default"
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert frame._stance.stance == "eager_on_recompile"
    second.__exit__(None, None, None)
    assert frame._stance.stance == "default"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_streams_of_a_gpu_answer_right_from_four_threads(archive: Path) -> None:
    slots = ModuleSlots(ContextSettings(count=3), torch.device("cuda", 0))
    module = eager_model(archive).cuda()

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return slots.call(lambda: (module(x.cuda()), torch.cuda.current_stream()))[0].cpu()

    ask_from_threads(call, eager_model(archive))
    with slots.pool.lend() as stream:
        assert stream != torch.cuda.default_stream()
