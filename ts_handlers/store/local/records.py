"""The small records of a local store: canaries, and the names of what models read from outside their archives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ts_handlers.key.names import NO_NAMES, Names, names_digest
from ts_handlers.store.address import Address, safe_weights
from ts_handlers.store.canaries import check_canary_bytes, encode_canary, load_record, record_canary_use
from ts_handlers.store.local.layout import CANARIES, OUTSIDE
from ts_handlers.store.local.ownership import NotOursError, OwnedTree, make_private_folders
from ts_handlers.store.outside import encode_names, read_names
from ts_handlers.system.files import is_temporary, write_atomically

logger = logging.getLogger(__name__)


class Records:
    """Records below `root`, each one file, written beside and renamed.

    Parameters
    ----------
    root:
        The store's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def _canary(self, address: Address, weights_digest: str) -> Path:
        return self.root / CANARIES / address.key.digest / safe_weights(weights_digest)

    def read_canary(self, address: Address, weights_digest: str) -> dict[str, Any] | None:
        """The recorded canary, or None when there is none or it is damaged; its use is recorded."""
        record = self._load_canary(address, weights_digest)
        if record is not None:
            record_canary_use(self._canary(address, weights_digest))
        return record

    def _load_canary(self, address: Address, weights_digest: str) -> dict[str, Any] | None:
        path = self._canary(address, weights_digest)
        try:
            data = path.read_bytes()
            with OwnedTree(self.root) as tree:
                tree.status(path.relative_to(self.root).as_posix())
            return load_record(check_canary_bytes(f"{path.parent.name}/{path.name}", data))
        except OSError:
            return None
        except (ValueError, NotOursError) as error:
            logger.warning("the canary of %s will be recorded again: %s", address.key.digest, error)
            return None

    def canaries(self, address: Address) -> list[str]:
        """The weights digests for which there is a readable canary record."""
        try:
            names = sorted(path.name for path in self._canary(address, "").parent.iterdir())
        except OSError:
            return []
        return [name for name in names if not is_temporary(name) and self._load_canary(address, name) is not None]

    def write_canary(self, address: Address, weights_digest: str, record: dict[str, Any]) -> bool:
        """Record a canary by writing beside and renaming; False when the store cannot be written."""
        path = self._canary(address, weights_digest)
        try:
            make_private_folders(path.parent, self.root)
            write_atomically(path, encode_canary(f"{path.parent.name}/{path.name}", record), durable=True)
        except OSError as error:
            logger.warning("the canary of %s could not be recorded: %s", address.key.digest, error)
            return False
        return True

    def read_outside(self, base: str) -> Names:
        """See `Store`; a damaged record is as good as none."""
        names = NO_NAMES
        try:
            records = sorted(path for path in (self.root / OUTSIDE / base).iterdir() if not is_temporary(path.name))
        except OSError:
            return names
        for path in records:
            try:
                names |= read_names(path.name, path.read_bytes())
            except (OSError, ValueError) as error:
                logger.warning("the record %s/%s/%s is not used: %s", OUTSIDE, base, path.name, error)
        return names

    def write_outside(self, base: str, names: Names) -> bool:
        """See `Store`; nothing is written that is known."""
        if names <= self.read_outside(base):
            return True
        path = self.root / OUTSIDE / base / names_digest(names)
        try:
            make_private_folders(path.parent, self.root)
            write_atomically(path, encode_names(names), durable=True)
        except OSError as error:
            logger.warning("what the model of %s reads could not be recorded: %s", base, error)
            return False
        return True
