"""The records of a local store about calls of models whose inputs nobody has declared."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ts_handlers.store.local.layout import OBSERVED, OBSERVED_CALLS, OBSERVED_DECLARATION
from ts_handlers.store.local.ownership import NotOursError, OwnedTree, make_private_folders
from ts_handlers.system.files import write_atomically

if TYPE_CHECKING:
    from ts_handlers.model.declaration import Declaration
    from ts_handlers.model.observed_calls import ObservedCalls
    from ts_handlers.store.observed import CallsRecord

logger = logging.getLogger(__name__)


class ObservedRecords:
    """Records below `root`, each one file, written beside and renamed; their format: `ts_handlers.store.observed`."""

    root: Path

    def read_calls(self, identity: str) -> CallsRecord | None:
        """See `Store`; a damaged record is as good as none."""
        data = self._read_observed(identity, OBSERVED_CALLS)
        if data is None:
            return None
        from ts_handlers.store.observed import decode_calls

        try:
            return decode_calls(f"{identity}/{OBSERVED_CALLS}", data)
        except ValueError as error:
            self._not_used(identity, error)
            return None

    def add_calls(self, identity: str, calls: ObservedCalls) -> bool:
        """See `Store`."""
        from ts_handlers.model.observed_calls import ObservedCalls
        from ts_handlers.store.observed import CallsRecord

        before = self.read_calls(identity)
        merged = ObservedCalls() if before is None else before.calls
        merged.merge(calls)
        first = time.time() if before is None else before.first
        return self._write_observed(identity, OBSERVED_CALLS, CallsRecord(first, merged.kinds()))

    def read_declaration(self, identity: str) -> Declaration | None:
        """See `Store`; a damaged record is as good as none, and its use is recorded as its time."""
        data = self._read_observed(identity, OBSERVED_DECLARATION)
        if data is None:
            return None
        from ts_handlers.store.observed import decode_declaration

        try:
            found = decode_declaration(f"{identity}/{OBSERVED_DECLARATION}", data)
        except ValueError as error:
            self._not_used(identity, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(self._observed(identity, OBSERVED_DECLARATION).parent)
        return found

    def write_declaration(self, identity: str, declaration: Declaration) -> bool:
        """See `Store`."""
        return self._write_observed(identity, OBSERVED_DECLARATION, declaration)

    def _observed(self, identity: str, name: str) -> Path:
        return self.root / OBSERVED / identity / name

    def _read_observed(self, identity: str, name: str) -> bytes | None:
        path = self._observed(identity, name)
        try:
            data = path.read_bytes()
            with OwnedTree(self.root) as tree:
                tree.status(path.relative_to(self.root).as_posix())
        except FileNotFoundError:
            return None
        except (OSError, NotOursError) as error:
            self._not_used(identity, error)
            return None
        return data

    def _write_observed(self, identity: str, name: str, record: CallsRecord | Declaration) -> bool:
        from ts_handlers.store.observed import encode_record

        path = self._observed(identity, name)
        try:
            make_private_folders(path.parent, self.root)
            write_atomically(path, encode_record(f"{identity}/{name}", record), durable=True)
        except OSError as error:
            logger.warning("what is known of the calls of %s could not be recorded: %s", identity, error)
            return False
        return True

    def _not_used(self, identity: str, error: Exception) -> None:
        logger.warning("what was recorded of the calls of %s is not used: %s", identity, error)
