"""``on_miss: background``: eager at once, one child process builds, the model is swapped between two calls."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Register
from tests.support import file_backend
from tests.support.marks import needs_root
from tests.support.models import archive_source, eager_model, settings_of
from tests.support.subprocesses import REPOSITORY, SUPPORT, finish, start_python
from ts_handlers import CompiledModel, ModuleSource, Settings, start_model
from ts_handlers.backends.base import Target
from ts_handlers.compiled_model import Outcome
from ts_handlers.execution.base import Loaded
from ts_handlers.execution.contexts import PoolStats
from ts_handlers.execution.slots import ModuleSlots
from ts_handlers.guard.quarantine import read_quarantines
from ts_handlers.metrics import Metrics
from ts_handlers.model.archive import ArchiveSource
from ts_handlers.servers.torchserve.metrics import Emitter
from ts_handlers.settings.sections import ContextSettings
from ts_handlers.startup.background import idle_window
from ts_handlers.startup.background.build import BackgroundBuild
from ts_handlers.system.cycle_collector import exempt_from_collection

pytestmark = pytest.mark.processes

CHILD_SITE = SUPPORT / "child_site"
ROWS = torch.arange(8.0).reshape(2, 4)
Start = Callable[..., CompiledModel]


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch, register: Register, tmp_path: Path) -> None:
    """The cheap backend here and in build processes, which log their builds."""
    register("aot_inductor", "tests.support.file_backend:BACKEND")
    register("inductor", "tests.support.second_backend:BACKEND")
    monkeypatch.setattr(file_backend, "BACKEND", file_backend.FileBackend())
    monkeypatch.syspath_prepend(str(CHILD_SITE))
    monkeypatch.setenv("BUILD_LOG", str(tmp_path / "builds"))


@pytest.fixture
def start(archive: Path, tmp_path: Path) -> Start:
    def run(retry_failed: bool = False, source: ArchiveSource | None = None, **changes: Any) -> CompiledModel:
        section = {"store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"], "on_miss": "background"}
        section["background"] = {"nice": 0}  # the machine may be busy
        settings = settings_of(**{**section, **changes})
        return start_model(source or archive_source(archive), settings, retry_failed=retry_failed)

    return run


def background(model: CompiledModel) -> BackgroundBuild:
    assert model.background is not None
    return model.background


def settled(model: CompiledModel, archive: Path) -> dict[str, Any]:
    """Wait until the build is over; the model answers as eager does before and after."""
    while True:
        over = background(model).wait(0.02)
        with torch.inference_mode():
            assert torch.allclose(model(ROWS), eager_model(archive)(ROWS), atol=1e-5)
        if over:
            break
    facts = model.describe()
    json.dumps(facts)
    return facts


def counters(facts: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in facts["counters"].items() if count}


def stays_eager(facts: dict[str, Any], reason: str) -> None:
    assert (facts["backend"], facts["result"]) == ("eager", "background")
    assert facts["background"]["state"] == "failed"
    assert reason in facts["background"]["reason"], facts["background"]
    assert facts["counters"]["background_failed"] == 1
    assert facts["counters"]["swap"] == 0


def building(model: CompiledModel) -> dict[str, Any]:
    """Wait until the child compiles."""
    while True:
        facts = background(model).describe()
        if facts["phase"] == "build: compile" or background(model).wait(0.02):
            return facts


def begun(tmp_path: Path) -> list[int]:
    """Ids of the processes that have begun to build."""
    path = tmp_path / "builds"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("begin")]


def test_eager_at_once_then_swapped(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_SECONDS", "0.3")
    model = start(outside="eager")
    first = model.describe()
    assert (first["backend"], first["result"]) == ("eager", "background")
    assert first["background"]["state"] in ("waiting", "building")
    told: list[str] = []
    background(model).when_done(lambda: told.append(background(model).describe()["state"]))
    facts = settled(model, archive)
    assert (facts["backend"], facts["result"], facts["fallbacks"]) == ("aot_inductor", "swapped", ())
    assert counters(facts) == {"miss": 1, "build": 1, "background_build": 1, "swap": 1, "canary_recorded": 1}
    assert facts["canary"]["source"] == "record"
    assert facts["background"]["state"] == "swapped"
    assert {"lookup", "load", "canary", "warmup"} <= set(facts["background"]["phases_ms"])
    assert len(begun(tmp_path)) == 1
    assert os.getpid() not in begun(tmp_path)
    assert told == ["swapped"]
    background(model).when_done(lambda: told.append("late"))
    assert told == ["swapped", "late"]
    # A request outside the ranges is answered by the eager model that served before.
    monkeypatch.setattr("ts_handlers.model.archive.load_model_class", lambda path: pytest.fail("built again"))
    assert model(torch.randn(9, 4)).shape == (9, 3)
    again = start()
    assert (again.outcome.result, again.outcome.key, again.background) == ("hit", facts["key"], None)


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
    assert background(model).wait(120)
    time.sleep(0.1)
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
        if not started.is_set():
            under_way.set()
            started.set()
            assert may_end.wait(60)
            under_way.clear()
        return forward(rows)

    monkeypatch.setattr(module, "forward", slow)
    model = start(source=source)
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


def test_waits_for_contexts_are_counted_anew_after_the_swap() -> None:
    found: list[tuple[str, float]] = []

    class Sink:
        def add_counter(self, name: str, value: float) -> None:
            found.append((name, value))

        def add_time(self, name: str, value: float, *arguments: object) -> None:
            found.append((name, value))

    emitter = Emitter(Metrics())
    for stats in (PoolStats(waited=5, wait_seconds=1.0), PoolStats(), PoolStats(waited=1, wait_seconds=0.25)):
        emitter.emit_contexts(Sink(), stats)
    waits, times = "ts_handlers_context_waits_total", "ts_handlers_context_wait_ms"
    assert [pair for pair in found if pair[1]] == [(waits, 5), (times, 1000.0), (waits, 1), (times, 250.0)]


def test_child_is_nice_and_a_killed_one_changes_nothing(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_SECONDS", "600")
    model = start(background={"nice": 7})
    facts = building(model)
    assert facts["state"] == "building"
    assert begun(tmp_path) == [facts["pid"]]
    assert os.getpriority(os.PRIO_PROCESS, facts["pid"]) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7)
    assert os.getpgid(facts["pid"]) != os.getpgid(0)
    assert os.getsid(facts["pid"]) == os.getsid(0)
    os.kill(facts["pid"], signal.SIGKILL)
    after = settled(model, archive)
    stays_eager(after, "was killed by SIGKILL")
    assert counters(after) == {"miss": 1, "background_build": 1, "background_failed": 1}
    assert list((tmp_path / "store").rglob("manifest.json")) == []
    monkeypatch.setenv("BUILD_SECONDS", "0")
    at_once = start()
    assert (at_once.background, at_once.metrics.counters["build_skipped"]) == (None, 1)
    (record,) = read_quarantines(tmp_path / "store")
    assert (record.kind, "was killed by SIGKILL" in record.reason) == ("circumstantial", True)
    assert settled(start(retry_failed=True), archive)["backend"] == "aot_inductor"


def test_a_build_that_its_time_limit_ended_is_remembered_and_the_next_backend_served(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_SECONDS", "600")
    model = start()
    building(model)
    process = background(model)._process
    assert process is not None
    process.end("it took longer than the setting background.seconds: 1")  # as its timer does
    stays_eager(settled(model, archive), "it took longer than the setting background.seconds: 1")
    monkeypatch.setenv("BUILD_SECONDS", "0")
    facts = settled(start(backends=["aot_inductor", "inductor", "eager"]), archive)
    assert (facts["backend"], facts["result"]) == ("inductor", "swapped")
    (fallback,) = facts["fallbacks"]
    assert fallback["backend"] == "aot_inductor"
    assert "a build failed" in fallback["reason"]
    assert "background.seconds: 1" in fallback["reason"]
    again = start(backends=["aot_inductor", "inductor", "eager"])
    assert (again.outcome.backend, again.outcome.result, again.background) == ("inductor", "hit", None)
    assert len(begun(tmp_path)) == 2


@pytest.fixture
def _unusual_torch() -> Iterator[None]:
    """State of torch that is part of every key."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads + 1)
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.usefixtures("_unusual_torch")
def test_child_walks_the_ladder_with_the_state_of_its_parent(
    start: Start, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_ERROR", "no way to export")
    facts = settled(start(backends=["aot_inductor", "inductor", "eager"]), archive)
    assert (facts["backend"], facts["result"]) == ("inductor", "swapped")
    assert [fallback["backend"] for fallback in facts["fallbacks"]] == ["aot_inductor"]
    assert counters(facts) == {
        "miss": 1,
        "build": 1,
        "build_failed": 1,
        "fallback": 1,
        "canary_recorded": 1,
        "background_build": 1,
        "swap": 1,
    }


@pytest.mark.parametrize(
    ("limits", "reason"), [({"seconds": 0.2}, "background.seconds: 0.2"), ({"memory_mb": 1}, "background.memory_mb: 1")]
)
def test_limits_end_the_build(limits: dict[str, Any], reason: str, start: Start, archive: Path) -> None:
    stays_eager(settled(start(background=limits), archive), reason)


def test_artifact_that_fails_its_canary_here_is_not_swapped_in(
    start: Start, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = file_backend.BACKEND.load

    def wrong(*arguments: Any) -> Any:
        loaded = load(*arguments)
        return dataclasses.replace(loaded, run=lambda tensors: loaded.run(tensors) * 1.5)

    monkeypatch.setattr(file_backend.BACKEND, "load", wrong)
    facts = settled(start(), archive)
    stays_eager(facts, "CanaryError")
    assert facts["counters"]["build"] == 1


def test_child_that_computes_another_key_does_not_build(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_backend.BACKEND, "toolchain", lambda request: "another")
    stays_eager(settled(start(), archive), "toolchain: 'another' there, 'test' here")
    assert begun(tmp_path) == []


def test_module_in_memory_is_served_eagerly_with_the_reason(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 3).eval()
    settings = settings_of(store=str(tmp_path / "store"), on_miss="background")
    model = start_model(ModuleSource("m", module), settings)
    assert background(model).wait(60)
    stays_eager(model.describe(), "no other process can make this model")
    assert model(ROWS).shape == (2, 3)


@needs_root
def test_read_only_store_is_not_built_for(start: Start, archive: Path, small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "store").mkdir(mode=0o700)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    stays_eager(settled(start(store=str(small_disk / "store")), archive), "cannot be written")
    assert begun(tmp_path) == []


def test_hit_and_eager_ladder_start_no_child(start: Start, archive: Path, tmp_path: Path) -> None:
    start(on_miss="compile")
    assert start().outcome.result == "hit"
    model = start_model(archive_source(archive), Settings(backends=("eager",), on_miss="background"))
    assert (model.outcome.result, model.background) == ("eager", None)
    assert begun(tmp_path) == [os.getpid()]


SERVE = """
    import json, sys
    import torch
    from tests.support.file_backend import use_file_backend
    from tests.support.models import archive_source, settings_of
    from ts_handlers import start_model
    use_file_backend()
    archive, store = sys.argv[1:3]
    section = {"store": store, "backends": ["aot_inductor", "eager"], "background": {"nice": 0}}
    settings = settings_of(**section, on_miss="background")
    model = start_model(archive_source(archive), settings)
    print(json.dumps(model.describe()["result"]), flush=True)
    model.background.wait()
    print(json.dumps({**model.describe(), "answer": model(torch.ones(2, 4)).tolist()}))
"""


def wait_for_end(pid: int) -> None:
    """Wait for a process that nobody is left to wait for."""
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        time.sleep(0.02)


def serve(archive: Path, tmp_path: Path, seconds: str, code: str = SERVE) -> subprocess.Popen[str]:
    """A process that serves the archive, once it has started eagerly."""
    path = os.pathsep.join([str(CHILD_SITE), str(REPOSITORY)])
    process = start_python(code, archive, tmp_path / "store", fresh=True, PYTHONPATH=path, BUILD_SECONDS=seconds)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == "background"
    return process


def ended(process: subprocess.Popen[str], archive: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(finish(process).splitlines()[-1])
    with torch.inference_mode():
        assert torch.allclose(torch.tensor(facts["answer"]), eager_model(archive)(torch.ones(2, 4)), atol=1e-5)
    return facts


def test_three_processes_build_once_and_all_swap(archive: Path, tmp_path: Path) -> None:
    processes = [serve(archive, tmp_path, "12") for _ in range(3)]  # which start one after the other meanwhile
    facts = [ended(process, archive) for process in processes]
    assert len(begun(tmp_path)) == 1
    assert [each["result"] for each in facts] == ["swapped"] * 3
    for counter in ("background_build", "build"):
        assert sum(each["counters"][counter] for each in facts) == 1


def test_failure_is_shared_by_those_who_waited(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD_ERROR", "no way to export")
    processes = [serve(archive, tmp_path, "8") for _ in range(2)]
    facts = [ended(process, archive) for process in processes]
    assert len(begun(tmp_path)) == 1
    for each in facts:
        stays_eager(each, "aot_inductor: BuildError: no way to export")
    assert sorted(each["counters"]["background_build"] for each in facts) == [0, 1]


def test_waiter_takes_over_when_the_server_that_builds_dies_and_the_child_dies_with_it(
    archive: Path, tmp_path: Path
) -> None:
    holder = serve(archive, tmp_path, "600")
    while not begun(tmp_path):
        assert holder.poll() is None
        time.sleep(0.02)
    waiter = serve(archive, tmp_path, "0")
    holder.kill()
    holder.communicate()
    facts = ended(waiter, archive)
    assert facts["result"] == "swapped"
    orphan, builder = begun(tmp_path)
    assert orphan != builder
    wait_for_end(orphan)


def test_leaving_the_interpreter_ends_the_child(archive: Path, tmp_path: Path) -> None:
    leave = "while not begun(): time.sleep(0.02)\n    sys.exit()"
    code = SERVE.replace("model.background.wait()", leave)
    code = "    import os, time\n    begun = lambda: os.path.exists(log) and os.path.getsize(log)\n" + code
    code = "    log = " + repr(str(tmp_path / "builds")) + "\n" + code
    finish(serve(archive, tmp_path, "600", code))
    (child,) = begun(tmp_path)
    wait_for_end(child)
    # It was asked to end, and said so: the crash guard does not count this against the build.
    (marker,) = (tmp_path / "store" / "guards").iterdir()
    assert "file_backend.py" in marker.read_text().partition("\n")[2]


def test_build_process_is_a_module_of_the_package() -> None:
    """Without a specification it ends with an error instead of waiting."""
    command = [sys.executable, "-m", "ts_handlers.startup.build_child"]
    result = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode != 0
    assert result.stdout == ""
