"""A second cheap backend, for fallback orders: takes the place of ``inductor`` and never fails to build."""

from __future__ import annotations

import os
from unittest import mock

from tests.support.file_backend import FileBackend
from ts_handlers.backends.base import Built, Target, Workspace


class SecondBackend(FileBackend):
    """See `file_backend.FileBackend`."""

    name = "inductor"
    needs_eager_module = True

    def build(self, target: Target, workspace: Workspace) -> Built:
        with mock.patch.dict(os.environ):
            os.environ.pop("BUILD_ERROR", None)
            return super().build(target, workspace)


BACKEND = SecondBackend()
