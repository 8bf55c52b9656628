"""Recovery of a build that ran out of disk space: make room in the store, or say what was full and what to do."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from ts_handlers.errors import DiskFullError, one_line
from ts_handlers.metrics import Metrics
from ts_handlers.settings.sections import SpaceSettings
from ts_handlers.store.upkeep.eviction import Quotas
from ts_handlers.store.upkeep.space import make_room
from ts_handlers.system.locked_directory import empty_folder

logger = logging.getLogger(__name__)


def make_room_for_build(
    root: Path, staging: Path, space: SpaceSettings, model: str, metrics: Metrics, error: Exception
) -> None:
    """Empty `staging`, and tidy the store if it lies on the disk that is full.

    Parameters
    ----------
    root:
        The store's folder.
    staging:
        Where the build has failed with `error`.

    Raises
    ------
    DiskFullError
        Nothing came of it; with the folders, their free bytes and the remedy.
    """
    empty_folder(staging)
    folders = [staging.parent, Path(tempfile.gettempdir())]
    free = {folder: shutil.disk_usage(folder).free for folder in folders}  # what the build had
    full = min(folders, key=free.__getitem__)
    if os.stat(full).st_dev == os.stat(root).st_dev:
        report = make_room(root, Quotas.of(space.store), Quotas.of(space.per_model))
        metrics.count("evicted", report.evicted)
        if report.freed_bytes > 0:
            logger.info("%s: freed %d bytes in %s, building again", model, report.freed_bytes, root)
            return
    found = ", ".join(f"{count} bytes in {folder}" for folder, count in free.items())
    raise DiskFullError(
        f"no space left: the build had {found}; free some, evict entries with `ts-handlers gc --max-bytes SIZE`, "
        f"or move the store (TS_HANDLERS_CACHE) or the temporary folder (TMPDIR); {one_line(error)}",
        {str(full): free[full]},
    ) from error
