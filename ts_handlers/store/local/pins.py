"""Keys that are never evicted: ``<root>/pins/<key>``, a file that holds a note for people.

A pin may stand before its entry is built and outlives it.
"""

from __future__ import annotations

import os
from pathlib import Path

from ts_handlers.store.local.layout import PINS


def is_pinned(root: Path, key: str) -> bool:
    """Whether entries of a key must stay; True also where that cannot be told."""
    try:
        os.lstat(root / PINS / key)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def pin(root: Path, key: str, note: str = "") -> None:
    """Keep the entries of a key. Raises `OSError` when the store cannot be written."""
    folder = root / PINS
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / key).write_text(note + "\n", encoding="utf-8")


def unpin(root: Path, key: str) -> bool:
    """Let the entries of a key go when room is needed; False when they were not pinned."""
    try:
        (root / PINS / key).unlink()
    except FileNotFoundError:
        return False
    return True


def pinned_keys(root: Path) -> dict[str, str]:
    """Every pinned key with its note."""
    try:
        return {path.name: path.read_text("utf-8", "replace").strip() for path in sorted((root / PINS).iterdir())}
    except OSError:
        return {}
