"""The contract of a backend, and what it is asked for.

A backend turns a model into files (`build`) and files into something callable (`load`). It knows neither the store nor
TorchServe. `build` may raise `BuildError` and `load` `LoadError`; any other exception counts as the same, and the next
backend of the fallback order is tried.

A backend is one file or folder, and one line that names it: in `ts_handlers.settings.registry` for those of this
package; for those of others a call of `ts_handlers.register_backend`, or an entry point in ``ts_handlers.backends``,
which child processes find too. This one compiles nothing, and keeps what it would serve as a TorchScript file::

    class ScriptBackend:
        name = "script"  # as in `backends: [script, eager]`
        persistent = True
        needs_eager_module = False

        def bakes_weights(self, target):
            return True  # new weights are a miss

        def options(self, target):
            return {}  # nothing but dtype, inputs and model changes the file, and these are in every key

        def toolchain(self, target):
            return fingerprint.toolchain(target.device.type)  # another torch is a miss

        def build(self, target, workspace):
            signature = target.require_signature()
            inputs = [tensor.to(target.device) for tensor in signature.generate(target.example_sizes)]
            with workspace.phase("export"):
                torch.jit.trace(target.eager(), inputs).save(workspace.directory / "model.ts")
            return Built({"file": "model.ts"})  # what `load` gets as its description; JSON-compatible

        def load(self, target, directory, description):
            module = torch.jit.load(directory / description["file"], map_location=target.device)

            def run(tensors):
                with torch.inference_mode():
                    return module(*tensors)

            return Loaded(run, target.require_signature())

        def substitute(self, settings, error):
            return None


    register_backend("script", ScriptBackend())

Before an artifact is served it is compared with the eager model at the smallest and the example sizes; a backend that
accepts whole ranges of sizes checks itself at the ends of them, see `ts_handlers.backends.compare.compare_sizes`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ts_handlers.backends.calling import Passing as Passing
from ts_handlers.backends.calling import call_module as call_module
from ts_handlers.backends.calling import takes_names as takes_names
from ts_handlers.errors import SettingsError
from ts_handlers.execution.base import Loaded
from ts_handlers.model.archive_files import Tensors
from ts_handlers.model.base import ModelSource
from ts_handlers.model.module_state import ModuleState, put_back
from ts_handlers.model.signature import Signature
from ts_handlers.settings import SECTION, Settings

Description = dict[str, Any]
"""What an artifact's manifest says for its backend: JSON-compatible, written by `build` and read by `load`."""
Phase = Callable[[str], AbstractContextManager[None]]


class KeptState:
    """The state of a target's eager module from before its first run, until the start has put it back.

    Attributes
    ----------
    wanted:
        Whether the module's state is to be kept; not once it serves.
    """

    def __init__(self) -> None:
        self.wanted = True
        self._state: ModuleState | None = None

    def keep(self, module: torch.nn.Module) -> None:
        """Remember the state of a module that is handed out the first time."""
        if self.wanted and (self._state is None or self._state.module is not module):
            self._state = ModuleState(module)

    def changes(self) -> list[str]:
        """Names of what has changed in the module since."""
        return [] if self._state is None else self._state.changes()

    def put_back(self, weights: Callable[[], Tensors]) -> None:
        """Restore the module, and forget the state."""
        put_back(self._state, weights)
        self._state = None


