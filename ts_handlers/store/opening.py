"""The store that settings ask for, or a temporary one when it cannot be used."""

from __future__ import annotations

import logging
import re
import tempfile

from ts_handlers.errors import StoreError
from ts_handlers.settings import Settings, default_store_root
from ts_handlers.store.base import Store
from ts_handlers.store.local import LocalStore

logger = logging.getLogger(__name__)


def open_store(settings: Settings) -> tuple[Store, str | None]:
    """Open the store; when it cannot be used, a temporary one and the reason.

    Raises
    ------
    StoreError
        The store cannot be used and `strict` is set.
    """
    try:
        return LocalStore(settings.store or default_store_root()), None
    except StoreError as error:
        if settings.strict:
            raise
        logger.warning("%s; using a temporary store, so nothing is kept", error)
        temporary = tempfile.TemporaryDirectory(prefix="ts_handlers-store-")
        store = LocalStore(temporary.name)
        store.keep_alive = temporary
        return store, re.sub(r"\s+", " ", str(error)).strip()[:400]
