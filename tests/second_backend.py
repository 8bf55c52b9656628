"""A second cheap backend, for the ladder: stands in for ``inductor`` and never fails to build."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from file_backend import FileBackend

from ts_handlers.backends.base import Built, Phase, Request


class SecondBackend(FileBackend):
    """See `file_backend.FileBackend`."""

    name = "inductor"

    def build(self, request: Request, directory: Path, phase: Phase) -> Built:
        with mock.patch.dict(os.environ):
            os.environ.pop("BUILD_ERROR", None)
            return super().build(request, directory, phase)


BACKEND = SecondBackend()
