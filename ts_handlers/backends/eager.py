"""Backend `eager`: the module as it is. Always works; nothing is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Built, Description, Loaded, Phase, Request, call_module, takes_names
from ts_handlers.fingerprint import toolchain
from ts_handlers.signature import Signature


class EagerBackend:
    """Runs the eager module under `torch.inference_mode`."""

    name = "eager"
    persistent = False

    def bakes_weights(self, request: Request) -> bool:
        """No artifact, so nothing is baked."""
        return False

    def options(self, request: Request) -> dict[str, str]:
        """None."""
        return {}

    def toolchain(self, request: Request) -> str:
        """torch and, on a GPU, its libraries."""
        return toolchain(request.device.type)

    def build(self, request: Request, directory: Path, phase: Phase) -> Built:
        """Nothing to build."""
        return Built({})

    def load(self, request: Request, directory: Path, description: Description) -> Loaded:
        """Build the eager module."""
        signature = request.signature or Signature((), {})
        return Loaded(run=eager_run(request, signature.names), signature=signature)


def eager_run(request: Request, names: tuple[str, ...]) -> Any:
    """A function that runs the eager module on tensors in declared order."""
    module = request.eager()
    by_name = takes_names(module, names)

    def run(tensors: list[torch.Tensor]) -> Any:
        with torch.inference_mode():
            return call_module(module, names, tensors, by_name)

    return run


BACKEND = EagerBackend()
