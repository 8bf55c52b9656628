"""Requests of a batch are joined only where a row is answered alone as it is among others; eager is asked once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Register
from tests.support.models import LINEAR, archive_source, settings_of, write_archive
from tests.support.starts import Start, check
from ts_handlers import CompiledModel, start_model
from ts_handlers.model.signature import Signature
from ts_handlers.settings import Dimension, InputSpec
from ts_handlers.startup.rows import rows_are_independent
from ts_handlers.store.canaries import check_canary_bytes, encode_canary, load_record
from ts_handlers.store.upkeep.scan import canaries_of

pytest.importorskip("ts", reason="TorchServe is not installed")

from tests.support.handlers import ROWS, ask, make_context
from ts_handlers import CompiledHandler

MICRO: dict[str, Any] = {"micro_batching": {"micro_batch_size": 4}}
DEPENDENT = [
    "self.layer(x).softmax(0)",
    "self.layer((x - x.mean(0)) / (x.std(0, correction=0) + 1))",
    "self.layer(x).argsort(0)",
    "self.layer(x) + torch.arange(x.shape[0]).unsqueeze(1)",
    "self.layer(x / x.abs().max())",
]


def with_output(output: str) -> str:
    return LINEAR.replace("return self.layer(x)", f"return {output}")


@pytest.mark.parametrize("config", [{}, MICRO], ids=["plain", "micro-batching"])
@pytest.mark.parametrize("output", DEPENDENT)
def test_no_answer_holds_what_belongs_to_others(output: str, config: dict[str, Any], tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "archive", with_output(output))
    context = make_context(archive, tmp_path / "store", section={"backends": ["eager"]}, **config)
    handler = CompiledHandler()
    handler.initialize(context)
    alone = [ask(handler, context, [row])[0] for row in ROWS]
    assert [status for status, _ in alone] == [200, 200]
    assert ask(handler, context, *[[row] for row in ROWS]) == alone
    assert handler.describe_handle()["independent_rows"] is False


@pytest.mark.parametrize("output", DEPENDENT)
def test_the_canary_records_what_eager_does(output: str, tmp_path: Path, register: Register) -> None:
    """Also for a compiled model, and a hit knows it without the eager module."""
    register("aot_inductor", "tests.support.scripted_backend:BACKEND")
    source = archive_source(write_archive(tmp_path / "archive", with_output(output)))
    settings = settings_of(store=str(tmp_path / "store"), backends=["aot_inductor"])
    outcomes = [start_model(source, settings).outcome for _ in range(2)]
    assert [outcome.result for outcome in outcomes] == ["built", "hit"]
    assert [outcome.independent_rows for outcome in outcomes] == [False, False]


@pytest.mark.usefixtures("backend")
def test_independent_rows_are_joined_also_after_a_hit(start: Start, archive: Path) -> None:
    assert start().outcome.independent_rows is True
    hit = start()
    assert (hit.outcome.result, hit.outcome.independent_rows) == ("hit", True)
    assert hit.describe()["independent_rows"] is True
    assert start(backends=["eager"]).outcome.independent_rows is True


@pytest.mark.usefixtures("backend")
def test_a_record_of_an_older_version_is_completed_once(start: Start, archive: Path, tmp_path: Path) -> None:
    built = start()
    strip(tmp_path / "store", built)
    completed = check(start(on_miss="fail"), archive)
    assert (completed["result"], completed["canary"]["source"]) == ("hit", "eager")
    assert completed["independent_rows"] is True
    assert completed["counters"]["build"] == 0
    again = start(on_miss="fail").describe()
    assert (again["canary"]["source"], again["independent_rows"]) == ("record", True)


@pytest.mark.usefixtures("backend")
def test_a_record_stays_as_it_is_where_nothing_can_be_joined(start: Start, tmp_path: Path) -> None:
    single = {"batch": {"min": 1, "max": 1}}
    built = start(dimensions=single)
    assert built.outcome.independent_rows is None
    strip(tmp_path / "store", built)
    facts = start(dimensions=single, on_miss="fail").describe()
    assert (facts["canary"]["source"], facts["independent_rows"]) == ("record", None)


def strip(root: Path, model: CompiledModel) -> None:
    """Leave of a model's canary record what an older version has written."""
    (path,) = canaries_of(root, str(model.outcome.key))
    subject = f"{path.parent.name}/{path.name}"
    record = load_record(check_canary_bytes(subject, path.read_bytes()))
    for case in record["cases"]:
        del case["origin"]
    path.write_bytes(encode_canary(subject, {"cases": record["cases"]}))


SIGNATURE = Signature([InputSpec("x", "float32", ("batch", 3))], {"batch": Dimension(1, 8)})


def independent(run: Any, signature: Signature = SIGNATURE) -> bool:
    return rows_are_independent(run, signature, 0, torch.device("cpu"), None)


def test_what_has_no_row_for_each_row_is_not_joined() -> None:
    assert independent(lambda tensors: tensors[0] * 2)
    assert not independent(lambda tensors: tensors[0].mean(0))  # three numbers, and the joined batch has three rows
    assert not independent(lambda tensors: (tensors[0], tensors[0].sum()))
    assert not independent(lambda tensors: {"y": tensors[0], "rows": tensors[0].shape[0]})


def test_a_model_that_changes_its_input_or_refuses_parts() -> None:
    assert independent(lambda tensors: tensors[0].mul_(2))

    def refuses(tensors: list[torch.Tensor]) -> torch.Tensor:
        assert tensors[0].shape[0] > 1
        return tensors[0]

    assert not independent(refuses)


def test_rows_that_are_all_the_same_prove_nothing() -> None:
    same = InputSpec("x", "int64", ("batch", 3), values=(1, 2))
    assert not independent(lambda tensors: tensors[0], Signature([same], {"batch": Dimension(1, 8)}))


def test_parts_of_the_fewest_rows_that_are_declared() -> None:
    pairs = Signature(SIGNATURE.inputs, {"batch": Dimension(2, 8)})
    seen: list[int] = []

    def run(tensors: list[torch.Tensor]) -> torch.Tensor:
        seen.append(tensors[0].shape[0])
        return tensors[0]

    assert independent(run, pairs)
    assert seen == [6, 2, 2, 2]
