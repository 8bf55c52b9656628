"""Indices out of range without declared limits: refused, where the build can see the size of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import archive_source, eager_model, settings_of, write_archive
from ts_handlers import CompiledModel, start_model
from ts_handlers.backends.export import FlatModel, export_program
from ts_handlers.backends.index_limits import find_limits
from ts_handlers.errors import InputError
from ts_handlers.model.signature import Signature
from ts_handlers.settings import Dimension, InputSpec

MODEL = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(30, 4)
        self.register_buffer("table", torch.arange(20.0))

    def forward(self, ids, rows):
        return self.words(ids.to(torch.int64).unsqueeze(1)).sum((1, 2)) + self.table[rows.view(-1)]
"""
SECTION: dict[str, Any] = {
    "inputs": [
        {"name": "ids", "dtype": "int32", "shape": ["batch"]},
        {"name": "rows", "dtype": "int64", "shape": ["batch"]},
    ],
    "dimensions": {"batch": {"min": 1, "max": 8}},
    "backends": ["aot_inductor"],
    "strict": True,
}


def start(archive: Path, store: Path, **changes: Any) -> CompiledModel:
    return start_model(archive_source(archive), settings_of(SECTION, store=str(store), **changes))


@pytest.mark.compile
def test_index_out_of_range_is_refused_without_declared_limits(tmp_path: Path) -> None:
    archive, store = write_archive(tmp_path / "archive", MODEL), tmp_path / "store"
    for result in ("built", "hit"):
        model = start(archive, store)
        assert model.outcome.result == result
        assert model.describe()["artifact"]["limits"] == {
            "ids": {"limits": [0, 30], "from": "embedding of words.weight (30)"},
            "rows": {"limits": [-20, 20], "from": "index of table (20)"},
        }
        for ids, rows in ((29, 19), (0, -20)):
            inputs = torch.tensor([0, ids], dtype=torch.int32), torch.tensor([rows, 1])
            with torch.inference_mode():
                torch.testing.assert_close(model(*inputs), eager_model(archive)(*inputs))
        for ids, rows in ((30, 0), (-1, 0), (0, 20), (0, -21)):
            with pytest.raises(InputError, match=r"expected values inside its limits \[-?\d+, \d+\)"):
                model(torch.tensor([ids], dtype=torch.int32), torch.tensor([rows]))

    inputs = [{**SECTION["inputs"][0], "limits": [0, 10]}, SECTION["inputs"][1]]
    narrow = start(archive, store, inputs=inputs)
    assert narrow.describe()["artifact"]["limits"]["ids"] == {"limits": [0, 10], "from": "settings"}
    with pytest.raises(InputError, match=r"inside its limits \[0, 10\), found 12"):
        narrow(torch.tensor([12], dtype=torch.int32), torch.tensor([0]))


class Look(torch.nn.Module):
    """One way of looking an index up."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.words = torch.nn.Embedding(30, 4)
        self.bag = torch.nn.EmbeddingBag(12, 4)
        self.register_buffer("table", torch.arange(40.0).reshape(8, 5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.get_buffer("table")
        ways = {
            "bag": lambda: self.bag(ids),
            "both": lambda: self.words(ids).sum() + table[ids].sum(),
            "second": lambda: table[:, ids],
            "gather": lambda: table.gather(1, ids[:8].expand(8, 2)),
            "select": lambda: table.index_select(1, ids.flatten()),
            "computed": lambda: self.words(ids - 1),
            "narrow": lambda: self.words(ids.to(torch.uint8).long()),
            "own size": lambda: ids.new_ones(ids.shape[0])[ids],
        }
        return ways[self.how]()


@pytest.mark.compile
@pytest.mark.parametrize(
    ("how", "limits"),
    [
        ("bag", (0, 12)),
        ("both", (0, 8)),
        ("second", (-5, 5)),
        ("select", (0, 5)),
        ("computed", None),
        ("narrow", None),
        ("own size", None),
    ],
)
def test_limits_are_those_of_the_smallest_table_that_is_seen(how: str, limits: tuple[int, int] | None) -> None:
    signature = Signature([InputSpec("ids", "int64", ("batch", 3))], {"batch": Dimension(2, 16)})
    inputs = (torch.ones(4, 3, dtype=torch.int64),)
    program = export_program(FlatModel(Look(how), ("ids",)).eval(), inputs, signature, {"batch": (2, 16)}, True)
    found = find_limits(program, signature)
    assert found.get("ids", (None,))[:2] == (limits or (None,))
