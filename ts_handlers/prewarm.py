"""Building a model archive's artifacts before anybody serves it: for images made in CI and for init containers."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ts_handlers.build_process import BuildProcess
from ts_handlers.errors import BuildError, ModelError
from ts_handlers.settings.sections import BackgroundSettings
from ts_handlers.unpacking import MANIFEST, unpacked

Progress = Callable[[str, float, "float | None"], None]


@dataclasses.dataclass(frozen=True)
class Prewarmed:
    """What `prewarm` has left in the store.

    `result` is ``built``, ``hit`` (it was there), ``waited`` (another process has built it meanwhile), ``eager`` (no
    backend of the ladder works) or ``failed``, with `reason`. `fallbacks` names the backends that failed on the way,
    `published` says whether the entry is in the store for others to find.
    """

    model: str
    result: str
    backend: str | None = None
    key: str | None = None
    published: bool = False
    device: str | None = None
    fallbacks: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    reason: str | None = None
    build_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the first backend's artifact is in the store, so that the next start is a hit."""
        return self.result in ("built", "hit", "waited") and self.published and not self.fallbacks


def prewarm(
    archive: str | Path,
    *,
    store: str | Path | None = None,
    device: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    model_name: str | None = None,
    limits: BackgroundSettings | None = None,
    progress: Progress | None = None,
) -> Prewarmed:
    """Build what a TorchServe worker would look for, under the same key, without serving.

    Runs in a process of its own, which imports the archive's handler and runs its `initialize` up to the moment at
    which it starts its model. Needs TorchServe. Number of threads (``OMP_NUM_THREADS``), torch, compiler and, for a
    GPU, the GPU must be those of the serving machine: they are part of the key. What has failed before is tried anew.

    Parameters
    ----------
    archive:
        A ``.mar`` or ``.tgz`` file, or the folder of a model (archive format ``no-archive``).
    store:
        Root of the store; None takes the archive's setting, then the default.
    device:
        ``cpu``, ``cuda`` or ``cuda:<index>``; None takes the first GPU if there is one.
    config:
        Takes the place of the archive's model-config.yaml: a mapping, or the path of a YAML file.
    model_name:
        The name under which TorchServe will serve it; None takes the manifest's.
    limits:
        Niceness, compile threads, memory and time; None sets no bound and lets the compiler use every processor.
    progress:
        Called when a phase begins, with its name, the seconds since the start and the seconds that the build took the
        last time (None when unknown).

    Returns
    -------
    A failed build is a result, not an exception.

    Raises
    ------
    ModelError
        `archive` is no model archive, or unpacking it is not safe.
    """
    started = time.monotonic()

    def report(phase: str, estimate: float | None) -> None:
        if progress is not None:
            progress(phase, time.monotonic() - started, estimate)

    report("unpack", None)
    with unpacked(archive) as directory:
        recipe = archive_recipe(directory, device, config, model_name)
        name = recipe["model_name"]
        spec: dict[str, Any] = {
            "source": recipe,
            "search": [str(directory)],
            "settings": None,
            "overrides": {"on_miss": "compile", **({} if store is None else {"store": os.path.abspath(store)})},
            "device": None,
            "threads": None,
            "float32_matmul": None,
            "retry_failed": True,
            "keys": {},
        }
        report("process", None)
        bounds = limits or BackgroundSettings(nice=0, compile_threads=len(os.sched_getaffinity(0)))
        try:
            facts = BuildProcess(name, spec, bounds, report).run()
        except BuildError as error:
            return Prewarmed(name, "failed", reason=str(error), seconds=round(time.monotonic() - started, 1))
    return Prewarmed(
        model=name,
        result=facts["result"],
        backend=facts["backend"],
        key=facts["key"],
        published=facts["key"] is not None and not facts["counters"]["publish_failed"],
        device=facts["device"],
        fallbacks=tuple(facts["fallbacks"]),
        notes=tuple(facts["notes"]),
        build_ms=facts["build_ms"],
        seconds=round(time.monotonic() - started, 1),
    )


def archive_recipe(
    directory: Path, device: str | None, config: Mapping[str, Any] | str | Path | None, model_name: str | None
) -> dict[str, Any]:
    """How another process loads an unpacked archive as TorchServe would; see `ts_handlers.recipes`.

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


def _model_name(directory: Path) -> str:
    try:
        return str(json.loads((directory / MANIFEST).read_text("utf-8"))["model"]["modelName"])
    except (OSError, ValueError, KeyError, TypeError) as error:
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

    return dict(yaml.safe_load(Path(config).read_text("utf-8")) or {})
