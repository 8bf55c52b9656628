"""The counter of graphs that requests have compiled, with real compiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import write_archive
from tests.support.subprocesses import run_python

pytestmark = pytest.mark.compile

COMPILES_ITSELF = """
import torch


def double(x):
    return torch.relu(x) * 2


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.double = torch.compile(double, backend="aot_eager", dynamic=False)

    def forward(self, x):
        return self.double(x) if x.shape[0] > 4 else double(x)
"""
PLAIN = """
import torch


class Model(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) * 2
"""
RUN = """
    import json, sys, threading
    import torch
    from tests.support.models import archive_source, settings_of
    from ts_handlers import start_model

    archive, store, backend = sys.argv[1:]
    model = start_model(archive_source(archive), settings_of(store=store, backends=[backend], strict=True))
    counted = []
    def ask(batch):
        model(torch.ones(batch, 4))
        counted.append(model.describe()["counters"]["compile_after_ready"])
    for batch in (2, 5, 5, 6):
        ask(batch)
    threads = [threading.Thread(target=ask, args=(7,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    facts = model.describe()
    print(json.dumps([counted[:4], facts["counters"]["compile_after_ready"], facts["graphs_in_process"]]))
"""


def counted(tmp_path: Path, code: str, backend: str) -> Any:
    folder = write_archive(tmp_path / "archive", code)
    return json.loads(run_python(RUN, folder, tmp_path / "store", backend).splitlines()[-1])


def test_a_request_that_compiles_is_counted_once(tmp_path: Path) -> None:
    sizes, after, in_process = counted(tmp_path, COMPILES_ITSELF, "eager")
    assert sizes == [0, 1, 1, 2]
    assert after == in_process >= 3  # threads that meet a new size at once may each compile it


@pytest.mark.parametrize("backend", ["eager", "inductor", "aot_inductor"])
def test_other_requests_are_not(backend: str, tmp_path: Path) -> None:
    """Of `inductor` what its start compiles is not counted either."""
    sizes, after, _ = counted(tmp_path, PLAIN, backend)
    assert (sizes, after) == ([0, 0, 0, 0], 0)
