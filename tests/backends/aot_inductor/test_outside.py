"""A constant from an environment variable is compiled in: another value needs another artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import LINEAR, save_weights, write_archive
from tests.support.subprocesses import run_python

pytestmark = [pytest.mark.compile, pytest.mark.processes]

START = """
    import json, sys
    import torch
    from tests.support.models import archive_source, settings_of
    from ts_handlers import start_model
    settings = settings_of(store=sys.argv[2], backends=["aot_inductor"], strict=True)
    model = start_model(archive_source(sys.argv[1]), settings)
    print(json.dumps({**model.describe(), "answer": model(torch.ones(2, 4)).tolist()}))
"""


def test_each_value_has_an_artifact_and_a_restart_builds_nothing(tmp_path: Path) -> None:
    code = LINEAR.replace("import torch\n", "import os\nimport torch\n").replace(
        "self.layer(x)", "self.layer(x) * float(os.environ['SCALE'])"
    )
    archive = write_archive(tmp_path / "archive", code, seed=None)
    layer = torch.nn.Linear(4, 3)
    save_weights(archive / "model.pt", {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()})

    def start(scale: float) -> dict[str, Any]:
        facts = json.loads(run_python(START, archive, tmp_path / "store", SCALE=str(scale)).splitlines()[-1])
        assert torch.allclose(torch.tensor(facts["answer"]), layer(torch.ones(2, 4)) * scale, atol=1e-5)
        return dict(facts)

    found = [(facts["counters"]["build"], tuple(facts["missed"])) for facts in map(start, (2.0, 2.0, 3.0, 3.0, 2.0))]
    assert found == [(1, ()), (0, ()), (1, ("outside",)), (0, ()), (0, ())]
