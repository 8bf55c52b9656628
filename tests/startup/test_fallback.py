"""The fallback order: which errors lead to the next backend, and which end the start."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import archive_source, settings_of
from tests.support.starts import (
    ROWS,
    Start,
    check,
    counters,
)
from ts_handlers import ModuleSource, Settings, start_model
from ts_handlers.errors import (
    BuildError,
    MissError,
    ModelError,
    SettingsError,
    StoreError,
)

pytestmark = pytest.mark.usefixtures("backend")


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
        start_model(archive_source(archive), Settings(backends=("aot_inductor", "eager"), strict=True))
    (archive / "model.py").write_text("import torch\n")
    with pytest.raises(ModelError, match="exactly one"):
        start()
    with pytest.raises(ModelError, match="exactly one"):
        start(backends=["eager"])


def test_unusable_store_is_replaced_by_a_temporary_one_or_strictly_refused(
    start: Start, archive: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    facts = check(start(store=str(tmp_path / "file")), archive)
    assert facts["result"] == "built"
    assert facts["fallbacks"][0]["backend"] == "store"
    with pytest.raises(StoreError):
        start(store=str(tmp_path / "file"), strict=True)


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
