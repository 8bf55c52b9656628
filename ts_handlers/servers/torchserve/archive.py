"""From an unpacked archive and TorchServe's context to a model source: which file of the archive is what.

An archive holds one of

- a model file and, unless the model has none, weights: `ts_handlers.model.archive.ArchiveSource`, built from the model
  file or as the handler class says
- an exported program, a serialized file that ends with ``.pt2``: `ts_handlers.model.exported.ExportedSource`
- a TorchScript model, which `BaseHandler` loads by itself
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ts_handlers.errors import ModelError
from ts_handlers.model.archive import ArchiveSource
from ts_handlers.model.base import ModelSource, Recipe
from ts_handlers.model.exported import ExportedSource
from ts_handlers.servers.torchserve.base_handler import BaseHandler
from ts_handlers.settings import Settings

Build = Callable[[], torch.nn.Module]
_NOTHING_LOADED = "No model weights could be loaded"
"""What `BaseHandler` raises when it knows no way to load an archive."""
_WEIGHTS = (".pth", ".safetensors")
EXPORTED = "exported program"
"""Stands in the manifest as the model file while `BaseHandler` looks at an exported program."""


class ArchiveFiles(NamedTuple):
    """What `BaseHandler.initialize` passes to `_load_pickled_model`: paths of a folder, a file name, a path or None."""

    model_dir: str
    model_file: str
    weights_path: str | None


@contextlib.contextmanager
def refusing_weights_alone(manifest: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block, `BaseHandler` finds no model: weights without a model file are then a `ModelError`.

    A handler whose own `initialize` loads the weights never meets it.

    Parameters
    ----------
    manifest:
        The entry ``model`` of the archive's manifest.
    """
    try:
        yield
    except RuntimeError as error:
        serialized = manifest.get("serializedFile", "")
        if str(error) != _NOTHING_LOADED or manifest.get("modelFile") or not serialized.endswith(_WEIGHTS):
            raise
        raise ModelError(
            f"the archive holds weights ({serialized}) but no model file; name the file of its class with "
            "--model-file when the archive is built, or load the weights in the handler's own initialize"
        ) from error


class _WithoutCompilation(dict[str, Any]):
    """A model-config.yaml in which `BaseHandler` finds no section ``pt2``; whoever reads the section gets it."""

    def __contains__(self, key: object) -> bool:
        return key != "pt2" and super().__contains__(key)


@contextlib.contextmanager
def prepared_for_base_handler(context: Any, config: Mapping[str, Any], *, hide_gpu: bool) -> Iterator[None]:
    """Change TorchServe's context for the time in which `BaseHandler.initialize` reads it, and restore it afterwards.

    Inside the block `BaseHandler` does not find ``pt2: compile``, since compilation is ours; it loads what
    ``pt2: export`` has left. An exported program looks like a model file, which sends `BaseHandler` to
    `_load_pickled_model`.

    Parameters
    ----------
    context:
        What TorchServe gave the handler.
    config:
        The parsed model-config.yaml.
    hide_gpu:
        Leave out the worker's GPU: with ``across_workers`` the model's process has it, and a CUDA context in each
        worker would be for nothing.
    """
    manifest, properties = context.manifest["model"], context.system_properties
    gpu = properties.get("gpu_id")
    exported = not manifest.get("modelFile") and manifest.get("serializedFile", "").endswith(".pt2")
    if exported:
        manifest["modelFile"] = EXPORTED
    if hide_gpu:
        properties["gpu_id"] = None
    pt2 = config.get("pt2")
    export = isinstance(pt2, Mapping) and "export" in pt2 and "compile" not in pt2
    context.model_yaml_config = config if export else _WithoutCompilation(config)
    try:
        yield
    finally:
        properties["gpu_id"] = gpu
        context.model_yaml_config = config
        if exported:
            del manifest["modelFile"]


def gpu_of_worker(context: Any) -> torch.device | None:
    """The GPU that TorchServe has given this worker; None for the CPU."""
    gpu = context.system_properties.get("gpu_id")
    return None if gpu is None or not torch.cuda.is_available() else torch.device("cuda", int(gpu))


def source_of_archive(
    name: str, kind: type, files: ArchiveFiles, settings: Settings, build: Build | None, recipe: Recipe | None
) -> ModelSource:
    """The source of an archive that has a model file or an exported program.

    Parameters
    ----------
    name:
        The model's name.
    kind:
        The handler's class.
    files:
        What `BaseHandler` has found.
    settings:
        The model's settings.
    build:
        The handler's own way of building the eager model, see `own_build`; None builds it from the model file.
    recipe:
        How another process makes this source.
    """
    if files.model_file == EXPORTED:
        assert files.weights_path is not None
        return ExportedSource(name, files.weights_path)
    directory = Path(files.model_dir)
    handler_file = _handler_file(kind, directory)
    ignored = [*settings.key_files_ignored, *settings.sample_files]
    if handler_file is not None and build is None:  # otherwise it shapes the model, and belongs to the key
        ignored.append(handler_file)
    return ArchiveSource(
        name,
        directory,
        files.model_file,
        None if files.weights_path is None else os.path.relpath(files.weights_path, files.model_dir),
        build=build,
        ignored_files=ignored,
        mmap=_may_map(settings, directory),
        recipe=recipe,
    )


def own_build(load_model: Callable[..., Any] | None, below: Any, files: ArchiveFiles) -> Build | None:
    """The handler's own way of building the eager model; None when there is none.

    Parameters
    ----------
    load_model:
        The handler's `load_model` if its class overrides it.
    below:
        The bound method `_load_pickled_model` of the class below the mixin.
    files:
        Their arguments.
    """
    if load_model is not None:
        return functools.partial(load_model, *files)
    if below.__func__ is not BaseHandler._load_pickled_model:
        return functools.partial(below, *files)
    return None


def _handler_file(kind: type, directory: Path) -> str | None:
    """The archive's handler file, relative to the archive's folder: the one that defines the handler's class."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:
        return None
    path = Path(os.path.realpath(file))
    root = Path(os.path.realpath(directory))
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else None


def _may_map(settings: Settings, directory: Path) -> bool:
    if settings.mmap != "auto":
        return settings.mmap == "always"
    # With a no-archive model TorchServe links the user's own folder: a file overwritten in place would change under the
    # mapping.
    return not os.path.islink(str(directory).rstrip("/"))
