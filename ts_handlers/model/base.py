"""Where a model comes from: its identity, its weights by name and, only when needed, the eager module.

A warm start asks a source for `digest`, `weights` and `weights_digest` and never for `eager`: the archive's Python
files and the libraries behind them are then not imported at all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ts_handlers.key.digests import DigestFile, FileDigest
from ts_handlers.key.outside import Surroundings
from ts_handlers.model.archive_files import Tensors
from ts_handlers.settings import Settings

Recipe = Mapping[str, Any]
"""How another process makes the same source: JSON-compatible, read by `ts_handlers.model.recipes.make_source`."""


class ModelSource(Protocol):
    """What the rest of the package needs to know of a model.

    `name` is the model's name in the store's paths. `weights_by_name` says that `weights` holds the parameters under
    the names of the eager module's state_dict, so that an artifact can take them without building the module. `notes`
    is what users shall know of it, as far as it is known by now. `samples` are inputs that it is known to take, by
    name, on the CPU. `surroundings` knows what making the eager module reads from elsewhere, and whether that is
    recorded at all.
    """

    name: str
    weights_by_name: bool
    notes: list[str]
    samples: list[dict[str, torch.Tensor]]
    surroundings: Surroundings

    def begin_digest(self, digest_file: DigestFile) -> None:
        """Digest the file of the weights on a thread; does nothing when that has begun or there is no file.

        `ts_handlers.startup.target.new_target` calls it with what remembers digests between starts. Without a call the
        file is hashed when a digest is asked for.
        """

    def digest(self) -> str:
        """Digest of the model's source and tensor specification, not of the weights' values."""

    def weights(self) -> Tensors:
        """Weights by name, on the CPU; empty when they are part of the artifact."""

    def weights_digest(self) -> str:
        """Digest of the weights' values."""

    def check_settings(self, settings: Settings) -> None:
        """Raise `SettingsError` where the settings contradict what the model says of itself.

        Loads the model where need be, so a warm start does not call it: the settings are in the key.
        """

    def prepare(self) -> None:
        """Import what `eager` needs; does nothing where that is not known.

        An exception that an import keeps also keeps its callers' frames with all that they hold, until the cycle
        collector runs. A caller that wants the module to be freed at once with `release` calls this first.
        """

    def eager(self) -> torch.nn.Module:
        """The eager module on the CPU in eval mode, built at the first call. Raises `ModelError`."""

    def release(self) -> None:
        """Forget the eager module."""

    def keep(self, module: torch.nn.Module) -> None:
        """Take the eager module back that `release` has forgotten, since somebody still calls it."""

    def recipe(self) -> Recipe | None:
        """How another process makes this source; None when it cannot."""


class BaseSource:
    """What all sources have: a recipe, an eager module that is built at most once, and perhaps a file of weights.

    A source with a `directory`, an unpacked archive, overrides `_recorded`.
    """

    def __init__(self, recipe: Recipe | None, file: Path | None = None, directory: Path | None = None) -> None:
        self.surroundings = Surroundings(directory)
        self._recipe = recipe
        self._file_digest = None if file is None else FileDigest(file)
        self._eager: torch.nn.Module | None = None
        self._lock = threading.Lock()
        self.notes: list[str] = []
        self.samples: list[dict[str, torch.Tensor]] = []

    def recipe(self) -> Recipe | None:
        """How another process makes this source; None when it cannot."""
        return self._recipe

    def check_settings(self, settings: Settings) -> None:
        """Does nothing: a module does not say what it takes."""

    def prepare(self) -> None:
        """Does nothing: how the module is built is not known here."""

    def eager(self) -> torch.nn.Module:
        """The eager module on the CPU in eval mode; raises `ModelError` when it cannot be built."""
        with self._lock:
            if self._eager is None:
                with self._recorded():
                    self._eager = self._build().eval()
            return self._eager

    def built(self) -> torch.nn.Module | None:
        """The eager module if it is there."""
        return self._eager

    def release(self) -> None:
        """Forget the eager module."""
        self._eager = None

    def keep(self, module: torch.nn.Module) -> None:
        """Take the eager module back that `release` has forgotten, since somebody still calls it."""
        self._eager = module

    def _recorded(self) -> contextlib.AbstractContextManager[None]:
        """Records what the block reads; nothing here."""
        return contextlib.nullcontext()

    def begin_digest(self, digest_file: DigestFile) -> None:
        """Digest the file of the weights on a thread; does nothing when that has begun or there is no file."""
        self.surroundings.digest_file = digest_file
        if self._file_digest is not None:
            self._file_digest.begin(digest_file)

    def _hash_file(self) -> str:
        return "none" if self._file_digest is None else self._file_digest.result()

    def _build(self) -> torch.nn.Module:
        raise NotImplementedError
