"""Calls of a model whose inputs nobody has declared are noted, and after enough of them a child process builds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Register
from tests.support import file_backend
from tests.support.background_builds import CHILD_SITE, begun
from tests.support.models import archive_source, eager_model, settings_of
from ts_handlers import CompiledModel, start_model
from ts_handlers.backends import get_backend
from ts_handlers.model.declaration import Declaration
from ts_handlers.model.observed_calls import ObservedCalls
from ts_handlers.startup.address import key_in_store
from ts_handlers.startup.fallback import start_here
from ts_handlers.startup.observation import identity_of, told_by_calls
from ts_handlers.startup.target import new_target
from ts_handlers.store.local.layout import OBSERVED
from ts_handlers.store.local.store import LocalStore

pytestmark = pytest.mark.processes
Start = Callable[..., CompiledModel]


@pytest.fixture(autouse=True)
def _cheap_backends(monkeypatch: pytest.MonkeyPatch, register: Register, tmp_path: Path) -> None:
    register("aot_inductor", "tests.support.file_backend:BACKEND")
    monkeypatch.setattr(file_backend, "BACKEND", file_backend.FileBackend())
    monkeypatch.syspath_prepend(str(CHILD_SITE))
    monkeypatch.setenv("BUILD_LOG", str(tmp_path / "builds"))


@pytest.fixture
def start(archive: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the archive's model without inputs."""
    models: list[CompiledModel] = []

    def run(**changes: Any) -> CompiledModel:
        section = {"store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"], "background": {"nice": 0}}
        settings = settings_of({**section, "observe": {"calls": 4, "seconds": None}, **changes})
        models.append(start_model(archive_source(archive), settings))  # type: ignore[arg-type]
        return models[-1]

    yield run
    for model in models:
        close(model)


def close(model: CompiledModel) -> None:
    """Write what was noted, and build nothing more."""
    if model._observer is not None:
        model._observer.close()  # type: ignore[attr-defined]
    if model.background is not None:
        model.background.close()


def call(model: CompiledModel, archive: Path, rows: int) -> None:
    """One call, whose answer is the eager model's."""
    tensor = torch.randn(rows, 4)
    with torch.inference_mode():
        assert torch.allclose(model(tensor), eager_model(archive)(tensor), atol=1e-5)


