"""Backend `eager`: the module as it is. Always works; nothing is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Backend, Built, Description, Target, Workspace, call_module, takes_names
from ts_handlers.execution.base import Loaded
from ts_handlers.key.fingerprint import toolchain
from ts_handlers.model.signature import Signature
from ts_handlers.settings import Settings


class EagerBackend:
    """Runs the eager module without gradients."""

    name = "eager"
    persistent = False
    needs_eager_module = True

    def bakes_weights(self, target: Target) -> bool:
        """No artifact, so nothing is baked."""
        return False

    def options(self, target: Target) -> dict[str, str]:
        """None."""
        return {}

    def toolchain(self, target: Target) -> str:
        """torch and, on a GPU, its libraries."""
        return toolchain(target.device.type)

    def build(self, target: Target, workspace: Workspace) -> Built:
        """Nothing to build."""
        return Built({})

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        """Build the eager module."""
        signature = target.signature or Signature((), {})
        return Loaded(run=eager_run(target, signature.names), signature=signature)

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        """None: the next backend of the fallback order."""
        return None


def eager_run(target: Target, names: tuple[str, ...]) -> Any:
    """A function that runs the eager module on tensors in declared order."""
    module = target.eager()
    by_name = takes_names(module, names)

    def run(tensors: list[torch.Tensor]) -> Any:
        with torch.no_grad():  # not in inference mode: a handler may change an output in place
            return call_module(module, names, tensors, by_name)

    return run


BACKEND = EagerBackend()
