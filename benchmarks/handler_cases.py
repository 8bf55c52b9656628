"""The handlers of `handlers.py`: our own small ones, of the shapes that TorchServe's examples have; seeded models."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ts_handlers.servers.torchserve.wrapping import find_handler

OWN = Path(__file__).resolve().parent / "handlers_own"
MARGIN = 1e-3
"""Largest difference of a number in two answers that are equal."""
IMAGES = {"inputs": [{"name": "images", "dtype": "float32", "shape": ["batch", 3, 32, 32]}]}
BATCH = {"dimensions": {"batch": {"min": 1, "max": 4}}}
IDS = {
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "values": [1, 100]},
        {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "length"], "values": [1, 2]},
    ],
    "dimensions": {"batch": {"min": 1, "max": 4}, "length": {"min": 2, "max": 16}},
}
BAGS = {
    "inputs": [
        {"name": "words", "dtype": "int64", "shape": ["length"], "values": [0, 200]},
        {"name": "offsets", "dtype": "int64", "shape": [1], "values": [0, 1]},
    ],
    "dimensions": {"length": {"min": 1, "max": 64}},
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
MICRO = {"micro_batching": {"micro_batch_size": 1, "parallelism": {"preprocess": 1, "inference": 1, "postprocess": 1}}}
SEQUENCE = {"sequenceBatching": True, "maxNumSequence": 4, "maxSequenceJobQueueSize": 10, "sequenceMaxIdleMSec": 60000}


@dataclasses.dataclass(frozen=True)
class Case:
    """A handler with its model.

    Attributes
    ----------
    name, shape:
        The archive's name, and what the handler is like.
    file, kind:
        Its file among `OWN`, and its class; no class where it is a function.
    model:
        A class of models.py, which is the archive's model file; for transformers' models a configuration.
    section:
        The section ``handler: ts_handlers:``.
    config:
        The rest of model-config.yaml.
    model_file:
        Whether `BaseHandler` loads the model; otherwise the handler does.
    body:
        What a request holds.
    real_size:
        Whether the model is as large as those that people serve: ResNet-50 or BERT-base.
    """

    name: str
    shape: str
    file: str
    kind: str
    model: str
    section: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    model_file: bool = True
    body: str = "image"
    real_size: bool = False

    def bodies(self) -> list[Any]:
        """The requests, sent one after the other."""
        generator = torch.Generator().manual_seed(7)
        if self.body == "image":
            return [torch.randn(3, 32, 32, generator=generator).tolist() for _ in range(3)]
        return [torch.randint(1, 100, (length,), generator=generator).tolist() for length in (4, 9, 4)]

    def headers(self) -> dict[str, str]:
        """Of each request."""
        return {"ts_request_sequence_id": "one"} if "sequenceBatching" in self.config else {}


def _vision(name: str, shape: str, kind: str, model: str = "Convolutions", **more: Any) -> Case:
    return Case(name, shape, "images.py", kind, model, **{"section": {**IMAGES, **BATCH}, **more})


def _text(name: str, shape: str, auto_class: str, kind: str = "Pretrained", **more: Any) -> Case:
    options = {"section": IDS, "config": {"handler": {"auto_class": auto_class}}, "model_file": False, "body": "ids"}
    return Case(name, shape, "texts.py", kind, more.pop("model", "BertConfig"), **{**options, **more})


_SELF_LOADED: dict[str, Any] = {"section": {**IMAGES, **BATCH}, "model_file": False}
CASES = (
    _vision("classifier", "image classifier", "Classifier"),
    _vision("segmenter", "image segmenter, a dict of tensors out", "Segmenter", "Segments"),
    _vision("detector", "object detector, a list of images in", "Detector", "Detects", section={}),
    Case("bag", "text classifier, a tuple from `preprocess`", "texts.py", "Bag", "Bags", BAGS, body="ids"),
    _text("sequence", "transformers, sequence classification", "AutoModelForSequenceClassification"),
    _text("token", "transformers, token classification", "AutoModelForTokenClassification"),
    _text("question", "transformers, question answering", "AutoModelForQuestionAnswering"),
    _text(
        "generation", "transformers, `generate`", "AutoModelForCausalLM", "Generates", model="GPT2Config", section={}
    ),
    _vision("labels", "`inference` post-processes", "Labels"),
    _vision("micro", "TorchServe's micro-batching", "MicroBatches", config=MICRO),
    _vision("caching", "`pt2: {compile: ...}`", "Classifier", config={"pt2": {"compile": {"enable": True}}}),
    Case(
        "sequences",
        "stateful, sequence batching",
        "others.py",
        "Sequences",
        "Convolutions",
        {**IMAGES, **BATCH},
        SEQUENCE,
    ),
    Case("streams", "streamed answers", "others.py", "Streams", "Convolutions", {**IMAGES, **BATCH}),
    Case("handle", "`handle` only, no base class", "others.py", "HandleOnly", "Convolutions", **_SELF_LOADED),
    Case("function", "a function `handle`", "function.py", "", "Convolutions", **_SELF_LOADED),
    Case("pipeline", "a pipeline of several modules", "others.py", "Pipeline", "Convolutions", model_file=False),
)


def build(case: Case, model_store: Path, work: Path) -> None:
    """Write the archives ``plain_NAME`` and ``ours_NAME``, which differ in the handler file alone."""
    work.mkdir(parents=True)
    for name in {case.file, "others.py"} if case.file == "function.py" else {case.file}:
        shutil.copy(OWN / name, work)
    manifest = {"modelVersion": "1.0", "configFile": "model-config.yaml", **_write_model(case, work)}
    (work / "wrapped.py").write_text(find_handler(str(work / case.file), case.kind or None).text())
    theirs = case.file
    if case.kind:  # TorchServe takes the only class that a file defines
        theirs = "theirs.py"
        kind = f"class TheirHandler({case.kind}):\n    pass\n"
        (work / theirs).write_text(f"from {Path(case.file).stem} import {case.kind}\n\n\n{kind}")
    handler = {**case.config.get("handler", {}), "ts_handlers": {"backends": ["aot_inductor", "eager"], **case.section}}
    if "pt2" in case.config:
        del handler["ts_handlers"]["backends"]  # pt2 says them
    limits = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "startupTimeout": 600, "responseTimeout": 300}
    (work / "model-config.yaml").write_text(json.dumps({**limits, **case.config, "handler": handler}))
    for kind, file in (("plain", theirs), ("ours", "wrapped.py")):
        described = {**manifest, "modelName": f"{kind}_{case.name}", "handler": file}
        with zipfile.ZipFile(model_store / f"{kind}_{case.name}.mar", "w") as archive:
            for path in sorted(work.iterdir()):
                if path.is_file():
                    archive.write(path, path.name)
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": described, "runtime": "python"}))


def _write_model(case: Case, work: Path) -> dict[str, str]:
    """Write the model's files; returns their entries of the manifest."""
    torch.manual_seed(0)
    if case.body == "ids" and not case.model_file:
        _write_pretrained(case, work)
        return {"serializedFile": "model.safetensors"}
    source = (OWN / "models.py").read_text("utf-8")
    (node,) = [each for each in ast.parse(source).body if isinstance(each, ast.ClassDef) and each.name == case.model]
    text = f"import torch\n\n\n{ast.get_source_segment(source, node)}\n".replace(f"class {case.model}", "class Model")
    (work / "model.py").write_text(text)
    space: dict[str, Any] = {"__name__": "model"}
    exec(compile(text, str(work / "model.py"), "exec"), space)  # our own file, as written above
    weights = "model.pt" if case.model_file else "weights.pth"
    torch.save(space["Model"]().eval().state_dict(), work / weights)
    return {"serializedFile": weights, **({"modelFile": "model.py"} if case.model_file else {})}


