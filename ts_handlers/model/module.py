"""A module that already exists in this process as the source of a model."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ts_handlers.key import fingerprint
from ts_handlers.model.archive_files import Tensors
from ts_handlers.model.base import BaseSource, Recipe
from ts_handlers.model.module_identity import module_facts


class ModuleSource(BaseSource):
    """A module that already exists in this process.

    Its identity is taken from the source files of every submodule's class, from each submodule's attributes that are
    not tensors, and from the tensor specification, since the arguments of its constructor are not known any more.
    A module that cannot be told from another one (`digest` then raises `BuildError`) is served eagerly.
    `recipe` tells another process how to make this source, when the caller knows. `folder` is where the files lie that
    the module was made from: its path, which may be another one at each start, is no part of the identity.

    Attributes
    ----------
    left_out:
        Attributes that differ between processes and that `digest` has therefore left out.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        *,
        recipe: Recipe | None = None,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(recipe)
        self.name = name
        self.weights_by_name = True
        self.left_out: tuple[str, ...] = ()
        self._module = module
        self._folder = folder

    def digest(self) -> str:
        """Digest over classes, attributes, libraries and tensor names."""
        facts = module_facts(self._module, self._folder)
        self.left_out = facts.left_out
        return fingerprint.digest_text("\n".join(facts.lines))

    def weights(self) -> Tensors:
        """The module's own state dict."""
        return {name: tensor.detach() for name, tensor in self._module.state_dict().items()}

    @functools.cached_property
    def _weights_digest(self) -> str:
        return fingerprint.digest_tensors(self.weights())

    def weights_digest(self) -> str:
        """Digest of the state dict's bytes."""
        return self._weights_digest

    def built(self) -> torch.nn.Module:
        """The module."""
        return self._module

    def _build(self) -> torch.nn.Module:
        return self._module