@dataclasses.dataclass(frozen=True)
class Target:
    """What a backend works for: one model on one device, as settings ask for it.

    Attributes
    ----------
    source:
        Where the model comes from.
    settings:
        The user's settings.
    device:
        Where it runs.
    placed_weights:
        A cache of the archive's weights as an artifact takes them, by name, dtype, shape and strides, on `device`. A
        start that builds loads what it has built several times, and torch never frees the weights of a load.
    kept:
        What the checks of a start are to leave unchanged in the eager module.
    """

    source: ModelSource
    settings: Settings
    device: torch.device
    placed_weights: dict[tuple[object, ...], torch.Tensor] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )
    kept: KeptState = dataclasses.field(default_factory=KeptState, compare=False, repr=False)

    @functools.cached_property
    def signature(self) -> Signature | None:
        """The declared signature, or None when the settings declare no inputs."""
        return Signature(self.settings.inputs, self.settings.dimensions) if self.settings.inputs else None

    def require_signature(self) -> Signature:
        """The declared signature; raises `SettingsError` with a proposal when there is none."""
        if self.signature is None:
            from ts_handlers.model.proposal import proposal_text

            raise SettingsError(
                f"{SECTION}.inputs: a compiling backend needs the model's inputs, found none{proposal_text(self.eager)}"
            )
        return self.signature

    def declares_as(self, other: Target) -> bool:
        """Whether the settings declare the same inputs and ranges as those of another target."""
        mine, theirs = self.settings, other.settings
        return (mine.inputs, mine.dimensions) == (theirs.inputs, theirs.dimensions)

    def inputs_identity(self) -> str:
        """The key's part for the inputs; an exported program without declared inputs brings its own."""
        return "exported" if self.signature is None else self.signature.canonical()

    @functools.cached_property
    def model_digest(self) -> str:
        """Digest of the model without the values of its weights."""
        return self.source.digest()

    @functools.cached_property
    def example_sizes(self) -> dict[str, int]:
        """The sizes to optimise for: the first warm-up entry where it says so."""
        wanted = self.settings.warmup_sizes[0] if self.settings.warmup_sizes else None
        return self.require_signature().example_sizes(wanted)

    def check_source(self) -> None:
        """Raise `SettingsError` where the settings contradict what the model says of itself."""
        _ = self._source_is_checked

    @functools.cached_property
    def _source_is_checked(self) -> bool:
        self.source.check_settings(self.settings)
        return True

    def eager(self) -> torch.nn.Module:
        """The eager module on the device, in the dtype that the settings ask for, in eval mode."""
        self.check_source()
        wanted = self.settings.dtype if self.source.weights_by_name else None  # a program keeps those of its export
        dtype = None if wanted is None else getattr(torch, wanted)
        with torch.inference_mode(False):  # parameters made or moved in a caller's inference mode never have gradients
            module = self.source.eager()
            module = module.to(device=self.device, dtype=dtype) if dtype is not None else module.to(self.device)
            self.kept.keep(module)
        return module

    def release(self) -> None:
        """Forget the eager module, and put back what its runs have changed: others may hold it."""
        self.kept.put_back(self.source.weights)
        self.source.release()

    def begin_serving(self) -> None:
        """Put back what the checks have changed in the eager module, which requests change from now on."""
        self.kept.put_back(self.source.weights)
        self.kept.wanted = False


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Where a build works.

    Attributes
    ----------
    directory:
        Gets the artifact's files.
    phase:
        Times a block as a phase of the build, for example ``with workspace.phase("export"):``; the names are those of
        `ts_handlers.metrics.BUILD_PHASES`, and with a dot a backend's own (``"script.trace"``).
    shared:
        A folder for files that later builds profit from, such as TensorRT's timing cache; None where there is none.
    """

    directory: Path
    phase: Phase
    shared: Path | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """What `build` leaves: the description for the manifest and, if it has one, the live artifact."""

    description: Description
    loaded: Loaded | None = None


class Backend(Protocol):
    """A way to run a model.

    Attributes
    ----------
    name:
        As in ``backends:`` of the settings, and part of the key.
    persistent:
        Whether there is anything to store.
    needs_eager_module:
        Whether an artifact that is loaded goes on using the eager module. If not, that is freed.
    """

    name: str
    persistent: bool
    needs_eager_module: bool

    def bakes_weights(self, target: Target) -> bool:
        """Whether the artifact holds the weights' values, so that new weights need a new artifact."""

    def options(self, target: Target) -> dict[str, str]:
        """Options that change the artifact, for the key."""

    def toolchain(self, target: Target) -> str:
        """Versions on which the artifact depends, for the key."""

    def build(self, target: Target, workspace: Workspace) -> Built:
        """Compile into `workspace.directory`."""

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        """Load what `build` left in `directory`, whose bytes have been verified."""

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        """The backend to try after `error`, before the next one of the fallback order; None for that one.

        A substitute with an attribute `follows`, the name of a later backend of the order, is tried after that one.
        Its artifact has the key of the backend that it is for.
        """
