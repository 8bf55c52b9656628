"""The store that settings ask for, or a temporary one when it cannot be used."""

from __future__ import annotations

import functools
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ts_handlers.errors import StoreError, one_line
from ts_handlers.key.digests import DigestFile, digest_file
from ts_handlers.metrics import Metrics
from ts_handlers.settings import Settings, default_store_root
from ts_handlers.store.base import Store
from ts_handlers.store.local.layout import REMOTE
from ts_handlers.store.local.store import LocalStore
from ts_handlers.store.local.verified import known_digest

if TYPE_CHECKING:
    from ts_handlers.settings.sections import RemoteSettings
    from ts_handlers.store.remote.base import Remote
    from ts_handlers.store.remote.lease import LeaseService

logger = logging.getLogger(__name__)


def weights_digester(settings: Settings) -> DigestFile:
    """What digests an archive's weights: remembered in the store between processes, unless ``verify: always``."""
    if settings.verify == "always":
        return digest_file
    return functools.partial(known_digest, Path(settings.store or default_store_root()).expanduser())


def open_store(settings: Settings, metrics: Metrics) -> tuple[Store, str | None]:
    """Open the store, in front of the remote one if there is one; a temporary one and the reason when it is unusable.

    Raises
    ------
    StoreError
        The store cannot be used and `strict` is set.
    """
    local, problem = _open_local(settings)
    if settings.remote is None:
        return local, problem
    from ts_handlers.store.remote.budget import TimeBudget

    budget = TimeBudget(settings.remote.timeout_seconds)
    with budget.counting():  # the imports count too
        from ts_handlers.store.remote.objects import RemoteObjects
        from ts_handlers.store.remote.read_only import ReadOnlyRemote
        from ts_handlers.store.remote.signing import load_keyring
        from ts_handlers.store.tiered.store import TieredStore

        state = local.root / REMOTE
        remote: Remote = RemoteObjects(settings.remote, state, budget)
        if settings.remote.read_only:
            remote = ReadOnlyRemote(remote)
        leases = _open_leases(settings.remote, remote, state)
        return TieredStore(local, remote, lambda: load_keyring(settings.trust), leases, metrics), problem


def _open_leases(settings: RemoteSettings, remote: Remote, state: Path) -> LeaseService | None:
    if settings.lease == "off":
        return None
    if settings.lease == "auto":
        from ts_handlers.store.remote.object_lease import ObjectLeases

        return ObjectLeases(remote)
    from ts_handlers.store.remote.redis_lease import RedisLeases

    return RedisLeases(settings.lease, settings.timeout_seconds, settings.heartbeat_seconds, state)


def _open_local(settings: Settings) -> tuple[LocalStore, str | None]:
    try:
        root = settings.store or default_store_root()
        return LocalStore(root, settings.trust.folders, verify=settings.verify), None
    except StoreError as error:
        if settings.strict:
            raise
        logger.warning("%s; using a temporary store, so nothing is kept", error)
        temporary = tempfile.TemporaryDirectory(prefix="ts_handlers-store-")
        # Whoever can replace this folder can also replace the model's Python files, which the server unpacks beside it.
        store = LocalStore(temporary.name, [str(folder) for folder in Path(temporary.name).parents])
        store.keep_alive = temporary
        return store, one_line(error)
