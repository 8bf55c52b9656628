"""A backend for tests of any model: keeps it as a TorchScript file, in the place of ``aot_inductor``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Backend, Built, Description, Target, Workspace
from ts_handlers.execution.base import Loaded
from ts_handlers.settings import Settings


class ScriptedBackend:
    """Bakes weights in; knows the inputs by position."""

    name = "aot_inductor"
    persistent = True
    needs_eager_module = False

    def bakes_weights(self, target: Target) -> bool:
        return True

    def options(self, target: Target) -> dict[str, str]:
        return {}

    def toolchain(self, target: Target) -> str:
        return "test"

    def build(self, target: Target, workspace: Workspace) -> Built:
        signature = target.require_signature()
        inputs = tuple(signature.generate(target.example_sizes, seed=1))
        with torch.no_grad():
            torch.jit.trace(target.eager(), inputs, check_trace=False).save(workspace.directory / "model.ts")
        return Built({})

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        module = torch.jit.load(directory / "model.ts")

        def run(tensors: list[torch.Tensor]) -> Any:
            with torch.inference_mode():
                return module(*tensors)

        return Loaded(run, target.require_signature())

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        return None


BACKEND = ScriptedBackend()
