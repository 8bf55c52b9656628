"""Model archives for the tests: a folder with a model file and a state dict, as TorchServe unpacks it."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch

from ts_handlers import ArchiveSource, Settings, parse_settings
from ts_handlers.model.archive_files import load_model_class

LINEAR = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)
"""

TWO_LAYERS = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 8)
        self.second = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))
"""

# `int(...)` of a tensor breaks the graph in two, and decides which branch is taken.
GRAPH_BREAK = """
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 8)
        self.second = torch.nn.Linear(8, 2)

    def forward(self, x, *, factor):
        hidden = torch.relu(self.first(x)) * factor
        if int(hidden.isnan().sum()):
            return hidden[:, :2]
        return self.second(hidden).softmax(-1)
"""

LINEAR_SECTION: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
    "dimensions": {"batch": {"min": 1, "max": 8}},
}


def write_archive(directory: Path, code: str = LINEAR, *, seed: int | None = 0, weights: str = "model.pt") -> Path:
    """Write ``model.py`` and, unless `seed` is None, the state dict that the seed gives; returns the folder."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.py").write_text(textwrap.dedent(code), "utf-8")
    if seed is not None:
        write_weights(directory, seed, weights)
    return directory


def write_weights(directory: Path, seed: int, name: str = "model.pt") -> dict[str, torch.Tensor]:
    """Replace the weights by those of a seed and return them."""
    torch.manual_seed(seed)
    state = load_model_class(directory / "model.py")().state_dict()
    save_weights(directory / name, state)
    return state


def save_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a state dict to a new file, so that nobody's mapping of the old one changes."""
    path.unlink(missing_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)


def archive_source(directory: Path, weights: str | None = "model.pt", **options: Any) -> ArchiveSource:
    """The archive of `write_archive` as a source."""
    return ArchiveSource(options.pop("name", "model"), directory, "model.py", weights, **options)


def eager_model(directory: Path) -> torch.nn.Module:
    """The archive's model, built without any help of the package, in eval mode."""
    module = load_model_class(directory / "model.py")()
    module.load_state_dict(torch.load(directory / "model.pt", weights_only=True))
    return module.eval()


def settings_of(section: dict[str, Any] | None = None, **changes: Any) -> Settings:
    """Settings from a section of model-config.yaml."""
    return parse_settings({"handler": {"ts_handlers": {**(LINEAR_SECTION if section is None else section), **changes}}})
