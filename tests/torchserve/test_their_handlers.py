"""Three handlers as users write them, plain and with the two lines, in one TorchServe: equal answers, then warm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import LINEAR, write_archive
from tests.support.their_archives import OURS, THEIRS, pack_theirs
from tests.support.torchserve_archives import ArchiveFactory
from tests.support.torchserve_records import ServerFactory, published, starts

LABELS = """
import torch
from ts.torch_handler.base_handler import BaseHandler


class TheirHandler(BaseHandler):
    def preprocess(self, data):
        return torch.tensor([row["body"] for row in data], device=self.device)

    def inference(self, data):
        with torch.no_grad():
            return self.model(data).argmax(1)

    def postprocess(self, data):
        return [["one", "two", "three"][index] for index in data.tolist()]
"""

PRETRAINED = """
import torch
from transformers import AutoModelForSequenceClassification
from ts.torch_handler.base_handler import BaseHandler


class TheirHandler(BaseHandler):
    def __init__(self):
        self.initialized = False

    def initialize(self, context):
        self.context = context
        self.model = AutoModelForSequenceClassification.from_pretrained(context.system_properties["model_dir"])
        self.model.eval()
        assert isinstance(self.model, torch.nn.Module)
        self.initialized = True

    def preprocess(self, requests):
        device = next(self.model.parameters()).device
        ids = torch.tensor([row["body"] for row in requests], device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def inference(self, batch):
        with torch.no_grad():
            output = self.model(**batch)
            pair = self.model(**batch, return_dict=False) if self.context.get_request_header(0, "Pair") else None
        assert output.loss is None and type(output).__name__ == "SequenceClassifierOutput", type(output)
        return output.logits if pair is None else pair[0]

    def postprocess(self, logits):
        return [[self.model.config.num_labels, *(round(value, 4) for value in row)] for row in logits.tolist()]
"""

HANDLE = """
import os

import torch


class TheirHandler:
    def initialize(self, context):
        path = os.path.join(context.system_properties["model_dir"], context.manifest["model"]["serializedFile"])
        self.weight = torch.load(path)["layer.weight"]

    def handle(self, data, context):
        return [(torch.tensor(row["body"]) @ self.weight.t()).tolist() for row in data]
"""

CONFIG = """
minWorkers: 1
maxWorkers: 1
batchSize: 1
startupTimeout: 600
responseTimeout: 120
handler:
  ts_handlers:
    backends: [aot_inductor, eager]
    inputs: {inputs}
    dimensions: {dimensions}
"""
ROWS = ["inputs: [{name: x, dtype: float32, shape: [batch, 4]}]", "dimensions: {batch: {min: 1, max: 4}}"]
IDS = [
    "inputs: [{name: input_ids, dtype: int64, shape: [batch, length], values: [0, 50]}, "
    "{name: attention_mask, dtype: int64, shape: [batch, length]}]",
    "dimensions: {batch: {min: 1, max: 4}, length: {min: 1, max: 16}}",
]


def pack(store: Path, work: Path, name: str, theirs: str, declared: list[str], **manifest: str) -> None:
    """Write the archive ``plain_<name>`` with their handler, and ``ours_<name>`` with the two lines over it."""
    inputs, dimensions = (line.partition(": ")[2] for line in declared)
    config = CONFIG.format(inputs=inputs, dimensions=dimensions)
    pack_theirs(store, work, theirs, config, {f"plain_{name}": THEIRS, f"ours_{name}": OURS}, **manifest)


@pytest.fixture(scope="module")
def names(archives: ArchiveFactory, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    transformers = pytest.importorskip("transformers")
    work = tmp_path_factory.mktemp("their_handlers")
    store = archives.model_store
    folder = write_archive(work / "labels", LINEAR)
    pack(store, folder, "labels", LABELS, ROWS, modelFile="model.py", serializedFile="model.pt")
    folder = write_archive(work / "handle", LINEAR, weights="weights.pth")
    (folder / "model.py").unlink()
    pack(store, folder, "handle", HANDLE, ROWS, serializedFile="weights.pth")
    folder = work / "pretrained"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    pack(store, folder, "pretrained", PRETRAINED, IDS, serializedFile="model.safetensors")
    return ["labels", "pretrained", "handle"]


BODIES: dict[str, list[Any]] = {
    "labels": [[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -3.0, 0.25]],
    "pretrained": [[1, 2, 3], [4, 5, 6, 7, 8]],
    "handle": [[0.5, -1.0, 2.0, 0.0]],
}


def test_answers_are_equal_and_a_restart_builds_nothing(
    names: list[str], tmp_path: Path, make_server: ServerFactory
) -> None:
    store = tmp_path / "store"
    models = [f"{kind}_{name}" for name in names for kind in ("plain", "ours")]
    first: dict[str, dict[str, Any]] = {}
    with make_server(models, store, env={"HF_HUB_OFFLINE": "1"}) as server:
        for model in models:
            server.wait_ready(model)
        for name in names:
            for body in BODIES[name]:
                plain, ours = (server.predict(f"{kind}_{name}", body) for kind in ("plain", "ours"))
                assert (ours.status, ours.body) == (200, plain.body), (ours.text, plain.text)
            first[name] = server.describe(f"ours_{name}")
        headers = {"Pair": "yes", "Content-Type": "application/json"}
        body = json.dumps(BODIES["pretrained"][0]).encode()
        answers = [server.predict(f"{kind}_pretrained", body, headers=headers) for kind in ("plain", "ours")]
        assert answers[0].status == 200, answers[0].text
        assert answers[0].body == answers[1].body
        after = server.describe("ours_pretrained")
        log = server.log()
    for name in ("labels", "pretrained"):
        facts = first[name]
        assert (facts["backend"], facts["result"]) == ("aot_inductor", "built"), facts["fallbacks"]
        assert facts["counters"]["outside_eager"] == 0
    assert after["other_forms"] == {"argument 'return_dict' is not declared": 1}
    assert "no self.model" in first["handle"]["reason"]
    assert "ours_handle: nothing is compiled" in log
    assert len(published(store)) == 2
    with make_server(["ours_labels", "ours_pretrained"], store, env={"HF_HUB_OFFLINE": "1"}) as server:
        for name in ("labels", "pretrained"):
            model = f"ours_{name}"
            server.wait_ready(model)
            assert server.predict(model, BODIES[name][0]).status == 200
            facts = server.describe(model)
            assert facts["result"] == "hit", facts["missed"]
            assert (facts["counters"]["build"], facts["counters"]["hit"]) == (0, 1)
            assert facts["key"] == first[name]["key"]
            assert [start["result"] for start in starts(server, model)] == ["hit"]
    assert len(published(store)) == 2
