"""Streamed answers and sequence batching with compiled modules, plain and with the two lines, in one TorchServe."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import LINEAR, write_archive
from tests.support.their_archives import OURS, THEIRS, pack_theirs
from tests.support.torchserve_archives import ArchiveFactory
from tests.support.torchserve_records import ServerFactory, starts
from ts_handlers.testing import TorchServe

STREAMS = """
import torch
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.torch_handler.base_handler import BaseHandler


class TheirHandler(BaseHandler):
    def preprocess(self, data):
        return torch.tensor([row["body"] for row in data])

    def inference(self, rows):
        with torch.no_grad():
            for step in range(3):
                rows = torch.nn.functional.pad(self.model(rows), (0, 1), value=float(step))
                send_intermediate_predict_response(
                    [f"{row:.4f} " for row in rows.sum(1).tolist()],
                    self.context.request_ids, "Intermediate Prediction success", 200, self.context,
                )
            return self.model(rows)

    def postprocess(self, data):
        return [f"{row:.4f}" for row in data.sum(1).tolist()]
"""
SEQUENCES = """
import torch
from ts.torch_handler.base_handler import BaseHandler


class TheirHandler(BaseHandler):
    def initialize(self, context):
        super().initialize(context)
        self.sums = {}

    def preprocess(self, data):
        rows = []
        for index, row in enumerate(data):
            name = self.context.get_sequence_id(index)
            self.sums[name] = self.sums.get(name, 0.0) + float(row["body"])
            rows.append([self.sums[name]] * 4)
        return torch.tensor(rows)

    def postprocess(self, data):
        return [[round(value, 4) for value in row] for row in data.tolist()]
"""
CONFIG: dict[str, Any] = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "startupTimeout": 600,
    "responseTimeout": 120,
    "handler": {
        "ts_handlers": {
            "backends": ["aot_inductor", "eager"],
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
            "dimensions": {"batch": {"min": 1, "max": 4}},
        }
    },
}
SEQUENCE: dict[str, Any] = {
    "batchSize": 4,
    "maxNumSequence": 4,
    "sequenceMaxIdleMSec": 60000,
    "maxSequenceJobQueueSize": 10,
    "sequenceBatching": True,
}


def pack(store: Path, work: Path, name: str, theirs: str, config: dict[str, Any]) -> None:
    """Write ``plain_<name>`` with their handler and ``ours_<name>`` with the two lines over it."""
    write_archive(work, LINEAR)
    archives = {f"plain_{name}": THEIRS, f"ours_{name}": OURS}
    files = {"modelFile": "model.py", "serializedFile": "model.pt"}
    pack_theirs(store, work, theirs, json.dumps(config), archives, **files)


@pytest.fixture(scope="module")
def models(archives: ArchiveFactory, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    work = tmp_path_factory.mktemp("streams_and_sequences")
    pack(archives.model_store, work / "streams", "streams", STREAMS, {**CONFIG, "batchSize": 1})
    pack(archives.model_store, work / "sequences", "sequences", SEQUENCES, {**CONFIG, **SEQUENCE})
    return [f"{kind}_{name}" for name in ("streams", "sequences") for kind in ("plain", "ours")]


def send_of_sequence(server: TorchServe, model: str, sequence: str, body: float) -> Any:
    """Answer of a sequence's next request; `urllib` would change the case of the header's name, which counts here."""
    address = urllib.parse.urlparse(server.url())
    connection = http.client.HTTPConnection(address.netloc, timeout=300)
    headers = {"ts_request_sequence_id": sequence, "Content-Type": "application/json"}
    connection.request("POST", f"/predictions/{model}", json.dumps(body), headers)
    with connection.getresponse() as answer:
        text = answer.read().decode()
        assert answer.status == 200, text
        return json.loads(text)


def test_streams_and_sequences_answer_as_plain(models: list[str], tmp_path: Path, make_server: ServerFactory) -> None:
    with make_server(models, tmp_path / "store") as server:
        for model in models:
            server.wait_ready(model)
        plain, ours = (server.predict(f"{kind}_streams", [1.0, 2.0, 3.0, 4.0]) for kind in ("plain", "ours"))
        assert (ours.status, ours.text) == (200, plain.text)
        assert len(ours.text.split()) == 4
        answers: dict[str, list[Any]] = {"plain": [], "ours": []}
        for kind, found in answers.items():
            for step in range(4):
                for sequence in ("one", "two"):
                    body = step + (10.0 if sequence == "two" else 0.0)
                    found.append(send_of_sequence(server, f"{kind}_sequences", sequence, body))
        assert answers["ours"] == answers["plain"]
        assert len({tuple(answer) for answer in answers["ours"]}) == 8  # each sequence has a sum of its own
        facts = server.describe("ours_streams")
        assert (facts["backend"], facts["counters"]["outside_eager"]) == ("aot_inductor", 0)
        # TorchServe's front end never answers describe of a model with sequence batching, plain neither.
        (record,) = starts(server, "ours_sequences")
        assert (record["backend"], record["fallbacks"]) == ("aot_inductor", [])
        log = server.log()
    assert "ours_sequences: called in a form that was not compiled" not in log
