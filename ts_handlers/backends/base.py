"""The contract of a backend, and what it is asked for.

A backend turns a model into files (`build`) and files into something callable (`load`). It knows neither the store nor
TorchServe. `build` may raise `BuildError` and `load` `LoadError`; any other exception counts as the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ts_handlers.errors import SettingsError
from ts_handlers.model_source import ModelSource
from ts_handlers.serving.contexts import ContextPool
from ts_handlers.settings import SECTION, Settings
from ts_handlers.signature import Signature, Sizes

Description = dict[str, Any]
Run = Callable[[list[torch.Tensor]], Any]
Phase = Callable[[str], AbstractContextManager[None]]


class Request:
    """One model on one device, as settings ask for it.

    Parameters
    ----------
    source:
        Where the model comes from.
    settings:
        The user's settings.
    device:
        Where it runs.
    shared_folder:
        Where builds may keep files that later builds profit from, such as TensorRT's timing cache; set by the start.
    placed_weights:
        The archive's weights as an artifact takes them, by name, dtype, shape and strides, on `device`. A start that
        builds loads what it has built several times, and torch never frees the weights of a load.
    """

    def __init__(self, source: ModelSource, settings: Settings, device: torch.device) -> None:
        self.source = source
        self.settings = settings
        self.device: torch.device = device
        self.shared_folder: Path | None = None
        self.placed_weights: dict[tuple[object, ...], torch.Tensor] = {}
        self._checked = False

    @functools.cached_property
    def signature(self) -> Signature | None:
        """The declared signature, or None when the settings declare no inputs."""
        return Signature(self.settings.inputs, self.settings.dimensions) if self.settings.inputs else None

    def require_signature(self) -> Signature:
        """The declared signature; raises `SettingsError` with an example when there is none."""
        if self.signature is None:
            raise SettingsError(
                f"{SECTION}.inputs: a compiling backend needs the model's inputs, found none; declare them, as "
                "inputs: [{name: x, dtype: float32, shape: [batch, 3, 224, 224]}] with "
                "dimensions: {batch: {min: 1, max: 16}}"
            )
        return self.signature

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
        wanted = self.settings.warmup[0] if self.settings.warmup else None
        return self.require_signature().example_sizes(wanted)

    def check_source(self) -> None:
        """Raise `SettingsError` where the settings contradict what the model says of itself."""
        if not self._checked:
            self.source.check_settings(self.settings)
            self._checked = True

    def eager(self) -> torch.nn.Module:
        """The eager module on the device, in the dtype that the settings ask for, in eval mode."""
        self.check_source()
        module = self.source.eager()
        wanted = self.settings.dtype if self.source.weights_by_name else None  # a program keeps those of its export
        dtype = None if wanted is None else getattr(torch, wanted)
        return module.to(device=self.device, dtype=dtype) if dtype is not None else module.to(self.device)


@dataclasses.dataclass
class Loaded:
    """An artifact in this process.

    Attributes
    ----------
    run:
        Takes the tensors in declared order, already checked, and returns the model's output.
    signature:
        What `run` accepts; it may be narrower than what was declared, when the compiler could not do better.
    sizes:
        The sizes at which the canary runs; None takes the example sizes and the smallest ones.
    variants:
        How many artifacts `run` chooses from; with one, the smallest canary input tells all.
    adjusts_threads:
        Whether `torch.set_num_threads` may change after loading without compiling anything.
    frees_interpreter:
        Whether `run` is native code that leaves the GIL alone and works on processors of the host.
    warmed_up:
        Whether loading has already run the declared warm-up sizes.
    facts:
        What the backend wants to show in `describe`.
    seal:
        Called once after warm-up: from then on no request may compile anything.
    pool:
        The pool from which `run` lends by itself; None when calls have to be lent a slot, as `contexts.count` says,
        before they reach `run` (see `ts_handlers.serving.slots`).
    reentrant:
        Whether several threads may be in `run` at once; if not, one call at a time whatever `contexts.count` says.
    """

    run: Run
    signature: Signature
    sizes: list[Sizes] | None = None
    variants: int = 1
    adjusts_threads: bool = False
    frees_interpreter: bool = False
    warmed_up: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    seal: Callable[[], None] = lambda: None
    pool: ContextPool[Any] | None = None
    reentrant: bool = True


@dataclasses.dataclass
class Built:
    """What `build` leaves: the description for the manifest and, if it has one, the live artifact."""

    description: Description
    loaded: Loaded | None = None


class Backend(Protocol):
    """A way to run a model.

    `persistent` says whether there is anything to store.
    """

    name: str
    persistent: bool

    def bakes_weights(self, request: Request) -> bool:
        """Whether the artifact holds the weights' values, so that new weights need a new artifact."""

    def options(self, request: Request) -> dict[str, str]:
        """Options that change the artifact, for the key."""

    def toolchain(self, request: Request) -> str:
        """Versions on which the artifact depends, for the key."""

    def build(self, request: Request, directory: Path, phase: Phase) -> Built:
        """Compile into `directory`."""

    def load(self, request: Request, directory: Path, description: Description) -> Loaded:
        """Load what `build` left in `directory`, whose bytes have been verified."""


def call_module(module: Callable[..., Any], names: tuple[str, ...], tensors: list[torch.Tensor], by_name: bool) -> Any:
    """Call a module with tensors in declared order, by keyword where its signature has those names."""
    return module(**dict(zip(names, tensors, strict=True))) if by_name else module(*tensors)


def takes_names(module: torch.nn.Module, names: tuple[str, ...]) -> bool:
    """Whether `module.forward` has parameters of all these names."""
    import inspect

    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return all(name in parameters and parameters[name].kind in kinds for name in names)