def _write_pretrained(case: Case, work: Path) -> None:
    import transformers

    if case.model == "GPT2Config":
        config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    else:
        sizes = BERT_BASE if case.real_size else SIZES
        config = transformers.BertConfig(vocab_size=100, num_labels=2, max_position_embeddings=32, **sizes)
    kind = getattr(transformers, case.config["handler"]["auto_class"])
    kind.from_config(config).eval().save_pretrained(work)


def equal(one: Any, other: Any) -> bool:
    """Whether two answers are equal; numbers may differ by `MARGIN`, since a compiler rounds otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return type(one) is type(other) and abs(one - other) <= MARGIN
    return bool(one == other)


def select(names: str | None, *, real_size: bool = False) -> list[Case]:
    """The cases of a comma-separated choice; all of them for None. With `real_size` those whose model has one."""
    wanted = [case.name for case in CASES] if names is None else names.split(",")
    unknown = set(wanted) - {case.name for case in CASES}
    if unknown:
        sys.exit(f"unknown handlers {', '.join(sorted(unknown))}; expected {', '.join(case.name for case in CASES)}")
    chosen = [case for case in CASES if case.name in wanted]
    if not real_size:
        return chosen
    larger = {"Convolutions": "Deep", "BertConfig": "BertConfig"}
    return [replace(case, model=larger[case.model], real_size=True) for case in chosen if case.model in larger]
