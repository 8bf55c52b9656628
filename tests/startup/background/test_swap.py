"""The swap: calls before, during and after it, its idle windows, and the eager module that goes with it."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import file_backend
from tests.support.background_builds import (
    ROWS,
    Start,
    background,
)
from tests.support.models import archive_source, eager_model, settings_of
from tests.support.workers import wait_until
from ts_handlers import CompiledModel
from ts_handlers.backends.base import Target
from ts_handlers.execution.base import Loaded
from ts_handlers.execution.outcome import Outcome
from ts_handlers.execution.slots import ModuleSlots
from ts_handlers.metrics import Metrics
from ts_handlers.settings.sections import ContextSettings
from ts_handlers.startup.background import idle_window
from ts_handlers.system.cycle_collector import exempt_from_collection

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("cheap_backends")]


def test_calls_from_many_threads_all_answer_rightly_through_the_swap(start: Start, archive: Path) -> None:
    model = start()
    backends: set[str] = set()
    wrong: list[Any] = []
    over = threading.Event()

    def call(seed: int) -> None:
        generator, eager = torch.Generator().manual_seed(seed), eager_model(archive)
        while not over.is_set():
            rows = torch.randn(3, 4, generator=generator)
            with torch.inference_mode():
                if not torch.allclose(model(rows), eager(rows), atol=1e-5):
                    wrong.append(rows)
            backends.add(model.outcome.backend)
            time.sleep(0.001)  # the child is niced: threads that never sleep would starve it

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert background(model).wait(600)
        assert wait_until(lambda: model.outcome.backend == "eager" or "aot_inductor" in backends)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert backends == {"eager", "aot_inductor"}


def test_a_call_that_runs_during_the_swap_ends_as_it_began(archive: Path) -> None:
    target = Target(archive_source(archive), settings_of(), torch.device("cpu"))
    began, may_end = threading.Event(), threading.Event()

    def slow(tensors: list[torch.Tensor]) -> str:
        began.set()
        assert may_end.wait(60)
        return "before"

    def serve(run: Any, backend: str) -> CompiledModel:
        outcome = Outcome(backend, None, "eager")
        slots = ModuleSlots(ContextSettings(count=2), target.device)
        return CompiledModel(target, Loaded(run, target.require_signature()), outcome, Metrics(), slots)

    model = serve(slow, "eager")
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(model(ROWS)))
    caller.start()
    assert began.wait(60)
    model.swap(serve(lambda tensors: "after", "aot_inductor"))
    assert model(ROWS) == "after"
    may_end.set()
    caller.join()
    assert answers == ["before"]
    assert model.outcome.backend == "aot_inductor"


@pytest.mark.parametrize(
    ("idle", "seconds", "policy"), [(1, 600.0, os.SCHED_IDLE), (0, 600.0, os.SCHED_OTHER), (1, 0.0, os.SCHED_OTHER)]
)
def test_native_steps_begin_while_no_call_is_under_way_and_calls_are_answered_meanwhile(
    start: Start, archive: Path, idle: int, seconds: float, policy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they get the idle processors only, where there are such and not for too long."""
    monkeypatch.setattr("ts_handlers.startup.background.idle_window.idle_processors", lambda: idle)
    monkeypatch.setattr("ts_handlers.startup.background.idle_window.IDLE_SECONDS", seconds)
    monkeypatch.setattr(idle_window, "PATIENCE_SECONDS", 600.0)
    started, may_end, loaded, checked, release = (threading.Event() for _ in range(5))
    steps: list[tuple[str, bool]] = []
    policies: list[int] = []
    under_way = threading.Event()
    load = file_backend.BACKEND.load

    def watched(*arguments: Any) -> Any:
        steps.append(("load", under_way.is_set()))
        artifact = load(*arguments)
        run = artifact.run

        def check(tensors: list[torch.Tensor]) -> Any:
            if not checked.is_set():
                steps.append(("run", under_way.is_set()))
                policies.append(os.sched_getscheduler(0))
                checked.set()
                assert release.wait(60)
            return run(tensors)

        loaded.set()
        return dataclasses.replace(artifact, run=check, frees_interpreter=True)

    monkeypatch.setattr(file_backend.BACKEND, "load", watched)
    source = archive_source(archive)
    module = source.eager()
    forward = module.forward

    def slow(rows: torch.Tensor) -> torch.Tensor:
        if serving.is_set() and not started.is_set():
            under_way.set()
            started.set()
            assert may_end.wait(60)
            under_way.clear()
        return forward(rows)

    serving = threading.Event()  # the start asks the eager model too
    monkeypatch.setattr(module, "forward", slow)
    model = start(source=source)
    serving.set()
    answers: list[torch.Tensor] = []
    caller = threading.Thread(target=lambda: answers.append(model(ROWS)))
    caller.start()
    assert started.wait(60)
    while background(model).describe()["state"] != "loading":
        assert not background(model).wait(0.01)
    assert not loaded.wait(0.2)  # the call is still under way
    may_end.set()
    caller.join()
    assert checked.wait(60)
    assert model.outcome.backend == "eager"
    answers.append(model(ROWS))  # the check has not ended: eager answers
    release.set()
    assert background(model).wait(60)
    assert steps == [("load", False), ("run", False)]
    assert policies == [policy]
    assert model.outcome.backend == "aot_inductor"
    with torch.inference_mode():
        assert all(torch.allclose(answer, forward(ROWS), atol=1e-5) for answer in answers)


def test_the_eager_module_is_freed_with_the_swap_although_its_import_kept_an_exception(
    start: Start, archive: Path
) -> None:
    code = "try:\n    raise ImportError('x')\nexcept ImportError as error:\n    KEPT = error\n"
    path = archive / "model.py"
    path.write_text(path.read_text() + "\n" + code)
    source = archive_source(archive)
    model = start(source=source)
    module = weakref.ref(source.eager())
    gc.disable()
    try:
        assert background(model).wait(120)
        assert model.outcome.backend == "aot_inductor"
        background(model).wait_for_idle_window()
        assert module() is None
        assert not background(model).left_module
    finally:
        gc.enable()


def test_a_module_that_reference_cycles_hold_is_told(start: Start, archive: Path) -> None:
    source = archive_source(archive)
    model = start(source=source)
    module = source.eager()
    module.itself = [module]
    del module
    gc.disable()
    try:
        assert background(model).wait(120)
        assert background(model).left_module
        exempt_from_collection(True)
        assert not background(model).left_module
    finally:
        gc.enable()
        gc.unfreeze()
