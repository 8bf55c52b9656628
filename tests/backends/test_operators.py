"""Models with operators of their own: an artifact that calls them loads in a process that has not built the model."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch

from tests.support.models import archive_source, settings_of, write_archive
from tests.support.subprocesses import run_python
from ts_handlers import start_model

pytestmark = [pytest.mark.compile, pytest.mark.processes]

DEFINED = """
import torch


@torch.library.custom_op("ts_handlers_tests_{name}::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return torch.empty_like(x)
"""
MODEL = """

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        {construct}

    def forward(self, x):
        operators = torch.ops.ts_handlers_tests_{name}
        return self.layer(operators.double(x) if hasattr(operators, "double") else x * 2)
"""
START = """
    import json, sys, torch
    from tests.support.models import archive_source, eager_model, settings_of
    from ts_handlers import start_model
    archive, store = sys.argv[1:]
    changes = {"backends": ["aot_inductor", "eager"]}
    model = start_model(archive_source(archive), settings_of(store=store, **changes))
    x = torch.ones(2, 4)
    answer = model(x)
    with torch.inference_mode():
        right = torch.allclose(answer, eager_model(__import__("pathlib").Path(archive))(x), atol=1e-5)
    print(json.dumps({**model.describe(), "right": right}))
"""


def start(archive: Path, store: Path, **env: str) -> dict[str, object]:
    facts: dict[str, object] = json.loads(run_python(START, archive, store, **env).splitlines()[-1])
    return facts


def test_operators_of_the_models_file_are_there_on_a_hit(tmp_path: Path) -> None:
    code = (DEFINED + MODEL).format(name="own", construct="pass")
    archive, store = write_archive(tmp_path / "archive", code), tmp_path / "store"
    for result in ("built", "hit", "hit"):
        facts = start(archive, store)
        (manifest,) = (store / "entries").rglob("manifest.json")
        assert json.loads(manifest.read_text())["artifact"]["operators"] == {"module": None}
        assert (facts["backend"], facts["result"], facts["right"]) == ("aot_inductor", result, True)
    assert not list((store / "trash").glob("*"))


def test_operators_that_the_constructor_registers_are_a_reason_not_to_export(tmp_path: Path) -> None:
    construct = "exec(DEFINED, {})"
    code = (f"import torch\nDEFINED = {DEFINED.format(name='late')!r}\n" + MODEL).format(
        name="late", construct=construct
    )
    archive = write_archive(tmp_path / "archive", code)
    model = start_model(
        archive_source(archive), settings_of(store=str(tmp_path / "store"), backends=["aot_inductor", "eager"])
    )
    assert model.outcome.backend == "eager"
    assert "calls the operator ts_handlers_tests_late::double" in model.outcome.fallbacks[0]["reason"]
    assert not list((tmp_path / "store" / "entries").rglob("manifest.json"))


def test_entry_stays_where_what_registers_its_operators_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host that lacks the library: the next backend serves, and the good entry is left for others."""
    library = tmp_path / "path" / "ts_handlers_tests_library.py"
    library.parent.mkdir()
    monkeypatch.syspath_prepend(str(library.parent))
    flag = tmp_path / "registers"  # nothing that the key sees
    registers = f"import os\nif os.path.exists({str(flag)!r}):\n"
    library.write_text(registers + textwrap.indent(DEFINED.format(name="library"), "    "))
    importing = "import ts_handlers_tests_library\nimport torch\n"
    code = importing + MODEL.format(name="library", construct="pass")
    archive, store = write_archive(tmp_path / "archive", code), tmp_path / "store"
    path = {"PYTHONPATH": f"{library.parent}:{Path(__file__).parents[2]}"}
    flag.touch()
    assert start(archive, store, **path)["result"] == "built"
    flag.unlink()
    for _ in range(2):
        facts = json.loads(run_python(MISSING, archive, store, **path).splitlines()[-1])
        assert facts["backend"] == "eager"
        assert "which the module ts_handlers_tests_library does not register here" in facts["fallbacks"][0]["reason"]
        assert {name: n for name, n in facts["counters"].items() if n} == {"fallback": 1}
    assert not list((store / "trash").glob("*"))
    flag.touch()
    assert start(archive, store, **path)["result"] == "hit"


MISSING = START.partition("    x = torch.ones")[0] + "    print(json.dumps(model.describe()))\n"


def test_a_model_file_is_executed_once(tmp_path: Path) -> None:
    code = (DEFINED + MODEL).format(name="once", construct="pass")
    archive = write_archive(tmp_path / "archive", code)
    source = archive_source(archive)
    kind = type(source.eager())
    source.release()
    source.prepare()
    assert type(source.eager()) is kind is type(archive_source(archive).eager())
    with (archive / "model.py").open("a") as file:
        file.write("\nNEW = 1\n")
    assert type(archive_source(archive).eager()) is not kind
    assert torch.equal(archive_source(archive).eager()(torch.zeros(1, 4)), source.eager()(torch.zeros(1, 4)))
