"""Micro-batching in a real TorchServe, beside a torch-tensorrt installation that raises what nobody expects."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.torchserve_archives import ArchiveFactory, expected
from tests.support.torchserve_records import ServerFactory, published

PLAIN = """batchSize: 4
maxBatchDelay: 1
startupTimeout: 600
responseTimeout: 120
handler:
  ts_handlers:
    backends: [aot_inductor, inductor, eager]
"""
MICRO = """batchSize: 12
maxBatchDelay: 20
startupTimeout: 600
responseTimeout: 120
micro_batching:
  micro_batch_size: 2
  parallelism: {preprocess: 2, inference: 2, postprocess: 2}
handler:
  ts_handlers:
    backends: [tensorrt, aot_inductor]
    contexts: {count: 2}
"""
# On a GPU the backend would import torch_tensorrt when it builds; here it does so without asking for one.
HANDLER = """from ts_handlers.backends.tensorrt.backend import TensorRTBackend
from ts_handlers.backends.tensorrt.torch_tensorrt_import import import_torch_tensorrt

TensorRTBackend.toolchain = lambda self, request: "test"
TensorRTBackend.build = lambda self, target, workspace: import_torch_tensorrt()


class Handler(CompiledHandler):
    pass
"""
BAD = (b"[[1, 2, 3, 4", b"[[1, 2]]", b'{"y": 1}', b"")


def test_every_request_gets_its_own_answer(
    archives: ArchiveFactory, warm_store: Path, make_server: ServerFactory, tmp_path: Path
) -> None:
    replace = {
        "model-config.yaml": (PLAIN, MICRO),
        "handler.py": ("\n\nclass Handler(CompiledHandler):\n    pass\n", HANDLER),
    }
    archives.tiny("tiny", file_name="micro", replace=replace)
    package = tmp_path / "broken" / "torch_tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise Exception('libnvinfer.so.10 is not found')\n")
    bodies: list[list[list[float]] | bytes] = []
    for i in range(120):
        bodies.append(BAD[i // 5 % 4] if i % 5 == 0 else [[i / 10, -1.0, 2.0, float(j)] for j in range(1 + i % 3)])
    with make_server(["tiny=micro.mar"], warm_store, env={"PYTHONPATH": python_path(package.parent)}) as server:
        server.wait_ready("tiny")
        pids = server.worker_pids("tiny")
        with ThreadPoolExecutor(24) as clients:
            answers = list(clients.map(lambda body: server.predict("tiny", body, "application/json"), bodies))
        for body, answer in zip(bodies, answers, strict=True):
            if isinstance(body, bytes):
                assert answer.status == 400, answer.text
                assert answer.json()["type"] == "InputError"
            else:
                assert answer.status == 200, answer.text
                assert answer.json() == [pytest.approx(row, abs=1e-5) for row in expected(1, body)]
        facts = server.describe("tiny")
        assert server.worker_pids("tiny") == pids
    assert (facts["backend"], facts["result"], facts["counters"]["build"]) == ("aot_inductor", "hit", 0)
    assert facts["contexts"]["size"] == 2
    assert facts["contexts"]["refused"] == facts["contexts"]["in_use"] == 0
    assert facts["contexts"]["lent"] > 48  # two requests at most in each of them
    (fallback,) = facts["fallbacks"]
    assert fallback["backend"] == "tensorrt"
    assert "import torch_tensorrt fails: Exception: libnvinfer.so.10 is not found" in fallback["reason"]
    assert len(published(warm_store)) == 1


def python_path(first: Path) -> str:
    """The search path of the server's workers with one more folder in front."""
    return os.pathsep.join([str(first), os.environ.get("PYTHONPATH", "")])
