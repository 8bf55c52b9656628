"""How another process makes the model of a TorchServe handler: from its class and context, or from an unpacked archive.

A recipe of kind ``handler`` names a class and a context, one of kind ``torchserve`` an unpacked archive. Both run the
handler's `initialize` until it starts its model, and no further. See `ts_handlers.model.recipes`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ts_handlers.errors import UNDECODABLE, ModelError, SettingsError, one_line
from ts_handlers.model.recipes import Made
from ts_handlers.servers.torchserve.unpacking import MANIFEST
from ts_handlers.start import captured_start


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


def from_handler(
    module: str,
    model_name: str,
    model_dir: str,
    manifest: dict[str, Any],
    gpu_id: int | None,
    batch_size: int | None,
    config: dict[str, Any],
    part: str | None = None,
    **names: str,
) -> Made:
    """What a handler class starts when it is initialised with a context; the arguments are `handler_recipe`'s.

    With several submodels, `part` is the name of the source that is wanted.

    Raises
    ------
    ModelError
        It starts no model.
    """
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
    with captured_start() as found:
        handler.initialize(context)
    return _only(found, model_name, part)


def from_unpacked_archive(
    model_name: str,
    model_dir: str,
    gpu_id: int | None,
    config: dict[str, Any] | None,
    require_gpu: bool = False,
    part: str | None = None,
) -> Made:
    """What an unpacked archive starts when TorchServe's worker loads it; the arguments are `archive_recipe`'s.

    With several submodels, `part` is the name of the source that is wanted.

    Raises
    ------
    ModelError
        It starts no model, or there is no GPU and one is required.
    """
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
    with captured_start() as found:
        TsModelLoader().load(model_name, model_dir, handler, gpu_id, 1, None, True, _metrics(model_name))
    return _only(found, model_name, part)


def _only(found: list[Made], model_name: str, part: str | None) -> Made:
    if not found:
        raise ModelError(
            f"{model_name}: the handler starts no model that could be built ahead; it must be a CompiledHandlerMixin, "
            "and its archive must hold a model file or an exported program"
        )
    made = next((each for each in found if part is None or each.source.name == part), None)
    if made is None:
        raise ModelError(f"{part}: the handler starts {', '.join(each.source.name for each in found)} only")
    return made


def _metrics(model_name: str) -> Any:
    """TorchServe's metrics with its own declarations; what a handler adds goes to this process's log."""
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

    metrics = MetricsCacheYamlImpl(os.path.join(os.path.dirname(ts.__file__), "configs", "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = model_name
    return metrics


def archive_recipe(
    directory: Path, device: str | None, config: Mapping[str, Any] | str | Path | None, model_name: str | None
) -> dict[str, Any]:
    """How another process loads an unpacked archive as TorchServe would; see `from_unpacked_archive`.

    The arguments are those of `prewarm`. Raises `ModelError` when the folder or the device is none.
    """
    gpu = _gpu_id(device)
    return {
        "kind": "torchserve",
        "model_name": model_name or _model_name(directory),
        "model_dir": str(directory),
        "gpu_id": gpu,
        "require_gpu": device is not None and gpu is not None,
        "config": _read_config(config),
    }


def recipes_of_parts(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """A recipe for each submodel that an archive's settings name, or the archive's own recipe where they name none.

    Parameters
    ----------
    recipe:
        What `archive_recipe` has returned.
    """
    config = recipe["config"]
    if config is None:
        directory = Path(recipe["model_dir"])
        try:
            file = json.loads((directory / MANIFEST).read_text("utf-8"))["model"].get("configFile")
        except (OSError, KeyError, TypeError, AttributeError, *UNDECODABLE):
            return [recipe]
        config = _read_config(directory / file) if isinstance(file, str) else {}
    section: Any = config
    for key in ("handler", "ts_handlers", "models"):
        section = section.get(key) if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or not section:
        return [recipe]
    return [{**recipe, "part": f"{recipe['model_name']}.{name}"} for name in section]


def _model_name(directory: Path) -> str:
    try:
        return str(json.loads((directory / MANIFEST).read_text("utf-8"))["model"]["modelName"])
    except (OSError, KeyError, TypeError, *UNDECODABLE) as error:
        raise ModelError(f"{MANIFEST} names no model: {type(error).__name__}: {error}") from error


def _gpu_id(device: str | None) -> int | None:
    """The GPU that TorchServe would give the worker; without a GPU the handler takes the CPU whatever this says."""
    kind, _, index = (device or "cuda").partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ModelError(f"device {device!r}: expected cpu, cuda or cuda:<index>")
    return None if kind == "cpu" else int(index or 0)


def _read_config(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any] | None:
    if config is None:
        return None
    if isinstance(config, Mapping):
        return dict(config)
    import yaml

    try:
        return dict(yaml.safe_load(Path(config).read_text("utf-8")) or {})
    except (OSError, TypeError, yaml.YAMLError, *UNDECODABLE) as error:
        raise SettingsError(f"{config} is no model-config.yaml: {one_line(error)}") from error
