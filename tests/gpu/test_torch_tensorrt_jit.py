"""torch.compile through Torch-TensorRT on a real GPU: engines are built once, found again, and answer rightly.

Each start is a process of its own, as a worker's is: what Dynamo remembers in one would hide what the entry lacks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import write_archive, write_weights
from tests.support.subprocesses import run_python
from ts_handlers.backends.tensorrt.library import installed_flavours
from ts_handlers.key.fingerprint import distribution_version

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.compile,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(not installed_flavours(), reason="no TensorRT"),
    pytest.mark.skipif(
        not (distribution_version("torch-tensorrt") or distribution_version("torch-tensorrt-rtx")),
        reason="no Torch-TensorRT",
    ),
]

# `int(...)` of a tensor breaks the graph in two, and the last operator has no converter.
CODE = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.second = torch.nn.Linear(8, 4)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))

    def forward(self, x):
        hidden = torch.relu(self.first(x)).mean((2, 3)) * self.scale
        if int(hidden.isnan().sum()):
            return hidden[:, :4]
        return torch.erfinv(self.second(hidden).softmax(-1) * 0.5)
"""
SECTION: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 16, 16]}],
    "dimensions": {"batch": {"min": 1, "max": 12}},
    "warmup": [{"batch": 5}],
    "strict": True,
}
START = """
    import json, sys
    from pathlib import Path
    import torch
    from tests.support.models import archive_source, eager_model
    from ts_handlers import parse_settings, start_model

    torch.cuda.set_device(0)
    config = json.loads(sys.argv[2])
    model = start_model(archive_source(Path(sys.argv[1])), parse_settings(config), "cuda:0")
    eager = eager_model(Path(sys.argv[1])).cuda()
    errors = {}
    before = model.describe()["graphs_in_process"]
    for batch in range(1, 13):
        x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch)).cuda()
        with torch.inference_mode():
            expected = eager(x)
            errors[batch] = float((model(x) - expected).norm() / expected.norm())
    facts = model.describe()
    print("FACTS " + json.dumps({**facts, "errors": errors, "late": facts["graphs_in_process"] - before}))
"""


def start(archive: Path, store: Path, options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    section = {**SECTION, "backends": ["torch_tensorrt"], "store": str(store), **changes}
    pt2 = {"compile": {"enable": True, "backend": "torch_tensorrt", "options": {"min_block_size": 1, **options}}}
    config = {"handler": {"ts_handlers": section}, "pt2": pt2}
    out = run_python(START, archive, json.dumps(config))
    facts: dict[str, Any] = json.loads(next(line for line in out.splitlines() if line.startswith("FACTS "))[6:])
    assert max(facts["errors"].values()) < 2e-3, facts["errors"]
    assert facts["late"] == 0
    return facts


@pytest.fixture(scope="module")
def archive_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"), CODE)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def built(archive_folder: Path, store: Path) -> dict[str, Any]:
    return start(archive_folder, store, {})


def test_the_first_start_builds_an_engine_for_each_part(built: dict[str, Any]) -> None:
    artifact = built["artifact"]
    assert (built["backend"], built["result"]) == ("torch_tensorrt", "built")
    assert artifact["engines_built"] == artifact["engine_cache_miss"] > 1
    assert artifact["graph_breaks"] > 0
    in_tensorrt, total = artifact["in_tensorrt"]
    assert 0 < in_tensorrt < total
    assert artifact["shapes"] == "ranges"
    assert artifact["sizes_partly_eager"] == []


def test_the_second_start_builds_no_engine(built: dict[str, Any], archive_folder: Path, store: Path) -> None:
    facts = start(archive_folder, store, {}, on_miss="fail")
    artifact = facts["artifact"]
    assert (facts["result"], facts["key"]) == ("hit", built["key"])
    assert artifact["engines_built"] == artifact["engine_cache_miss"] == 0
    assert artifact["engine_cache_hit"] == built["artifact"]["engines_built"] + built["artifact"]["engine_cache_hit"]
    assert facts["canary"]["source"] == "record"


def test_new_weights_are_a_miss(built: dict[str, Any], archive_folder: Path, store: Path, tmp_path: Path) -> None:
    tuned = write_archive(tmp_path / "tuned", CODE)
    write_weights(tuned, seed=7)
    facts = start(tuned, store, {})
    assert (facts["result"], facts["missed"]) == ("built", ["weights"])
    assert facts["artifact"]["engines_built"] == built["artifact"]["engines_built"]


def test_other_options_are_a_miss(built: dict[str, Any], archive_folder: Path, store: Path) -> None:
    facts = start(archive_folder, store, {"optimization_level": 1})
    assert (facts["result"], facts["missed"]) == ("built", ["options"])


def test_the_fallback_order_of_pt2_comes_here_when_the_model_cannot_be_exported(
    built: dict[str, Any], archive_folder: Path, store: Path
) -> None:
    backends = ["tensorrt", "torch_tensorrt", "eager"]
    facts = start(archive_folder, store, {}, backends=backends, strict=False)
    assert (facts["backend"], facts["result"]) == ("torch_tensorrt", "hit")
    assert [fallback["backend"] for fallback in facts["fallbacks"]] == ["tensorrt"]
