"""Start-up: lookup, build, canary and the fallback ladder, with a backend that needs no compiler."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import file_backend
from tests.support.marks import needs_root
from tests.support.models import LINEAR, archive_source, eager_model, settings_of, write_archive, write_weights
from ts_handlers import CompiledModel, ModuleSource, Settings, start_model
from ts_handlers.errors import (
    BuildError,
    CanaryError,
    InputError,
    LoadError,
    MissError,
    ModelError,
    QuarantinedError,
    SettingsError,
    StoreError,
)
from ts_handlers.guard.quarantine import lift_quarantine, read_quarantines
from ts_handlers.store.base import Miss
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.upkeep.space import wait_for_room

pytestmark = pytest.mark.usefixtures("backend")

ROWS = torch.arange(8.0).reshape(2, 4)


@pytest.fixture
def start(archive: Path, tmp_path: Path) -> Callable[..., CompiledModel]:
    def run(directory: Path = archive, **changes: Any) -> CompiledModel:
        section = {"store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"], **changes}
        return start_model(archive_source(directory), settings_of(**section))

    return run


def check(model: CompiledModel, archive: Path) -> dict[str, Any]:
    """The model answers as the eager one does; returns what it says about itself."""
    with torch.inference_mode():
        assert torch.allclose(model(ROWS), eager_model(archive)(ROWS), atol=1e-5)
    facts = model.describe()
    json.dumps(facts)
    return facts


def counters(facts: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in facts["counters"].items() if count}


Start = Callable[..., CompiledModel]


def test_first_start_builds_and_second_one_hits(start: Start, archive: Path) -> None:
    first = check(start(), archive)
    assert (first["result"], first["backend"], first["missed"]) == ("built", "aot_inductor", ())
    assert counters(first) == {"miss": 1, "build": 1, "canary_recorded": 1}
    assert first["canary"]["source"] == "eager"
    second = check(start(), archive)
    assert (second["result"], second["key"]) == ("hit", first["key"])
    assert counters(second) == {"hit": 1}
    assert second["canary"]["source"] == "record"


def test_hit_does_not_build_the_eager_model(start: Start, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    monkeypatch.setattr("ts_handlers.model.archive.load_model_class", lambda path: pytest.fail("imported"))
    assert start().outcome.result == "hit"


def test_canary_of_a_hit_is_the_first_warmup(start: Start, archive: Path) -> None:
    built = check(start(warmup=[{"batch": 3}, {"batch": 5}]), archive)
    assert built["canary"]["cases"] == [{"batch": 1}, {"batch": 4}, {"batch": 3}]
    assert check(start(warmup=[{"batch": 3}, {"batch": 5}]), archive)["canary"]["cases"] == [{"batch": 3}]


def test_cycle_collector_pauses_while_an_entry_is_loaded(
    start: Start, backend: file_backend.FileBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    seen: list[bool] = []
    load = backend.load

    def watched(*arguments: Any) -> Any:
        seen.append(gc.isenabled())
        return load(*arguments)

    monkeypatch.setattr(backend, "load", watched)
    assert start().outcome.result == "hit"
    assert (seen, gc.isenabled()) == ([False], True)


def test_new_weights_hit_and_are_checked_against_eager_once(start: Start, archive: Path) -> None:
    start()
    write_weights(archive, 7)
    second = check(start(), archive)
    assert counters(second) == {"hit": 1, "canary_recorded": 1}
    assert counters(check(start(), archive)) == {"hit": 1}


def test_recording_a_canary_keeps_their_number_bounded(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ts_handlers.store.upkeep.garbage.CANARIES_PER_KEY", 2)
    for seed in range(4):
        write_weights(archive, seed)
        start()
        wait_for_room()
    (folder,) = (tmp_path / "store" / "canaries").iterdir()
    assert len(list(folder.iterdir())) == 2
    assert counters(check(start(), archive)) == {"hit": 1}


def test_missed_part_is_named(start: Start, archive: Path) -> None:
    start()
    facts = check(start(dimensions={"batch": {"min": 1, "max": 9}}), archive)
    assert facts["missed"] == ("inputs",)
    assert facts["result"] == "built"


def test_damaged_entry_is_rebuilt(start: Start, archive: Path, tmp_path: Path) -> None:
    start()
    (path,) = (tmp_path / "store" / "entries").rglob("second.json")
    path.write_text(path.read_text().replace("bias", "bier"))
    facts = check(start(), archive)
    assert facts["result"] == "built"
    assert counters(facts) == {"miss": 1, "corrupt": 1, "build": 1}
    assert "digest" in facts["notes"][0]
    assert check(start(), archive)["result"] == "hit"


def test_entry_that_does_not_load_is_moved_aside_and_rebuilt(
    start: Start, archive: Path, tmp_path: Path, backend: file_backend.FileBackend
) -> None:
    start()
    backend.load_errors.append(LoadError("undefined symbol"))
    facts = check(start(), archive)
    assert facts["result"] == "built"
    assert "undefined symbol" in facts["notes"][0]
    assert len(list((tmp_path / "store" / "trash").iterdir())) == 1


def test_wrong_answers_are_never_served(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = backend.load

    def wrong(*arguments: Any) -> Any:
        loaded = load(*arguments)
        return dataclasses.replace(loaded, run=lambda tensors: loaded.run(tensors) * 1.01)

    start()
    monkeypatch.setattr(backend, "load", wrong)
    facts = check(start(), archive)
    assert facts["backend"] == "eager"
    assert "CanaryError" in facts["fallbacks"][0]["reason"]
    assert start(canary={"tolerance": 0.1}).outcome.backend == "aot_inductor"
    write_weights(archive, 7)
    with pytest.raises(CanaryError, match=r"relative error 0\.01"):
        start(strict=True)


def count_calls(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backend's methods, as they are called from now on."""
    calls: list[str] = []
    for name in ("build", "load"):
        method = getattr(backend, name)

        def counted(*arguments: Any, name: str = name, method: Any = method) -> Any:
            calls.append(name)
            return method(*arguments)

        monkeypatch.setattr(backend, name, counted)
    return calls


