"""The model of a worker whose server holds it in another process: `SharedModel`, and `join_model`, which makes one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from ts_handlers.backends.base import Target
from ts_handlers.compiled_model import ServedModel
from ts_handlers.errors import BusyError, InputError, SettingsError, WarmStartError
from ts_handlers.execution.contexts import PoolStats
from ts_handlers.execution.outcome import Outcome
from ts_handlers.key.outside import declared_names, outside_part
from ts_handlers.metrics import COUNTERS, Metrics
from ts_handlers.model.archive import IGNORED_FILES, files_of_model
from ts_handlers.model.base import ModelSource, Recipe
from ts_handlers.model.explanations import explanations_under_way
from ts_handlers.model.signature import Signature
from ts_handlers.model_process.client import ModelProcess
from ts_handlers.model_process.launch import Launcher, parent_identity
from ts_handlers.model_process.wire import ModelDescription
from ts_handlers.monitoring.recorder import recorder_of
from ts_handlers.settings import SECTION, Settings
from ts_handlers.version import __version__

logger = logging.getLogger(__name__)


class SharedModel(ServedModel):
    """A model that another process holds: takes and gives tensors on the CPU, and is called like any other.

    Parameters
    ----------
    target:
        The model as this worker would start it on the CPU.
    process:
        Joined already.
    description:
        What it said then.
    join_ms:
        How long that took, in milliseconds.
    """

    def __init__(self, target: Target, process: ModelProcess, description: ModelDescription, join_ms: float) -> None:
        facts = description.facts
        names = [field.name for field in dataclasses.fields(Outcome)]
        outcome = Outcome(**{name: _frozen(facts[name]) for name in names})
        super().__init__(target, outcome, Metrics.of_this_process())
        recorder = self.metrics.recorder = recorder_of(target.source.name)
        self._signature = target.signature or Signature(description.inputs, description.dimensions)
        # Only the other process can tell whether it answers a call outside the declared ranges eagerly.
        self._checks_here = target.settings.outside == "refuse"
        self._process = process
        self._description = description
        self._join_ms = join_ms
        self._stats = PoolStats()
        self._stats_lock = threading.Lock()
        self.metrics.build_ms.update(facts["build_ms"])
        if description.first:
            self.metrics.phases_ms.update({k: v for k, v in facts["phases_ms"].items() if k != "process"})
        else:
            self.metrics.phases_ms["wait"] = join_ms
        self.absorb(description.counted)
        if recorder is not None:
            recorder.begin()
            seconds = (join_ms + self.metrics.phases_ms.get("process", 0.0)) / 1000
            joined = outcome if description.first else dataclasses.replace(outcome, result="joined")
            recorder.started(joined, self.metrics, seconds)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if explanations_under_way():
            return self._explain(args, kwargs)
        signature = self._signature
        try:
            try:
                tensors = signature.bind(args, kwargs, self._target.device)
                if self._checks_here:
                    signature.check(tensors)
                return self._process.run(tensors)
            except InputError as refusal:
                return self._answer_other_form(signature, args, kwargs, refusal)
        except InputError as error:
            self.metrics.count_refusal("refused", error)
            raise
        except BusyError as error:
            self.metrics.count_refusal("busy", error)
            raise

    @property
    def signature(self) -> Signature:
        """What is declared; what nobody has declared, as the process read it from an exported program."""
        return self._signature

    def absorb(self, counted: Mapping[str, float]) -> None:
        """Count here what the process has counted and told to nobody else."""
        if not counted:
            return
        for name, amount in counted.items():
            if name in COUNTERS:
                self.metrics.count(name, int(amount))
        with self._stats_lock:
            before = self._stats
            self._stats = PoolStats(
                waited=before.waited + int(counted.get("waited", 0)),
                wait_seconds=before.wait_seconds + counted.get("wait_seconds", 0.0),
                refused=before.refused + int(counted.get("context_refused", 0)),
            )

    def close(self) -> None:
        """Leave the process, which ends when nobody is left; further calls fail."""
        self._process.close()

    def context_stats(self) -> PoolStats:
        """Waits for contexts that this worker reports; `describe` has those of all workers."""
        return self._stats

    def describe(self) -> dict[str, Any]:
        """What the process says, and under ``across_workers`` its id, the ids of its workers, and how often it ended.

        The counters are the process's, but for calls that this worker refused.
        """
        try:
            self._description = self._process.describe()
            reason = None
        except WarmStartError as error:
            reason = str(error)
        facts = dict(self._description.facts)
        counters = dict(facts["counters"])
        for name in ("refused", "busy"):
            counters[name] = self.metrics.counters[name]
        counters["outside_eager"] += sum(self._other_forms.values())
        facts["counters"] = counters
        facts["other_forms"] = dict(self._other_forms)
        facts["across_workers"] = {
            "pid": self._description.pid,
            "workers": sorted(self._description.workers),
            "joined": self._process.joined,
            "join_ms": round(self._join_ms, 1),
            "reason": reason,
        }
        return facts


def join_model(source: ModelSource, settings: Settings, device: torch.device) -> SharedModel:
    """The model that one process holds for all workers of this server; starts that process if there is none.

    Raises
    ------
    SettingsError
        No other process can make this model.
    WarmStartError
        What the start of the process failed with.
    """
    spec = _specification(source, settings, device)
    began = time.perf_counter()
    early: list[Mapping[str, float]] = []
    models: list[SharedModel] = []
    process = ModelProcess(
        Launcher(source.name, spec, settings.contexts),
        settings.contexts.wait_seconds,
        lambda counted: models[0].absorb(counted) if models else early.append(counted),
    )
    description = process.join()
    join_ms = (time.perf_counter() - began) * 1000
    model = SharedModel(Target(source, settings, torch.device("cpu")), process, description, join_ms)
    models.append(model)
    facts = {name: description.facts[name] for name in ("backend", "key", "result")}
    logger.info(
        "ts_handlers join %s",
        json.dumps({"model": source.name, "pid": description.pid, **facts, "join_ms": round(join_ms, 1)}),
    )
    for counted in early:
        model.absorb(counted)
    return model


def _specification(source: ModelSource, settings: Settings, device: torch.device) -> dict[str, Any]:
    """What the process starts from; workers with equal ones share it."""
    recipe = _recipe(source)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)  # asking for the current one would make a CUDA context here
    return {
        "name": source.name,
        "server": parent_identity(),
        "directory": os.getcwd(),
        "source": dict(recipe),
        "files": _stamps(recipe, settings.key_files_ignored),
        "outside": _declared(source, settings),
        "settings": msgspec.to_builtins(settings),
        "overrides": {},
        "device": str(device),
        "threads": torch.get_num_threads(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "package": [__version__, str(Path(__file__).parent.parent), sys.executable],
    }


def _declared(source: ModelSource, settings: Settings) -> str:
    """What the settings name outside the archive, with its values; what is only seen when the model is made is not."""
    names = declared_names(source.surroundings, settings.key_environment, settings.key_files)
    return outside_part(source.surroundings, names)


def _recipe(source: ModelSource) -> Recipe:
    """How the process makes the source; raises `SettingsError` when it cannot, or would make another one."""
    recipe = source.recipe()
    if recipe is None:
        raise SettingsError(
            f"{SECTION}.contexts.across_workers: no other process can make {source.name!r}: it exists in this process "
            "only, or its handler class is local; start it from an archive, or set across_workers: false"
        )
    try:
        travels = json.loads(json.dumps(recipe)) == recipe
    except (TypeError, ValueError):
        travels = False
    if not travels:
        raise SettingsError(
            f"{SECTION}.contexts.across_workers: {source.name!r} cannot be described to another process: its "
            "model-config.yaml holds something that JSON does not have, such as a date or keys that are numbers; "
            "put it into quotes, or set across_workers: false"
        )
    return recipe


def _stamps(recipe: Recipe, ignored: Sequence[str]) -> list[list[int | str]]:
    """Size and time of the files that shape the model, as the store's key sees it: if they change it is another one."""
    root = Path(recipe.get("directory") or recipe.get("model_dir") or recipe["path"])
    paths = files_of_model(root, (*IGNORED_FILES, *ignored)) if root.is_dir() else [root]
    stamps: list[list[int | str]] = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # something that a worker has written beside them for a moment
            status = path.stat()
            stamps.append([str(path), status.st_size, status.st_mtime_ns, status.st_ino])
    return stamps


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
