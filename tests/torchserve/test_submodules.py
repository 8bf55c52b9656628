"""Handlers whose parts are compiled by the setting `models`: in one TorchServe equal to plain, then warm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.their_archives import OURS, THEIRS, pack_theirs
from tests.support.torchserve_archives import ArchiveFactory
from tests.support.torchserve_records import ServerFactory, published

DIFFUSES = """
import torch
from parts import Pipeline
from ts.torch_handler.base_handler import BaseHandler


class TheirHandler(BaseHandler):
    def __init__(self):
        self.initialized = False

    def initialize(self, context):
        self.pipe = Pipeline.from_pretrained(context.system_properties["model_dir"])
        self.initialized = True

    def preprocess(self, requests):
        return torch.tensor([row["body"] for row in requests])

    def inference(self, inputs):
        return self.pipe(inputs)

    def postprocess(self, outputs):
        return [[round(value, 3) for value in row.flatten().tolist()] for row in outputs]
"""

# The shape of a diffusers pipeline, which is not installed where these tests run.
PARTS = """
import dataclasses
import os

import torch


@dataclasses.dataclass
class Output:
    sample: torch.Tensor


class Unet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.outside = torch.nn.Conv2d(8, 4, 3, padding=1)
        self.states = torch.nn.Linear(6, 8)

    def forward(self, sample, timestep, encoder_hidden_states, timestep_cond=None, return_dict=True):
        hidden = self.inside(sample) + self.states(encoder_hidden_states.mean(1))[:, :, None, None]
        out = self.outside(torch.nn.functional.silu(hidden)) + timestep / 10
        return Output(out) if return_dict else (out,)


class Vae(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.ConvTranspose2d(4, 3, 2, stride=2)

    def decode(self, z, return_dict=True):
        out = self.decoder(z)
        return Output(out) if return_dict else (out,)


class Pipeline:
    def __init__(self, unet, vae, text_encoder):
        self.unet, self.vae, self.text_encoder = unet.eval(), vae.eval(), text_encoder.eval()

    @classmethod
    def from_pretrained(cls, folder):
        made = cls(Unet(), Vae(), torch.nn.Embedding(16, 6))
        made.unet._internal_dict = {"_name_or_path": folder}
        for name, weights in torch.load(os.path.join(folder, "weights.bin")).items():
            getattr(made, name).load_state_dict(weights)
        return made

    @torch.no_grad()
    def __call__(self, ids):
        states = self.text_encoder(ids)
        latents = torch.ones(len(ids), 4, 8, 8)
        for step in (2, 1, 0):
            noise = self.unet(
                latents, torch.tensor(step), encoder_hidden_states=states, timestep_cond=None, return_dict=False
            )[0]
            latents = latents - 0.1 * noise
        return self.vae.decode(latents).sample
"""
PIPELINE: dict[str, Any] = {
    "unet": {
        "path": "pipe.unet",
        "arguments": {"return_dict": False},
        "inputs": [
            {"name": "sample", "dtype": "float32", "shape": ["batch", 4, 8, 8]},
            {"name": "timestep", "dtype": "int64", "shape": []},
            {"name": "encoder_hidden_states", "dtype": "float32", "shape": ["batch", 5, 6]},
        ],
        "dimensions": {"batch": {"min": 1, "max": 2}},
    },
    "decoder": {
        "path": "pipe.vae",
        "method": "decode",
        "inputs": [{"name": "z", "dtype": "float32", "shape": ["batch", 4, 8, 8]}],
        "dimensions": {"batch": {"min": 1, "max": 2}},
    },
}

GENERATES = """
import torch
from transformers import AutoModelForCausalLM
from ts.torch_handler.base_handler import BaseHandler


class TheirHandler(BaseHandler):
    def initialize(self, context):
        self.model = AutoModelForCausalLM.from_pretrained(context.system_properties["model_dir"]).eval()
        self.initialized = True

    def preprocess(self, requests):
        return torch.tensor([row["body"] for row in requests])

    def inference(self, ids):
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)

    def postprocess(self, outputs):
        return outputs.tolist()
"""
GENERATE = {"lm": {"path": "model", "generate": {"length": 24}}}


def pack(store: Path, work: Path, name: str, theirs: str, models: dict[str, Any]) -> None:
    """Write the archive ``plain_<name>`` with their handler, and ``ours_<name>`` with the two lines over it."""
    section = {"backends": ["aot_inductor", "eager"], "models": models}
    config = {"minWorkers": 1, "maxWorkers": 1, "startupTimeout": 600, "handler": {"ts_handlers": section}}
    pack_theirs(store, work, theirs, json.dumps(config), {f"plain_{name}": THEIRS, f"ours_{name}": OURS})


@pytest.fixture(scope="module")
def names(archives: ArchiveFactory, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    transformers = pytest.importorskip("transformers")
    work = tmp_path_factory.mktemp("submodules")
    folder = work / "pipeline"
    folder.mkdir()
    (folder / "parts.py").write_text(PARTS)
    parts: dict[str, Any] = {}
    exec(PARTS, parts)
    torch.manual_seed(0)
    weights = {"unet": parts["Unet"](), "vae": parts["Vae"](), "text_encoder": torch.nn.Embedding(16, 6)}
    torch.save({name: module.state_dict() for name, module in weights.items()}, folder / "weights.bin")
    pack(archives.model_store, folder, "pipeline", DIFFUSES, PIPELINE)
    folder = work / "generates"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=96, eos_token_id=None, initializer_range=0.3, **sizes)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    pack(archives.model_store, folder, "generates", GENERATES, GENERATE)
    return ["pipeline", "generates"]


BODIES: dict[str, list[Any]] = {"pipeline": [[1, 2, 3, 4, 5], [5, 5, 1, 1, 0]], "generates": [[5, 9, 2], [7]]}
ROWS = {"pipeline": ["unet", "decoder"], "generates": ["lm"]}


def test_parts_answer_as_plain_and_a_restart_builds_nothing(
    names: list[str], tmp_path: Path, make_server: ServerFactory
) -> None:
    store = tmp_path / "store"
    models = [f"{kind}_{name}" for name in names for kind in ("plain", "ours")]
    keys: dict[str, Any] = {}
    for result in ("built", "hit"):
        with make_server(models, store, env={"HF_HUB_OFFLINE": "1"}) as server:
            for model in models:
                server.wait_ready(model)
            for name in names:
                for body in BODIES[name]:
                    plain, ours = (server.predict(f"{kind}_{name}", body) for kind in ("plain", "ours"))
                    assert (ours.status, ours.body) == (200, plain.body), (ours.text, plain.text)
                facts = server.describe(f"ours_{name}")
                assert list(facts["models"]) == ROWS[name]
                for part, row in facts["models"].items():
                    found = (row["backend"], row["result"], row.get("reason"))
                    assert found == ("aot_inductor", result, None), row["fallbacks"]
                    assert row["counters"]["build"] == int(result == "built")
                    assert row["counters"]["outside_eager"] == 0, row["other_forms"]
                    assert row["contexts"]["lent"] > 2
                    assert keys.setdefault(part, row["key"]) == row["key"]
                assert set(facts["time"]["compiled"]) == set(ROWS[name])
        assert len(published(store)) == 3
