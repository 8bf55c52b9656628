"""The store that settings ask for, or a temporary one when it cannot be used."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from ts_handlers.digests import digest_file
from ts_handlers.errors import StoreError
from ts_handlers.settings import Settings, default_store_root
from ts_handlers.store.base import Store
from ts_handlers.store.local import LocalStore
from ts_handlers.store.verified import known_digest

logger = logging.getLogger(__name__)


def weights_digester(settings: Settings) -> Callable[[Path], str]:
    """What digests an archive's weights: remembered in the store between processes, unless ``verify: always``."""
    if settings.verify == "always":
        return digest_file
    return functools.partial(known_digest, Path(settings.store or default_store_root()).expanduser())


def open_store(settings: Settings) -> tuple[Store, str | None]:
    """Open the store; when it cannot be used, a temporary one and the reason.

    Raises
    ------
    StoreError
        The store cannot be used and `strict` is set.
    """
    try:
        root = settings.store or default_store_root()
        return LocalStore(root, settings.trust.folders, verify=settings.verify), None
    except StoreError as error:
        if settings.strict:
            raise
        logger.warning("%s; using a temporary store, so nothing is kept", error)
        temporary = tempfile.TemporaryDirectory(prefix="ts_handlers-store-")
        store = LocalStore(temporary.name, settings.trust.folders)
        store.keep_alive = temporary
        return store, re.sub(r"\s+", " ", str(error)).strip()[:400]
