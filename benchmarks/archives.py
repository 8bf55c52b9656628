"""The archives of the benchmark: one model, the same weights and request, a handler and a configuration per variant."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from ts_handlers.model.signature import Signature
from ts_handlers.settings import parse_settings

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))
import build_archives  # noqa: E402

MODELS = ("resnet50", "bert_base", "tiny")
FORMATS = {"zip": "default", "no-archive": "no-archive"}
BASE_HANDLER = HERE / "handlers" / "base_handler.py"
SEEDS = {"first": build_archives.SEED, "updated": build_archives.SEED + 1}
REQUEST_SEED = 7
REQUEST_SIZES = {"bert_base": {"batch": 1, "sequence": 128}}  # warmed up at a shorter sequence, as any service is
# A cold first request compiles, which may take longer than the examples' responseTimeout.
COMPILE_TIMEOUT_SECONDS = 900


@dataclasses.dataclass(frozen=True)
class Variant:
    """How one archive differs from the others: whose handler, which backend, which weights."""

    handler: str  # "base" or "ours"
    backends: tuple[str, ...] = ()
    compile: bool = False
    weights: str = "first"
    on_miss: str = "compile"


VARIANTS = {
    "eager": Variant("base"),
    "compile": Variant("base", compile=True),
    "aot": Variant("ours", ("aot_inductor", "inductor", "eager")),
    "aot_update": Variant("ours", ("aot_inductor", "inductor", "eager"), weights="updated"),
    "background": Variant("ours", ("aot_inductor", "inductor", "eager"), on_miss="background"),
    "inductor": Variant("ours", ("inductor", "eager")),
    "inductor_update": Variant("ours", ("inductor", "eager"), weights="updated"),
}


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model prepared for packing: a directory with model.py, model.pt, handler.py and model-config.yaml."""

    name: str
    directory: Path
    extra_files: tuple[Path, ...]
    config: dict[str, Any]

    def inputs(self) -> dict[str, torch.Tensor]:
        """The request's tensors: `REQUEST_SIZES`, or the sizes of the first warm-up entry, drawn from a seed."""
        settings = parse_settings(self.config)
        signature = Signature(settings.inputs, settings.dimensions)
        tensors = signature.generate(REQUEST_SIZES.get(self.name, settings.warmup[0]), seed=REQUEST_SEED)
        return dict(zip(signature.names, tensors, strict=True))

    def answer(self) -> torch.Tensor:
        """The eager model's answer to the request."""
        module = build_archives.load_model(self.directory)
        module.load_state_dict(torch.load(self.directory / "model.pt", weights_only=True))
        with torch.inference_mode():
            return module.eval()(**self.inputs())


@dataclasses.dataclass(frozen=True)
class Archives:
    """What a run of the benchmark needs of a model."""

    model: str
    model_store: Path
    body: bytes | dict[str, Any]
    answers: dict[str, torch.Tensor]  # by weights

    def file(self, variant: str) -> str:
        """Name of a variant's archive in the model store."""
        (path,) = (p for p in self.model_store.iterdir() if p.stem == f"{self.model}-{variant}")
        return path.name

    def expected(self, variant: str) -> torch.Tensor:
        """The eager model's answer with the weights of a variant."""
        return self.answers[VARIANTS[variant].weights]


def source_of(model: str) -> Path:
    """The folder of a model's source files."""
    own = HERE / "models" / model
    return own if own.is_dir() else build_archives.EXAMPLES / model


def prepare(model: str, directory: Path, weights: str = "first") -> ModelFiles:
    """Write a model's files with seeded random weights into `directory`."""
    directory.mkdir(parents=True)
    for path in source_of(model).iterdir():
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    extra_files = build_archives.PREPARE[model](directory) if model in build_archives.PREPARE else []
    torch.manual_seed(SEEDS[weights])
    torch.save(build_archives.load_model(directory).state_dict(), directory / "model.pt")
    config = yaml.safe_load((directory / "model-config.yaml").read_text("utf-8"))
    return ModelFiles(model, directory, tuple(extra_files), config)


def configure(config: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """A variant's model-config.yaml; the number of workers is set at launch."""
    common = {name: value for name, value in config.items() if name not in ("handler", "minWorkers", "maxWorkers")}
    if variant.handler == "ours":
        section = {**config["handler"]["ts_handlers"], "backends": list(variant.backends)}
        section["on_miss"] = variant.on_miss
        return {**common, "handler": {"ts_handlers": section}}
    if variant.compile:
        pt2 = {"compile": {"enable": True, "backend": "inductor"}}
        return {**common, "responseTimeout": COMPILE_TIMEOUT_SECONDS, "pt2": pt2}
    return common


def build(model: str, archive_format: str, variants: set[str], directory: Path) -> Archives:
    """Pack the variants that are asked for; refuse weights whose answers cannot be told apart."""
    model_store = directory / "model_store"
    files = {weights: prepare(model, directory / f"{model}-{weights}", weights) for weights in SEEDS}
    for name in sorted(variants):
        variant = VARIANTS[name]
        source = files[variant.weights]
        staged = directory / f"{model}-{name}"
        staged.mkdir()
        for file in ("model.py", "handler.py"):
            shutil.copyfile(source.directory / file, staged / file)
        (staged / "model.pt").symlink_to(source.directory / "model.pt")
        if variant.handler == "base":
            shutil.copyfile(BASE_HANDLER, staged / "handler.py")
        text = yaml.safe_dump(configure(source.config, variant), sort_keys=False)
        (staged / "model-config.yaml").write_text(text, "utf-8")
        build_archives.write_archive(
            model,
            staged,
            model_store,
            extra_files=source.extra_files,
            archive_format=FORMATS[archive_format],
            file_name=f"{model}-{name}",
        )
    answers = {weights: prepared.answer() for weights, prepared in files.items()}
    difference = relative_error(answers["updated"], answers["first"])
    if difference < 0.02:
        raise SystemExit(f"{model}: old and new weights answer too much alike ({difference:.2g}) to check an update")
    return Archives(model, model_store, request_body(files["first"].inputs()), answers)


def request_body(inputs: dict[str, torch.Tensor]) -> bytes | dict[str, Any]:
    """Images as a `.npy` file, everything else as JSON."""
    if len(inputs) == 1 and next(iter(inputs.values())).dim() == 4:
        import numpy

        stream = io.BytesIO()
        numpy.save(stream, next(iter(inputs.values())).numpy())
        return stream.getvalue()
    return {name: tensor.tolist() for name, tensor in inputs.items()}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`; infinite when the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def as_settings_file(files: ModelFiles, backends: list[str], path: Path) -> Path:
    """The model's configuration with other backends, as JSON, for processes that read it without PyYAML."""
    section = {**files.config["handler"]["ts_handlers"], "backends": backends}
    path.write_text(json.dumps({"handler": {"ts_handlers": section}}), "utf-8")
    return path
