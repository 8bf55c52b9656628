"""The import budget: what a worker does not need is not imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.file_backend import START
from tests.support.import_budget import beyond_budget
from tests.support.models import archive_source, settings_of
from tests.support.subprocesses import run_python
from ts_handlers import start_model

pytestmark = pytest.mark.processes


def imported(code: str) -> set[str]:
    return set(json.loads(run_python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))", fresh=True)))


def test_the_package_alone_imports_neither_torch_nor_torchserve() -> None:
    modules = imported("import ts_handlers")
    assert not modules & {"torch", "ts", "msgspec", "filelock"}


def test_everything_but_the_handler_works_without_torchserve() -> None:
    code = "import sys; sys.modules['ts'] = None\nfrom ts_handlers import start_model, ArchiveSource, parse_settings"
    assert not beyond_budget(imported(code))


def test_the_handler_imports_no_compiler() -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    assert not beyond_budget(imported("from ts_handlers import CompiledHandler"))


def test_a_worker_does_not_walk_torchs_objects_again() -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    code = """
    import gc, torch
    before = len(gc.get_objects())
    from ts_handlers import CompiledHandler
    print(gc.get_freeze_count() > 0.99 * before > 100_000)  # the collector may take a few of them before
    """
    assert run_python(code, fresh=True).split()[-1] == "True"


@pytest.mark.usefixtures("backend")
def test_a_hit_imports_nothing_that_only_builds_need(archive: Path, tmp_path: Path) -> None:
    """tests/backends/test_aot_inductor.py looks at a hit of a real artifact."""
    store = tmp_path / "store"
    start_model(archive_source(archive), settings_of(store=str(store), backends=["aot_inductor"]))
    ends = 'print(json.dumps({"result": model.outcome.result, "modules": sorted(sys.modules)}))'
    facts = json.loads(run_python(f"{START}    {ends}", archive, store, fresh=True).splitlines()[-1])
    assert facts["result"] == "hit"
    assert not beyond_budget(facts["modules"])


def test_unknown_name_is_an_attribute_error() -> None:
    import ts_handlers

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ts_handlers.nothing
    assert all(hasattr(ts_handlers, name) for name in ("InputError", "Settings", "start_model"))
