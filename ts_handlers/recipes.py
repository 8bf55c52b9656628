"""Sources from recipes: how a build process makes the model that another process serves.

A recipe is JSON-compatible; its ``kind`` is one of

- ``archive``, ``exported``: the arguments of `ArchiveSource` or `ExportedSource`
- ``handler``: a handler class and the context that TorchServe gave it
- ``torchserve``: an unpacked archive, loaded as TorchServe's worker loads it

The latter two run the handler's `initialize` up to the moment at which it starts its model, and no further.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import torch

from ts_handlers.errors import ModelError
from ts_handlers.exported_source import ExportedSource
from ts_handlers.model_source import ArchiveSource, ModelSource, Recipe
from ts_handlers.settings import Settings


class Made(NamedTuple):
    """A source, and the settings and the device of the handler that it came from, if it came from one."""

    source: ModelSource
    settings: Settings | None = None
    device: torch.device | None = None


def make_source(recipe: Recipe) -> Made:
    """Make the source that a recipe describes.

    Raises
    ------
    ModelError
        The handler starts no model, or what it needs is not there.
    """
    arguments = {name: value for name, value in recipe.items() if name != "kind"}
    if recipe["kind"] == "archive":
        return Made(ArchiveSource(**arguments))
    if recipe["kind"] == "exported":
        return Made(ExportedSource(**arguments))
    found: list[Made] = []
    make = _initialize_handler if recipe["kind"] == "handler" else _load_as_torchserve
    with _capture(found):
        make(**arguments)
    if not found:
        raise ModelError(
            f"{recipe['model_name']}: the handler starts no model that could be built ahead; it must be a "
            "CompiledHandlerMixin, and its archive must hold a model file or an exported program"
        )
    return found[0]


def handler_recipe(kind: type, context: Any, config: dict[str, Any]) -> dict[str, Any] | None:
    """How another process makes a handler, to take its model from it; None when it cannot import the class.

    Parameters
    ----------
    kind:
        The handler's class.
    context:
        What TorchServe gave it.
    config:
        The parsed model-config.yaml.
    """
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        return None
    properties = context.system_properties
    return {
        "kind": "handler",
        "module": kind.__module__,
        "class": kind.__qualname__,
        "model_name": context.model_name,
        "model_dir": os.path.abspath(properties.get("model_dir")),
        "manifest": copy.deepcopy(context.manifest),
        "gpu_id": properties.get("gpu_id"),
        "batch_size": properties.get("batch_size"),
        "config": config,
    }


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
        - ``threads``, ``float32_matmul``: state of torch that is part of keys, or None for torch's defaults
    """
    os.chdir(spec["directory"])
    made = make_source(spec["source"])
    settings = made.settings if spec["settings"] is None else msgspec.convert(spec["settings"], Settings)
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


class _Captured(BaseException):
    """Ends a handler's `initialize`; no Exception, so that nobody takes it for a failure."""


@contextlib.contextmanager
def _capture(found: list[Made]) -> Iterator[None]:
    """Inside the block, a handler that is about to start its model leaves the source in `found` instead."""
    from ts_handlers.handler import CompiledHandlerMixin

    def start(handler: Any, source: ModelSource) -> Any:
        found.append(Made(source, handler.settings, handler.model_device))
        raise _Captured

    original = CompiledHandlerMixin._start
    CompiledHandlerMixin._start = start  # type: ignore[method-assign,assignment]
    try:
        yield
    except _Captured:
        pass
    except Exception:
        if not found:
            raise
    finally:
        CompiledHandlerMixin._start = original  # type: ignore[method-assign]


def _initialize_handler(
    module: str,
    model_name: str,
    model_dir: str,
    manifest: dict[str, Any],
    gpu_id: int | None,
    batch_size: int | None,
    config: dict[str, Any],
    **names: str,
) -> None:
    import ts
    from ts.context import Context

    kind: Any = functools.reduce(getattr, names["class"].split("."), importlib.import_module(module))
    context = Context(
        model_name,
        model_dir,
        manifest,
        batch_size,
        gpu_id,
        ts.__version__,
        metrics=_metrics(model_name),
        model_yaml_config=config,
    )
    handler: Any = kind()
    handler.initialize(context)


def _load_as_torchserve(
    model_name: str, model_dir: str, gpu_id: int | None, config: dict[str, Any] | None, require_gpu: bool = False
) -> None:
    """Load an unpacked archive; `config` takes the place of its model-config.yaml."""
    from ts import service
    from ts.model_loader import TsModelLoader

    if require_gpu and not torch.cuda.is_available():
        raise ModelError("there is no CUDA GPU here; build where the model will run, or with the device cpu")
    with open(os.path.join(model_dir, "MAR-INF", "MANIFEST.json"), encoding="utf-8") as file:
        handler = json.load(file)["model"]["handler"]
    if model_dir not in sys.path:
        sys.path.insert(0, model_dir)
    if config is not None:
        service.get_yaml_config = lambda path: config
    # The batch size is the frontend's, and no part of the model.
    TsModelLoader().load(model_name, model_dir, handler, gpu_id, 1, None, True, _metrics(model_name))


def _metrics(model_name: str) -> Any:
    """TorchServe's metrics with its own declarations; what a handler adds goes to this process's log."""
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    metrics = MetricsCacheYamlImpl(os.path.join(os.path.dirname(ts.__file__), "configs", "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = model_name
    return metrics
