"""Backend `aot_inductor`: an exported program compiled ahead of time, run by torch's C++ loader.

The entry holds shared libraries (and, for a GPU, device code) but not the weights: those are taken from the archive by
name when the artifact is loaded, so an entry is a few megabytes and outlives a fine-tune. Loading imports neither
`torch._inductor` nor `torch._dynamo` nor the model's own Python files.

A build goes through export steps, because not every model exports with every range:

1. ``dynamic``: all declared dimensions dynamic, sizes 0 and 1 not specialised (``backed_size_oblivious``);
2. ``dynamic+ones``: dimensions dynamic from 2, and one more variant for each combination of dimensions of size 1;
3. ``static``: one variant for each declared warm-up size. Other declared sizes are answered by the eager model, so the
   step waits until `inductor`, which covers them all, has been tried, where that comes later in the fallback order.

Every step is checked against the eager model at the ends of its ranges before it is accepted. On a GPU it is tried
with linear layers merged first (`ts_handlers.backends.aot_inductor.linears`), and with the layers as they are if that
does not work.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from ts_handlers.backends.aot_inductor.load import load_artifact
from ts_handlers.backends.aot_inductor.static_sizes import COVERS_ALL, STATIC, leaves_static_to_others
from ts_handlers.backends.base import Backend, Built, Description, Target, Workspace
from ts_handlers.errors import BuildError, FailedBeforeError, MissError
from ts_handlers.execution.base import Loaded
from ts_handlers.key import fingerprint
from ts_handlers.model.exported import ExportedSource
from ts_handlers.settings import Settings

logger = logging.getLogger(__name__)

MERGES_LINEARS = ("cuda",)
"""Types of devices on which merged linear layers are faster; see docs/decisions/0021-merged-linears.md."""


class AotInductorBackend:
    """See the module's docstring."""

    name = "aot_inductor"
    persistent = True
    needs_eager_module = False

    def bakes_weights(self, target: Target) -> bool:
        """Only for exported programs, whose file is the only source of the weights."""
        return not target.source.weights_by_name

    def options(self, target: Target) -> dict[str, str]:
        """The `torch.compile` mode and options, which are options of Inductor."""
        compile_settings = target.settings.compile
        facts = {f"inductor.{name}": json.dumps(value) for name, value in compile_settings.options.items()}
        if compile_settings.mode is not None:
            facts["mode"] = compile_settings.mode
        if target.device.type == "cpu":
            facts["threads"] = str(torch.get_num_threads())  # Inductor writes it into the OpenMP pragmas
        if self._merges_linears(target):
            facts["linears"] = "merged"
        if target.signature is not None and target.signature.dimensions:
            facts["optimised_for"] = ",".join(f"{k}={v}" for k, v in sorted(target.example_sizes.items()))
        return facts

    def _merges_linears(self, target: Target) -> bool:
        """Whether linear layers are merged where they can be; those of exported programs stay as they are."""
        return target.device.type in MERGES_LINEARS and not self.bakes_weights(target)

    def toolchain(self, target: Target) -> str:
        """torch, C library and CUDA; not the compiler, which a machine that only loads does not need."""
        return fingerprint.toolchain(target.device.type)

    def build(self, target: Target, workspace: Workspace) -> Built:
        """Export, compile, check against eager, and leave the shared libraries in the workspace."""
        from ts_handlers.backends.aot_inductor.build import build, build_exported

        if isinstance(target.source, ExportedSource):
            return build_exported(target, target.source, workspace)
        return build(target, workspace, self._merges_linears(target), self._takes_step)

    def _takes_step(self, settings: Settings, step: str) -> bool:
        return step != STATIC or not leaves_static_to_others(settings)

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        """Load the shared libraries in place and give them the weights by name."""
        return load_artifact(target, directory, description)

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        """The static sizes, where they were left until another backend has been tried; else None."""
        if isinstance(error, FailedBeforeError):
            tried = error.unbuildable
        else:
            tried = isinstance(error, (BuildError, MissError))
        return STATIC_SIZES if tried and leaves_static_to_others(settings) else None


class StaticSizes(AotInductorBackend):
    """The step ``static`` alone, under the same key, once the backend that would cover every size has failed too."""

    follows = COVERS_ALL

    def _takes_step(self, settings: Settings, step: str) -> bool:
        return step == STATIC

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        """None: the next backend of the fallback order."""
        return None


BACKEND = AotInductorBackend()
STATIC_SIZES = StaticSizes()
