"""`prewarm`: build the artifacts of a model archive without serving it, for images made in CI and init containers."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ts_handlers.errors import BuildError
from ts_handlers.servers.torchserve.recipes import archive_recipe, recipes_of_parts
from ts_handlers.servers.torchserve.unpacking import unpacked
from ts_handlers.settings.sections import BackgroundSettings
from ts_handlers.startup.build_process import BuildProcess, OnPhase

Progress = Callable[[str, float, "float | None"], None]


@dataclasses.dataclass(frozen=True)
class Prewarmed:
    """What `prewarm` has left in the store.

    `result` is ``built``, ``hit`` (it was there), ``waited`` (another process has built it meanwhile), ``eager`` (no
    backend of the fallback order works) or ``failed``, with `reason`. `fallbacks` names the backends that failed on the
    way, `published` says whether the entry is in the store for others to find.

    An archive with submodels has one in `parts` for each of them, and is itself what the worst of them is.
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
    parts: tuple[Prewarmed, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the first backend's artifact is in the store, so that the next start is a hit."""
        if self.parts:
            return all(part.ok for part in self.parts)
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

    Runs in a process of its own, which imports the archive's handler and runs its `initialize` until it
    starts its model. Needs TorchServe. Number of threads (``OMP_NUM_THREADS``), torch, compiler and, for a
    GPU, the GPU must be those of the serving machine: they are part of the key. What has failed before is tried again.

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
        recipes = recipes_of_parts(archive_recipe(directory, device, config, model_name))
        overrides = {"on_miss": "compile", **({} if store is None else {"store": os.path.abspath(store)})}
        bounds = limits or BackgroundSettings(nice=0, compile_threads=len(os.sched_getaffinity(0)))
        done = [_build(recipe, directory, overrides, bounds, report) for recipe in recipes]
    if "part" not in recipes[0]:
        return done[0]
    worst = min(done, key=lambda each: (each.ok, each.result != "failed"))
    seconds = round(sum(each.seconds for each in done), 1)
    return dataclasses.replace(worst, model=recipes[0]["model_name"], seconds=seconds, parts=tuple(done))


def _build(
    recipe: dict[str, Any], directory: Path, overrides: dict[str, Any], bounds: BackgroundSettings, report: OnPhase
) -> Prewarmed:
    """Build one model in a process of its own."""
    started = time.monotonic()
    name = recipe.get("part") or recipe["model_name"]
    spec: dict[str, Any] = {
        "source": recipe,
        "search": [str(directory)],
        "settings": None,
        "overrides": overrides,
        "device": None,
        "threads": None,
        "float32_matmul": None,
        "retry_failed": True,
        "keys": {},
    }
    report("process", None)
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