def make_wrong(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts answer wrongly from now on."""
    load = backend.load

    def wrong(*arguments: Any) -> Any:
        loaded = load(*arguments)
        return dataclasses.replace(loaded, run=lambda tensors: loaded.run(tensors) * 1.01)

    monkeypatch.setattr(backend, "load", wrong)


def test_an_entry_that_answers_wrongly_is_tried_once_for_these_weights(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start()
    with monkeypatch.context() as patched:
        make_wrong(backend, patched)
        start()
        calls = count_calls(backend, patched)
        again = check(start(), archive)
    assert calls == []
    assert counters(again) == {"quarantined": 1, "fallback": 1}
    assert "CanaryError: output 0: relative error 0.01" in again["fallbacks"][0]["reason"]
    (record,) = read_quarantines(tmp_path / "store")
    assert (record.phase, record.model, record.key in again["fallbacks"][0]["reason"]) == ("canary", "model", True)
    with pytest.raises(QuarantinedError, match="ts-handlers unquarantine"):
        start(strict=True)
    write_weights(archive, 7)
    assert check(start(), archive)["result"] == "hit"
    write_weights(archive, 0)
    assert check(start(), archive)["backend"] == "eager"
    assert lift_quarantine(tmp_path / "store", record.key) == [record]
    assert check(start(), archive)["result"] == "hit"


def test_a_build_that_answers_wrongly_is_neither_published_nor_repeated(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        make_wrong(backend, patched)
        assert check(start(), archive)["backend"] == "eager"
    assert list((tmp_path / "store").rglob("manifest.json")) == []
    calls = count_calls(backend, monkeypatch)
    again = check(start(), archive)
    assert calls == []
    assert counters(again) == {"miss": 1, "quarantined": 1, "fallback": 1}
    write_weights(archive, 7)
    assert check(start(), archive)["result"] == "built"
    write_weights(archive, 0)
    assert check(start(), archive)["result"] == "hit"


def test_a_quarantined_entry_does_not_make_the_next_miss_final(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    make_wrong(backend, monkeypatch)
    start()
    facts = check(start(on_miss="fail", backends=["aot_inductor", "inductor", "eager"]), archive)
    assert [(fallback["backend"], fallback["reason"][:10]) for fallback in facts["fallbacks"]] == [
        ("aot_inductor", "Quarantine"),
        ("inductor", "MissError:"),
    ]
    assert facts["backend"] == "eager"


def test_a_store_without_a_place_for_markers_is_served_from_and_says_so(
    start: Start, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    shutil.rmtree(tmp_path / "store" / "guards")
    (tmp_path / "store" / "guards").write_text("in the way")
    facts = check(start(), archive)
    assert facts["result"] == "hit"
    assert [note.partition(":")[0] for note in facts["notes"]] == ["no crash guard"]


def test_what_was_built_is_loaded_from_where_it_was_published(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, seen = backend.load, []

    def recorded(request: Any, directory: Path, description: Any) -> Any:
        seen.append("entries" if "entries" in directory.parts else "staging")
        return load(request, directory, description)

    monkeypatch.setattr(backend, "load", recorded)
    start()
    assert seen == ["staging", "entries"]


def test_what_was_checked_is_gone_before_the_published_artifact_loads(
    start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two artifacts at once may not fit into a GPU's memory."""
    load, loaded, alive = backend.load, [], []

    def watched(*arguments: Any) -> Any:
        alive.append(sum(artifact() is not None for artifact in loaded))
        artifact = load(*arguments)
        loaded.append(weakref.ref(artifact.run))
        return artifact

    monkeypatch.setattr(backend, "load", watched)
    start()
    assert alive == [0, 0]


@pytest.mark.parametrize(
    "error", [BuildError("no export"), RuntimeError("compiler\n crashed"), OSError(errno.EIO, "io")]
)
def test_failed_build_falls_to_the_next_backend_with_its_reason(
    error: Exception, start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(backend, "build", fail)
    facts = check(start(), archive)
    assert facts["backend"] == "eager"
    (fallback,) = facts["fallbacks"]
    assert fallback["backend"] == "aot_inductor"
    assert fallback["reason"].startswith(type(error).__name__)
    assert counters(facts)["fallback"] == 1
    assert check(start(backends=["aot_inductor"]), archive)["backend"] == "eager"
    with pytest.raises(type(error)):
        start(strict=True)


def fail_builds(backend: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Builds fail from now on."""

    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(backend, "build", fail)


def test_a_failed_build_is_not_tried_by_the_next_start_and_says_why(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, BuildError("aten::nonsense cannot be exported"))
        assert counters(check(start(), archive)) == {"miss": 1, "build_failed": 1, "fallback": 1}
    calls = count_calls(backend, monkeypatch)
    facts = check(start(), archive)
    assert calls == []
    assert counters(facts) == {"miss": 1, "build_skipped": 1, "fallback": 1}
    (record,) = read_quarantines(tmp_path / "store")
    assert (record.kind, record.phase, record.count) == ("deterministic", "build", 1)
    reason = facts["fallbacks"][0]["reason"]
    for part in (
        "a build failed 0 s ago",
        "aten::nonsense",
        f"unquarantine {record.key[:12]}",
        "tried again in 60 min",
    ):
        assert part in reason
    # Another key is another build; strict, and whoever asks for it, try anew; success removes the record.
    assert start(dimensions={"batch": {"min": 1, "max": 9}}).outcome.result == "built"
    assert start(strict=True).outcome.result == "built"
    assert read_quarantines(tmp_path / "store") == []
    assert start().outcome.result == "hit"


def test_a_lifted_failure_is_tried_again(
    start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, BuildError("no"))
        start()
    (record,) = lift_quarantine(tmp_path / "store", "")
    assert record.reason == "BuildError: no"
    assert start().outcome.result == "built"


def test_strict_tries_what_failed_and_raises_its_own_error(
    start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in (1, 2):
        fail_builds(backend, monkeypatch, BuildError(f"attempt {number}"))
        with pytest.raises(BuildError, match=f"attempt {number}"):
            start(strict=True)
    (record,) = read_quarantines(tmp_path / "store")
    assert (record.reason, record.count) == ("BuildError: attempt 2", 2)


def test_what_was_built_but_does_not_load_is_not_built_again(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise LoadError("undefined symbol")

    monkeypatch.setattr(backend, "load", fail)
    assert counters(check(start(), archive)) == {"miss": 1, "build": 1, "build_failed": 1, "fallback": 1}
    assert counters(check(start(), archive)) == {"miss": 1, "build_skipped": 1, "fallback": 1}


def test_another_compiler_is_another_chance(start: Start, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        fail_builds(backend, patched, RuntimeError("no C++ compiler"))
        start()
    assert start().metrics.counters["build_skipped"] == 1
    monkeypatch.setattr("ts_handlers.guard.failures.compiler_identity", lambda: "g++ 99")
    assert start().outcome.result == "built"


def test_a_hit_reads_no_record_of_a_build(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = start().outcome.key
    wait_for_room()  # the garbage collection of a start that has built reads everything
    (tmp_path / "store" / "quarantine").mkdir(exist_ok=True)
    (tmp_path / "store" / "quarantine" / f"{key}-build-0123456789ab.json").write_text("damaged")
    assert start().outcome.result == "hit"
    assert "cannot be read" not in caplog.text
    shutil.rmtree(tmp_path / "store" / "entries")
    assert start().outcome.result == "built"
    assert "cannot be read" in caplog.text


def test_miss_policies(start: Start, archive: Path) -> None:
    with pytest.raises(MissError, match=r"no entry for model with backend aot_inductor.*on_miss"):
        start(on_miss="fail")
    facts = check(start(on_miss="eager"), archive)
    assert (facts["backend"], counters(facts)) == ("eager", {"miss": 1})
    start()
    for policy in ("fail", "eager"):
        assert start(on_miss=policy).outcome.result == "hit"


def test_mistakes_of_archive_and_settings_are_not_fallen_back_from(start: Start, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="inputs"):
        start_model(archive_source(archive), Settings(backends=("aot_inductor", "eager")))
    (archive / "model.py").write_text("import torch\n")
    with pytest.raises(ModelError, match="exactly one"):
        start()
    with pytest.raises(ModelError, match="exactly one"):
        start(backends=["eager"])


def test_full_disk_serves_what_was_built(start: Start, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise StoreError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "publish", fail)
        facts = check(start(), archive)
    assert facts["backend"] == "aot_inductor"
    assert counters(facts)["publish_failed"] == 1
    assert check(start(), archive)["result"] == "built"


def write_while_building(backend: Any, monkeypatch: pytest.MonkeyPatch, size: int) -> list[str]:
    """Builds leave `size` more bytes in their folder; returns a list that gets the files they found there."""
    build, found = backend.build, []

    def large(target: Any, workspace: Any) -> Any:
        found.append([path.name for path in workspace.directory.iterdir()])
        built = build(target, workspace)
        (workspace.directory / "large").write_bytes(bytes(size))
        return built

    monkeypatch.setattr(backend, "build", large)
    return found


@needs_root
def test_a_disk_that_is_full_while_building_names_folder_space_and_remedy(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    store = small_disk / "store"
    found = write_while_building(backend, monkeypatch, 100_000)
    facts = check(start(store=str(store)), archive)
    assert (facts["backend"], len(found)) == ("eager", 1)
    reason = facts["fallbacks"][0]["reason"]
    assert re.search(rf"the build had \d+ bytes in {store}/staging, \d+ bytes in /", reason), reason
    assert "ts-handlers gc --max-bytes" in reason
    assert "TS_HANDLERS_CACHE" in reason
    (record,) = read_quarantines(store)
    assert (record.kind, "No space left on device" in record.reason) == ("circumstantial", True)
    assert counters(check(start(store=str(store)), archive)) == {"miss": 1, "build_skipped": 1, "fallback": 1}
    assert len(found) == 1


@needs_root
def test_a_build_that_finds_the_disk_full_makes_room_and_goes_on(
    start: Start, archive: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    left = small_disk / "store" / "trash" / "evicted-0"
    left.mkdir(parents=True, mode=0o700)
    (left / "large").write_bytes(bytes(36_000))  # of an eviction that did not finish
    found = write_while_building(backend, monkeypatch, 24_000)
    facts = check(start(store=str(small_disk / "store")), archive)
    assert (facts["backend"], facts["result"]) == ("aot_inductor", "built")
    assert found == [[], []]  # the second attempt began with an empty folder
    assert facts["counters"]["build_failed"] == 0
    assert not left.exists()
    assert check(start(store=str(small_disk / "store")), archive)["result"] == "hit"


def test_unusable_store_is_replaced_by_a_temporary_one_or_strictly_refused(
    start: Start, archive: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    facts = check(start(store=str(tmp_path / "file")), archive)
    assert facts["result"] == "built"
    assert facts["fallbacks"][0]["backend"] == "store"
    with pytest.raises(StoreError):
        start(store=str(tmp_path / "file"), strict=True)


def test_requests_outside_are_refused_or_answered_eagerly(start: Start, archive: Path) -> None:
    model = start()
    with pytest.raises(InputError, match=r"size 9 is outside the declared range 1\.\.8"):
        model(torch.zeros(9, 4))
    assert model.metrics.counters["refused"] == 1
    lenient = start(outside="eager")
    rows = torch.randn(9, 4)
    assert torch.allclose(lenient(x=rows), eager_model(archive)(rows), atol=1e-5)
    assert lenient.metrics.counters["outside_eager"] == 1
    with pytest.raises(InputError, match="missing"):
        lenient()


def test_model_behaves_like_the_eager_one_where_handlers_look(start: Start, archive: Path) -> None:
    model = start()
    assert model.eval() is model
    assert model.to("cpu") is model
    assert model.device == torch.device("cpu")
    assert model.layer.out_features == 3
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute


def test_two_models_of_one_name_do_not_share_entries(start: Start, tmp_path: Path) -> None:
    other = write_archive(tmp_path / "other", LINEAR.replace("self.layer(x)", "self.layer(x.abs())"))
    start()
    # The test backend's artifact is wrong for this model: found out by the canary, after a build of its own.
    facts = check(start(other), other)
    assert counters(facts) == {"miss": 1, "build": 1, "build_failed": 1, "fallback": 1}


def test_module_without_declared_inputs_runs_eagerly() -> None:
    model = start_model(ModuleSource("m", torch.nn.Linear(4, 1)), Settings(backends=("eager",)))
    assert model(ROWS).shape == (2, 1)
    assert model.describe()["result"] == "eager"


def test_a_module_that_cannot_be_keyed_is_served_eagerly(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 1)
    module.options = {}  # type: ignore[assignment]
    module.options["me"] = module.options  # type: ignore[index]
    inputs = [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    section = {"store": str(tmp_path), "inputs": inputs, "dimensions": {"batch": {"min": 1, "max": 8}}}
    model = start_model(ModuleSource("m", module), settings_of(**section, backends=["aot_inductor", "eager"]))
    assert model(ROWS).shape == (2, 1)
    facts = model.describe()
    assert facts["backend"] == "eager"
    assert [(f["backend"], "refers back" in f["reason"]) for f in facts["fallbacks"]] == [("aot_inductor", True)]


def test_an_entry_found_under_the_lease_that_does_not_load_is_built_again(
    start: Callable[..., CompiledModel], archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    lookup, seen = LocalStore.lookup, []

    def missed_once(self: LocalStore, address: Any) -> Any:
        seen.append(address)
        return Miss(()) if len(seen) == 1 else lookup(self, address)

    load, loads = file_backend.FileBackend.load, []

    def failing_once(self: Any, *arguments: Any) -> Any:
        loads.append(arguments)
        if len(loads) == 1:
            raise LoadError("torn")
        return load(self, *arguments)

    monkeypatch.setattr(LocalStore, "lookup", missed_once)
    monkeypatch.setattr(file_backend.FileBackend, "load", failing_once)
    facts = check(start(), archive)
    assert (facts["result"], counters(facts)["build"], counters(facts)["corrupt"]) == ("built", 1, 1)
