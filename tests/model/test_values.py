"""Values that a model must not see are refused before they reach it, whatever serves and whatever its entry says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.file_backend import FileBackend
from tests.support.models import archive_source, settings_of, write_archive
from tests.support.subprocesses import run_python
from ts_handlers import CompiledModel, start_model
from ts_handlers.errors import InputError

Start = Callable[..., CompiledModel]
LIMITED = [{"name": "x", "dtype": "float32", "shape": ["batch", 4], "limits": [-1, 1]}]


@pytest.fixture
def start(archive: Path, tmp_path: Path) -> Start:
    def run(**changes: Any) -> CompiledModel:
        section = {"store": str(tmp_path / "store"), "backends": ["aot_inductor", "eager"], **changes}
        return start_model(archive_source(archive), settings_of(**section))

    return run


def refused(model: CompiledModel) -> str:
    """What is said to values outside; those inside are answered."""
    before = model.metrics.counters["refused"]
    assert model(torch.full((2, 4), 0.5)).shape == (2, 3)
    with pytest.raises(InputError) as error:
        model(torch.tensor([[0.0, 0.5, 1.0, 0.0]]))
    for value in (-1.5, float("nan")):
        with pytest.raises(InputError, match="limits"):
            model(x=torch.full((2, 4), value))
    assert model.metrics.counters["refused"] == before + 3
    return str(error.value)


@pytest.mark.parametrize("outside", ["refuse", "eager"])
@pytest.mark.parametrize("backends", [["aot_inductor"], ["eager"]])
def test_every_backend_refuses(start: Start, backend: FileBackend, backends: list[str], outside: str) -> None:
    for _ in range(2):
        model = start(inputs=LIMITED, backends=backends, outside=outside)
        assert "input 'x': expected values inside its limits [-1, 1), found 1.0;" in refused(model)
    assert model.outcome.result == ("eager" if backends == ["eager"] else "hit")


def test_limits_are_those_of_the_settings_at_hand(start: Start, backend: FileBackend) -> None:
    """They are not in the key: an entry is found whose builder knew of none, and it is checked with others."""
    built = start(backends=["aot_inductor"])
    assert built(torch.full((1, 4), 5.0)).shape == (1, 3)
    for limits, text in (([-1, 1], "[-1, 1)"), ([-0.75, 0.75], "[-0.75, 0.75)")):
        model = start(inputs=[{**LIMITED[0], "limits": limits}], backends=["aot_inductor"], on_miss="fail")
        assert (model.outcome.result, model.outcome.key) == ("hit", built.outcome.key)
        assert text in refused(model)
    assert start(on_miss="fail")(torch.full((1, 4), 5.0)).shape == (1, 3)


def test_a_signature_that_an_entry_brings_gets_the_limits(
    start: Start, backend: FileBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `aot_inductor` makes its own from the manifest."""
    load, ran = backend.load, []

    def with_own_signature(*arguments: Any) -> Any:
        from ts_handlers.model.signature import Signature

        loaded = load(*arguments)
        plain = settings_of()
        return dataclasses.replace(
            loaded,
            signature=Signature(plain.inputs, plain.dimensions),
            run=lambda tensors: (ran.append(tensors[0]), loaded.run(tensors))[1],
        )

    monkeypatch.setattr(backend, "load", with_own_signature)
    model = start(inputs=LIMITED, backends=["aot_inductor"], warmup=[{"batch": 3}])
    assert "[-1, 1)" in refused(model)
    assert len(ran) >= 3  # canary and warm-up, and the answer above
    assert all(bool((tensor >= -1).all() and (tensor < 1).all()) for tensor in ran)


TOKENS = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(30, 64)

    def forward(self, ids):
        return self.words(ids).sum(1)
"""
SECTION: dict[str, Any] = {
    "backends": ["aot_inductor"],
    "strict": True,
    "inputs": [{"name": "ids", "dtype": "int64", "shape": ["batch", 128], "limits": [3, 30]}],
    "dimensions": {"batch": {"min": 1, "max": 4}},
}
CALL = """
import json, sys
import torch
from tests.support.models import archive_source, settings_of
from pathlib import Path
from ts_handlers import start_model
from ts_handlers.errors import InputError
model = start_model(archive_source(Path(sys.argv[1])), settings_of(json.loads(sys.argv[2])))
facts = {"result": model.outcome.result, "refused": []}
for wrong in (30, -1, 10**9):
    try:
        model(torch.tensor([[4] * 127 + [wrong]]))
    except InputError as error:
        facts["refused"].append(str(error))
facts["shape"] = list(model(torch.full((2, 128), 29)).shape)
print(json.dumps(facts))
"""


@pytest.mark.compile
def test_an_index_that_is_out_of_range_does_not_end_the_process(tmp_path: Path) -> None:
    """In a process of its own, which compiled code that runs in several threads would end; builds draw from limits."""
    folder = write_archive(tmp_path / "archive", TOKENS)
    for result in ("built", "hit"):
        section = {**SECTION, "store": str(tmp_path / "store")}
        facts = json.loads(run_python(CALL, folder, json.dumps(section)).splitlines()[-1])
        assert facts["result"] == result
        assert [text.partition(" [")[2].partition(";")[0] for text in facts["refused"]] == [
            f"3, 30), found {wrong}" for wrong in (30, -1, 10**9)
        ]
        assert facts["shape"] == [2, 64]
    (manifest,) = (tmp_path / "store" / "entries").rglob("manifest.json")
    (spec,) = json.loads(manifest.read_text())["artifact"]["inputs"]
    assert spec["values"] == [3, 30]
    assert "limits" not in spec
