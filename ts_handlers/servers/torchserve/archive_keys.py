"""Cache keys of a model archive on this machine, to explain why a start of it would miss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ts_handlers.backends import get_backend
from ts_handlers.errors import ModelError
from ts_handlers.key.cache_key import CacheKey, explain
from ts_handlers.model.recipes import Made, make_source
from ts_handlers.servers.torchserve.recipes import archive_recipe, recipes_of_parts
from ts_handlers.servers.torchserve.unpacking import unpacked
from ts_handlers.startup.address import key_in_store
from ts_handlers.startup.observation import told_by_calls
from ts_handlers.startup.target import new_target
from ts_handlers.store.address import safe_name
from ts_handlers.store.base import Store
from ts_handlers.store.upkeep.scan import EntryInfo


@dataclasses.dataclass(frozen=True)
class ArchiveKey:
    """The key that a start of an archive's model would compute for one backend of its fallback order.

    `left_out` names attributes of the model that differ between processes and are therefore no part of the key.
    """

    model: str
    backend: str
    key: CacheKey
    left_out: tuple[str, ...] = ()


def archive_keys(
    archive: str | Path,
    store: Store,
    *,
    device: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    model_name: str | None = None,
) -> list[ArchiveKey]:
    """The keys of an archive on this machine, one for each backend that keeps artifacts, in the fallback order.

    An archive with submodels has those of each of them, one after the other.

    The archive's handler is imported into this process and run until it starts its model. Number of threads
    (``OMP_NUM_THREADS``) and torch must be those of the server: they are part of the key. `store` knows what making the
    model reads from outside the archive, whose values here are part of it too. The other parameters are those of
    `ts_handlers.servers.torchserve.prewarm.prewarm`.

    Raises
    ------
    ModelError, SettingsError
        It is no model archive, or its handler starts no model.
    """
    with unpacked(archive) as directory:
        recipes = recipes_of_parts(archive_recipe(directory, device, config, model_name))
        return [key for recipe in recipes for key in _keys(make_source(recipe), store, archive)]


def _keys(made: Made, store: Store, archive: str | Path) -> list[ArchiveKey]:
    if made.settings is None or made.device is None:
        raise ModelError(f"{archive}: its handler starts no model")
    target = told_by_calls(new_target(made.source, made.settings, made.device), store)
    backends = [get_backend(name) for name in target.settings.backends]
    keys = [(backend.name, key_in_store(backend, target, store)) for backend in backends if backend.persistent]
    left_out = getattr(made.source, "left_out", ())
    return [ArchiveKey(made.source.name, name, key, left_out) for name, key in keys]


def nearest_entry(wanted: ArchiveKey, entries: list[EntryInfo]) -> EntryInfo | None:
    """The readable entry of the same model and backend that differs in the fewest parts, or None."""

    def distance(entry: EntryInfo) -> int:
        assert entry.manifest is not None
        return len(explain(wanted.key, entry.manifest.cache_key))

    own = [entry for entry in entries if entry.model == safe_name(wanted.model) and entry.backend == wanted.backend]
    return min((entry for entry in own if entry.manifest is not None), key=distance, default=None)
