"""Builds the archives that the serving tests load: one sound model in two versions, and broken ones."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import torch

TINY = Path(__file__).parents[1] / "torchserve" / "tiny"
TOKENS = TINY.with_name("tokens")
SCRIPTS = Path(__file__).parents[2] / "scripts"
ROWS = [[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -3.0, 0.25]]
"""A request of two rows."""


def load_script(name: str) -> ModuleType:
    """A module of the folder scripts/, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def make_model(seed: int, directory: Path = TINY) -> torch.nn.Module:
    """The tiny model, or another one, with the weights of a seed."""
    torch.manual_seed(seed)
    return load_script("build_archives").load_model(directory)


def expected(seed: int, rows: list[list[float]], directory: Path = TINY) -> list[list[float]]:
    """The eager model's answer."""
    with torch.inference_mode():
        return make_model(seed, directory)(torch.tensor(rows)).tolist()


class ArchiveFactory:
    """Writes variants of the tiny model into a model store."""

    def __init__(self, model_store: Path, work: Path) -> None:
        self.model_store = model_store
        self._work = work

    def tiny(
        self,
        name: str,
        *,
        seed: int = 1,
        version: str = "1.0",
        file_name: str | None = None,
        replace: dict[str, tuple[str, str]] | None = None,
        truncate_weights: bool = False,
    ) -> Path:
        """Pack the tiny model; `replace` maps a file name to (text, its replacement)."""
        directory = self._work / (file_name or name)
        shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("__pycache__"))
        for file, (old, new) in (replace or {}).items():
            text = (directory / file).read_text("utf-8")
            assert old in text, f"{file} does not hold {old!r}"
            (directory / file).write_text(text.replace(old, new), "utf-8")
        weights = directory / "model.pt"
        torch.save(make_model(seed).state_dict(), weights)
        if truncate_weights:
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        path: Path = load_script("build_archives").write_archive(
            name, directory, self.model_store, version=version, file_name=file_name
        )
        return path

    def tokens(self, name: str, *, seed: int = 1) -> None:
        """Pack the model that looks token ids up."""
        directory = self._work / name
        shutil.copytree(TOKENS, directory, ignore=shutil.ignore_patterns("__pycache__"))
        torch.save(make_model(seed, TOKENS).state_dict(), directory / "model.pt")
        load_script("build_archives").write_archive(name, directory, self.model_store)

    def without_weights(self, name: str) -> Path:
        """A tiny model whose archive names a weights file and does not hold it."""
        path = self.tiny(name)
        whole = path.rename(path.with_suffix(".whole"))
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
            for item in source.infolist():
                if item.filename != "model.pt":
                    target.writestr(item, source.read(item))
        whole.unlink()
        return path
