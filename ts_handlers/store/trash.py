"""Moving what is damaged out of the way, together with the reason, for whoever wants to look at it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

FOLDER = "trash"


def move_aside(root: Path, path: Path, reason: str) -> Path:
    """Rename an entry's folder, or one file, into the trash; from then on it is not found.

    Returns
    -------
    The folder in the trash, whose ``reason.txt`` holds the reason.

    Raises
    ------
    OSError
        It is gone, or the store cannot be written.
    """
    name = path.name if path.is_dir() else path.parent.name  # a canary lies in the folder of its key
    trash = root / FOLDER / f"{name}-{uuid.uuid4().hex[:8]}"
    trash.parent.mkdir(mode=0o700, exist_ok=True)
    if path.is_dir():
        os.rename(path, trash)
    else:
        trash.mkdir(mode=0o700)
        os.rename(path, trash / path.name)
    (trash / "reason.txt").write_text(reason + "\n")
    return trash
