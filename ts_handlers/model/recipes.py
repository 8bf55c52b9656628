"""Sources from recipes: how another process makes the model that this one serves.

A recipe is JSON-compatible. Its ``kind`` is a key of `MAKERS`, and its other fields are the maker's arguments.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import torch

from ts_handlers.errors import ModelError
from ts_handlers.model.base import ModelSource, Recipe
from ts_handlers.settings import Settings
from ts_handlers.system.decoding import convert

MAKERS = {
    "archive": "ts_handlers.model.archive:ArchiveSource",
    "exported": "ts_handlers.model.exported:ExportedSource",
    "handler": "ts_handlers.servers.torchserve.recipes:from_handler",
    "torchserve": "ts_handlers.servers.torchserve.recipes:from_unpacked_archive",
}
"""What makes a source of each kind: a class of sources, or a function that returns `Made`; imported when needed."""


class Made(NamedTuple):
    """A source, and the settings and the device of the handler that it came from, if it came from one.

    `told_by_samples` tells whether the inputs in the settings are those that samples have told.
    """

    source: ModelSource
    settings: Settings | None = None
    device: torch.device | None = None
    told_by_samples: bool = False


def make_source(recipe: Recipe) -> Made:
    """Make the source that a recipe describes.

    Raises
    ------
    ModelError
        The handler starts no model, or what it needs is not there.
    """
    location = MAKERS.get(recipe["kind"])
    if location is None:
        raise ModelError(
            f"no model can be made from a recipe of kind {recipe['kind']!r}; known are {', '.join(MAKERS)}"
        )
    module, _, name = location.partition(":")
    made = getattr(importlib.import_module(module), name)(**{k: value for k, value in recipe.items() if k != "kind"})
    return made if isinstance(made, Made) else Made(made)


class Restored(NamedTuple):
    """What a child process starts."""

    source: ModelSource
    settings: Settings
    device: torch.device


def restore(spec: Mapping[str, Any]) -> Restored:
    """In a child process: make the source, and set up torch as it is in the process that asked for it.

    Parameters
    ----------
    spec:
        JSON-compatible:

        - ``directory``: the working directory
        - ``source``: a recipe
        - ``settings``: the whole settings, or None to take the handler's own
        - ``overrides``: settings to change, by name
        - ``device``: where to start, or None to take the handler's device
        - ``environment``: variables that the model reads, as they were before its own code could change them, None for
          one that was not set; may be missing
        - ``threads``, ``float32_matmul``: state of torch that is part of keys, or None for torch's defaults
    """
    os.chdir(spec["directory"])
    for name, value in spec.get("environment", {}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    made = make_source(spec["source"])
    settings = made.settings if spec["settings"] is None else convert(spec["settings"], Settings)
    assert settings is not None
    contexts = msgspec.structs.replace(settings.contexts, across_workers=False)  # the child is that process, or builds
    settings = msgspec.structs.replace(settings, contexts=contexts, **spec["overrides"])
    device = made.device if spec["device"] is None else torch.device(spec["device"])
    assert device is not None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if spec["threads"] is not None:
        torch.set_num_threads(spec["threads"])
    if spec["float32_matmul"] is not None:
        torch.set_float32_matmul_precision(spec["float32_matmul"])
    return Restored(made.source, settings, device)