def wait_for(model: CompiledModel, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What the model says of itself, once that is so."""
    while not condition(facts := model.describe()):
        time.sleep(0.02)
    return facts


def is_settled(facts: dict[str, Any]) -> bool:
    """Whether a build has ended, and the observation has said what came of it."""
    return facts["background"] is not None and facts["observed"]["state"] != "building"


def record(model: CompiledModel, tmp_path: Path) -> tuple[ObservedCalls, Declaration | None]:
    identity = identity_of(model._target)
    assert identity is not None
    store = LocalStore(tmp_path / "store")
    found = store.read_calls(identity)
    return ObservedCalls() if found is None else found.calls, store.read_declaration(identity)


def test_built_after_the_declared_number_of_calls_and_the_next_start_is_a_hit(
    start: Start, archive: Path, tmp_path: Path
) -> None:
    model = start()
    first = model.describe()
    assert (first["backend"], first["result"]) == ("eager", "eager")
    assert first["observed"] == {"state": "noting", "calls": 0, "reason": None}
    for rows in (1, 2, 2):
        call(model, archive, rows)
    assert begun(tmp_path) == []
    call(model, archive, 2)
    facts = wait_for(model, is_settled)
    assert facts["background"]["state"] == "swapped", facts
    assert (facts["backend"], facts["result"]) == ("aot_inductor", "swapped")
    assert len(begun(tmp_path)) == 1
    for rows in (1, 2, 16):
        call(model, archive, rows)
    assert model.metrics.counters["outside_eager"] == 0
    calls, declaration = record(model, tmp_path)
    assert calls.count == 4
    assert declaration is not None
    assert declaration.warmup == ({"batch": 2}, {"batch": 1})
    again = start()
    facts = again.describe()
    assert (facts["result"], facts["backend"], facts["key"]) == ("hit", "aot_inductor", model.outcome.key)
    assert (facts["counters"]["build"], facts["counters"]["background_build"]) == (0, 0)
    assert again.outcome.canary is not None
    call(again, archive, 3)
    assert len(begun(tmp_path)) == 1


def test_counts_of_earlier_processes_count(start: Start, archive: Path, tmp_path: Path) -> None:
    model = start()
    for rows in (1, 2, 3):
        call(model, archive, rows)
    close(model)
    again = start()
    assert again.describe()["observed"]["calls"] == 3
    call(again, archive, 1)
    assert wait_for(again, is_settled)["background"]["state"] == "swapped"


def test_seconds_after_the_first_call_are_enough(start: Start, archive: Path, tmp_path: Path) -> None:
    model = start(observe={"calls": None, "seconds": 0.05})
    call(model, archive, 2)
    facts = wait_for(model, is_settled)
    assert facts["background"]["state"] == "swapped"
    _, declaration = record(model, tmp_path)
    assert declaration is not None
    assert declaration.inputs[0].shape == (2, 4)  # nothing was seen to vary
    call(model, archive, 3)
    assert model.metrics.counters["outside_eager"] == 1


def test_calls_outside_widen_the_next_build(start: Start, archive: Path, tmp_path: Path) -> None:
    model = start()
    for _ in range(4):
        call(model, archive, 2)
    wait_for(model, is_settled)
    again = start()
    assert again.outcome.result == "hit"
    for rows in (2, 2, 2, 2, 2, 2):
        call(again, archive, rows)
    assert again.describe()["observed"]["calls"] == 0
    for rows in (3, 5, 3, 3):
        call(again, archive, rows)
    facts = wait_for(again, is_settled)
    assert facts["background"]["state"] == "swapped", facts
    before = again.metrics.counters["outside_eager"]
    for rows in (1, 2, 5, 7):
        call(again, archive, rows)
    assert again.metrics.counters["outside_eager"] == before == 4
    third = start()
    assert (third.outcome.result, third.outcome.key) == ("hit", again.outcome.key)
    assert third.signature.dimensions["batch"].max == 16
    assert len(begun(tmp_path)) == 2


def test_switched_off_nothing_is_noted(start: Start, archive: Path, tmp_path: Path) -> None:
    model = start(observe=False)
    for _ in range(6):
        call(model, archive, 2)
    assert model.describe()["observed"] is None
    assert not (tmp_path / "store" / OBSERVED).exists()


def test_without_limits_calls_are_noted_and_nothing_is_built(start: Start, archive: Path, tmp_path: Path) -> None:
    model = start(observe={"calls": None, "seconds": None})
    for _ in range(6):
        call(model, archive, 2)
    close(model)
    assert record(model, tmp_path)[0].count == 6
    assert begun(tmp_path) == []


def test_contents_of_calls_are_nowhere_in_the_store(start: Start, archive: Path, tmp_path: Path) -> None:
    marker = 1234567.0
    model = start()
    with torch.inference_mode():
        for rows in (1, 2, 3, 4):
            model(torch.full((rows, 4), marker))
            model(x=torch.full((rows, 4), marker))
    facts = wait_for(model, is_settled)
    assert facts["background"]["state"] == "swapped"
    close(model)
    needles = [torch.full((2,), marker).numpy().tobytes(), str(marker).encode(), b"1234567"]
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert any(OBSERVED in path.parts for path in files)
    found = [path for path in files for needle in needles if needle in path.read_bytes()]
    assert found == []


def test_a_model_that_its_handler_has_changed_is_not_built(
    start: Start, archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = start()
    with torch.no_grad():
        model.layer.weight.mul_(2)
    tensor = torch.randn(2, 4)
    with torch.inference_mode():
        wanted = 2 * eager_model(archive)(tensor) - eager_model(archive).layer.bias
        for _ in range(4):
            assert torch.allclose(model(tensor), wanted, atol=1e-5)
    facts = wait_for(model, lambda facts: facts["observed"]["state"] == "off")
    assert "the model has changed since its start (layer.weight)" in facts["observed"]["reason"]
    assert "the model has changed" in caplog.text
    with torch.inference_mode():
        assert torch.allclose(model(tensor), wanted, atol=1e-5)
    assert record(model, tmp_path)[1] is None
    assert begun(tmp_path) == []
    assert start().outcome.result == "eager"


def test_a_failed_build_leaves_eager_and_says_why(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_ERROR", "no such luck")
    model = start()
    for _ in range(4):
        call(model, archive, 2)
    facts = wait_for(model, lambda facts: facts["observed"]["state"] == "off")
    assert "no such luck" in facts["observed"]["reason"]
    assert facts["backend"] == "eager"
    call(model, archive, 2)
    assert record(model, tmp_path)[1] is None


def test_an_entry_that_is_gone_is_built_again_beside_the_eager_model(
    start: Start, archive: Path, tmp_path: Path
) -> None:
    model = start()
    for _ in range(4):
        call(model, archive, 2)
    wait_for(model, is_settled)
    shutil.rmtree(tmp_path / "store" / "entries")
    again = start()
    assert (again.outcome.backend, again.outcome.result) == ("eager", "background")
    assert again.background is not None
    assert again.background.wait(120)
    assert again.outcome.result == "swapped"
    assert start().outcome.result == "hit"


def test_calls_that_cannot_be_compiled_are_told(start: Start, archive: Path) -> None:
    model = start()
    module = model._eager_module()
    module.forward = lambda x, flag=None: torch.zeros(1)  # type: ignore[method-assign]
    for _ in range(5):
        model(torch.zeros(1, 4), flag=True)
    facts = wait_for(model, lambda facts: facts["observed"]["reason"] is not None)
    assert "flag: bool" in facts["observed"]["reason"]


def test_a_damaged_record_is_as_good_as_none(start: Start, archive: Path, tmp_path: Path) -> None:
    model = start()
    for _ in range(4):
        call(model, archive, 2)
    wait_for(model, is_settled)
    (path,) = (tmp_path / "store" / OBSERVED).rglob("declaration")
    path.write_bytes(b"damaged")
    again = start()
    assert (again.outcome.backend, again.outcome.result) == ("eager", "eager")
    call(again, archive, 2)
    assert wait_for(again, is_settled)["background"]["state"] == "swapped"  # the calls are known
    assert start().outcome.result == "hit"


def test_a_machine_without_room_for_a_second_copy_is_left_alone(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ts_handlers.startup.observation.available_memory", lambda: 1 << 20)
    model = start()
    for _ in range(4):
        call(model, archive, 2)
    facts = wait_for(model, lambda facts: facts["observed"]["state"] == "off")
    assert "1 are free; build with `ts-handlers prewarm`" in facts["observed"]["reason"]
    assert begun(tmp_path) == []


def test_backends_that_find_no_limits_of_indices_are_not_used_unasked(
    start: Start, archive: Path, tmp_path: Path
) -> None:
    module_file = archive / "model.py"
    module_file.write_text(module_file.read_text().replace("self.layer(x)", "self.layer(x.float())"))
    model = start(backends=["inductor", "eager"])
    for rows in (1, 2, 3, 4):
        model(torch.ones(rows, 4, dtype=torch.int64))
    facts = wait_for(model, lambda facts: facts["observed"]["state"] == "off")
    assert "inputs may be indices, whose limits the backends inductor, eager do not find" in facts["observed"]["reason"]
    assert begun(tmp_path) == []


def test_ahead_of_a_start_the_same_is_built(start: Start, archive: Path, tmp_path: Path) -> None:
    """As `prewarm` and `explain` do, which know no more than the record."""
    model = start()
    for _ in range(4):
        call(model, archive, 2)
    wait_for(model, is_settled)
    settings = settings_of({"store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"]})
    target = told_by_calls(new_target(archive_source(archive), settings, "cpu"), LocalStore(tmp_path / "store"))
    assert key_in_store(get_backend("aot_inductor"), target, LocalStore(tmp_path / "store")).digest == model.outcome.key
    assert start_here(archive_source(archive), settings).outcome.result == "hit"


def test_workers_that_see_enough_at_once_build_once(start: Start, archive: Path, tmp_path: Path) -> None:
    models = [start(), start()]
    for rows in (1, 2, 2, 3):
        for model in models:
            call(model, archive, rows)
    facts = [wait_for(model, is_settled) for model in models]
    assert [each["background"]["state"] for each in facts] == ["swapped", "swapped"]
    assert len({model.outcome.key for model in models}) == 1
    assert len(begun(tmp_path)) == 1
    for model in models:
        call(model, archive, 5)
        assert model.metrics.counters["outside_eager"] == 0


def test_a_change_of_a_model_that_calls_have_told_makes_it_eager_again(
    start: Start, archive: Path, tmp_path: Path
) -> None:
    model = start()
    for rows in (1, 2, 2, 2):
        call(model, archive, rows)
    wait_for(model, is_settled)
    tensor = torch.randn(2, 4)
    state = {"layer.weight": torch.ones(3, 4), "layer.bias": torch.zeros(3)}
    for each in (model, start()):
        assert each.outcome.backend == "aot_inductor"
        assert hasattr(each, "load_state_dict")  # looking changes nothing
        assert each.outcome.backend == "aot_inductor"
        each.load_state_dict(state)
        assert each.outcome.backend == "eager"
        assert torch.allclose(each(tensor), tensor.sum(1, keepdim=True).expand(2, 3), atol=1e-5)
        each.layer = torch.nn.Linear(4, 1)
        assert each(tensor).shape == (2, 1)
        assert "the handler changes the model" in each.describe()["observed"]["reason"]
    assert start().outcome.backend == "aot_inductor"


def test_a_change_while_it_is_built_keeps_it_eager(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD_UNTIL", str(tmp_path / "changed"))
    model = start()
    for _ in range(4):
        call(model, archive, 2)
    wait_for(model, lambda facts: len(begun(tmp_path)) == 1)
    model.double()
    (tmp_path / "changed").touch()
    facts = wait_for(model, lambda facts: facts["background"]["state"] == "failed")
    assert "the model has changed since its start" in facts["background"]["reason"]
    assert model(torch.zeros(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert record(model, tmp_path)[1] is None


def test_a_change_while_the_artifact_is_loaded_keeps_it_eager(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = start()
    load = file_backend.BACKEND.load

    def changing(*arguments: Any) -> Any:
        model.double()
        return load(*arguments)

    monkeypatch.setattr(file_backend.BACKEND, "load", changing)
    for _ in range(4):
        call(model, archive, 2)
    wait_for(model, lambda facts: facts["background"] is not None and facts["background"]["state"] == "failed")
    assert model(torch.zeros(2, 4, dtype=torch.float64)).dtype == torch.float64
