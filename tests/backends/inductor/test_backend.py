"""The `torch.compile` backend on a model that cannot be exported: a warm start compiles nothing, requests neither."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import GRAPH_BREAK, archive_source, settings_of, write_archive, write_weights
from tests.support.subprocesses import run_python
from ts_handlers import start_model
from ts_handlers.errors import MissError

pytestmark = pytest.mark.compile

SECTION: dict[str, Any] = {
    "inputs": [
        {"name": "x", "dtype": "float32", "shape": ["batch", 4]},
        {"name": "factor", "dtype": "float32", "shape": [8]},
    ],
    "dimensions": {"batch": {"min": 1, "max": 12}},
    "backends": ["inductor"],
    "warmup": [{"batch": 5}],
    "strict": True,
}
START = """
    import json, sys
    import torch
    from tests.support.models import archive_source, eager_model, settings_of
    from ts_handlers import InputError, start_model
    import ts_handlers.backends.inductor.backend as inductor
    from ts_handlers.metrics import compiled_graphs

    compiles_nothing = inductor.compiles_nothing
    def strict(after_warmup=True):  # a request that misses a guard fails here, instead of running eagerly
        return torch.compiler.set_stance("fail_on_recompile") if after_warmup else compiles_nothing(after_warmup)
    inductor.compiles_nothing = strict

    settings = settings_of(json.loads(sys.argv[3]), store=sys.argv[2])
    children = []
    sys.addaudithook(lambda event, a: children.append(list(a[1][1:])) if event == "subprocess.Popen" else None)
    model = start_model(archive_source(sys.argv[1]), settings)
    facts = {**model.describe(), "children": children}
    eager = eager_model(__import__("pathlib").Path(sys.argv[1]))
    before = compiled_graphs()
    wrong = []
    for batch in range(1, 13):
        for layout in ("plain", "transposed"):
            x = torch.randn(batch, 4) if layout == "plain" else torch.randn(4, batch).t()
            with torch.inference_mode(layout == "plain"):
                factor = torch.rand(8)
                found = model(x, factor=factor)
            with torch.inference_mode():
                expected = eager(x, factor=factor)
            if not torch.allclose(found, expected, atol=1e-5):
                wrong.append((batch, layout))
    refused = 0
    for batch in (0, 13):
        try:
            model(torch.randn(batch, 4), torch.rand(8))
        except InputError:
            refused += 1
    late = compiled_graphs() - before
    from torch._inductor.codegen.common import KernelTemplate
    from torch._inductor.select_algorithm import TritonTemplate
    templates = [template.template for template in TritonTemplate.all_templates.values()]
    facts["parsed"] = sum(type(template).__module__.startswith("jinja2") for template in templates)
    facts["templates"] = len(templates)
    facts["usable"] = all(callable(template.render) for template in templates)
    facts["parses"] = "jinja2" in type(KernelTemplate._template_from_string("{{ 1 }}")).__module__
    print(json.dumps({**facts, "late": late, "wrong": wrong, "refused": refused}))
"""


@dataclasses.dataclass(frozen=True)
class Built:
    """The entry of the session."""

    archive: Path
    store: Path
    facts: dict[str, Any]


def start(archive: Path, store: Path, host: Path) -> dict[str, Any]:
    """Start as on another host: temporary and home folder are empty."""
    host.mkdir()
    out = run_python(START, archive, store, json.dumps(SECTION), TMPDIR=str(host), HOME=str(host))
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build once, in a process of its own."""
    folder = tmp_path_factory.mktemp("inductor")
    archive = write_archive(folder / "archive", GRAPH_BREAK)
    return Built(archive, folder / "store", start(archive, folder / "store", folder / "host"))


def test_first_start_compiles_two_graphs_and_no_request_compiles_more(built: Built) -> None:
    assert built.facts["result"] == "built"
    assert built.facts["counters"]["build"] == 1
    assert built.facts["artifact"]["fxgraph_cache_miss"] >= 2
    assert (built.facts["late"], built.facts["wrong"], built.facts["refused"]) == (0, [], 2)


def test_entry_holds_no_scratch_files(built: Built) -> None:
    files = [path for path in (built.store / "entries").rglob("*") if path.is_file()]
    assert any(path.suffix == ".so" for path in files)
    assert not [path for path in files if path.suffix in (".lock", ".gch", ".pch", ".tmp")]


def test_warm_start_on_another_host_compiles_nothing(built: Built, tmp_path: Path) -> None:
    facts = start(built.archive, built.store, tmp_path / "host")
    assert facts["result"] == "hit"
    assert facts["artifact"]["fxgraph_cache_miss"] == 0
    assert facts["artifact"]["fxgraph_cache_hit"] >= 2
    assert facts["canary"]["source"] == "record"
    assert (facts["late"], facts["wrong"], facts["refused"]) == (0, [], 2)
    questions = [["--version"], ["-v"]]  # to the C++ compiler, whose version is a part of the keys
    assert [child for child in facts["children"] if child not in questions] == []
    assert [child for child in built.facts["children"] if child not in questions]
    assert list((tmp_path / "host").glob("ts_handlers-work-*")) == []
    # Templates of the autotuner: parsed by the build, left alone by the hit, there when they are needed.
    assert built.facts["parsed"] == facts["templates"] > 0
    assert (facts["parsed"], facts["usable"], facts["parses"]) == (0, True, True)


def test_new_weights_hit_the_same_entry(built: Built, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", GRAPH_BREAK)
    write_weights(archive, 77)
    facts = start(archive, built.store, tmp_path / "host")
    assert (facts["result"], facts["key"]) == ("hit", built.facts["key"])
    assert facts["artifact"]["fxgraph_cache_miss"] == 0
    assert facts["canary"]["source"] == "eager"
    assert facts["wrong"] == []


def test_other_arguments_of_torch_compile_miss(built: Built) -> None:
    from ts_handlers import parse_settings

    section = {**SECTION, "store": str(built.store), "on_miss": "fail"}
    for arguments in ({"mode": "max-autotune"}, {"options": {"max_autotune": True}}, {"fullgraph": True}):
        settings = parse_settings({"handler": {"ts_handlers": section}, "pt2": {"compile": arguments}})
        with pytest.raises(MissError, match="missed: options"):
            start_model(archive_source(built.archive), settings)
    with pytest.raises(MissError, match="missed: options"):
        start_model(archive_source(built.archive), settings_of({**section, "warmup": [{"batch": 7}]}))


def test_damaged_entry_is_never_loaded(built: Built, tmp_path: Path) -> None:
    import shutil

    store = Path(shutil.copytree(built.store, tmp_path / "store"))
    library = next((store / "entries").rglob("*.so"))
    data = bytearray(library.read_bytes())
    data[-1] ^= 1
    library.write_bytes(data)
    with pytest.raises(MissError, match="missed: corrupt"):
        start_model(archive_source(built.archive), settings_of({**SECTION, "store": str(store), "on_miss": "fail"}))
    assert len(list((store / "trash").iterdir())) == 1


def test_working_directories_of_dead_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    from ts_handlers.backends.working_directory import make_working_directory

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, foreign = tmp_path / "ts_handlers-work-dead", tmp_path / "other"
    for path in (dead, foreign):
        path.mkdir()
    first = make_working_directory()
    second = make_working_directory()
    assert first.is_dir()
    assert second.is_dir()
    assert not dead.exists()
    assert foreign.is_dir()


def test_environment_is_restored_after_a_private_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from ts_handlers.backends.working_directory import private_cache

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/before")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with private_cache() as directory:
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(directory)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/before"
    assert "TRITON_CACHE_DIR" not in os.environ
    assert not directory.exists()
