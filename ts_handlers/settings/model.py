"""All settings, as frozen structs; `ts_handlers.settings.parsing` reads and checks them."""

from __future__ import annotations

from typing import Literal

import msgspec

from ts_handlers.settings.dtypes import DtypeName, FloatDtype, Number, Range
from ts_handlers.settings.registry import DEFAULT_BACKENDS
from ts_handlers.settings.sections import (
    BackgroundSettings,
    ContextSettings,
    GuardSettings,
    ObserveSettings,
    RemoteSettings,
    ResultCacheSettings,
    SpaceSettings,
    TensorRTSettings,
    TrustSettings,
)

SECTION = "handler.ts_handlers"
PT2_SECTION = "pt2.compile"
DEFAULT_STARTUP_TIMEOUT_SECONDS = 120
"""How long TorchServe waits for a worker when model-config.yaml does not say it."""


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input tensor of the model.

    `shape` holds integers (static sizes) and names of `Settings.dimensions` (dynamic sizes). `values` is the
    half-open range ``[low, high)`` from which warm-up and canary inputs are drawn: without it they are drawn from
    `limits`, and without those integers from ``[0, 2)`` and floating-point inputs from a standard normal distribution.

    `limits` is the half-open range ``[low, high)`` outside which a request's values are refused, None for an open end.
    An index that a model looks up needs it: eager code raises where it is out of range, compiled code ends the process.
    A list of such ranges, one for each column, limits the elements of the last dimension one by one. `excludes` are
    single values that are refused too: integer division by 0 ends the process in compiled code.
    """

    name: str
    dtype: DtypeName
    shape: tuple[int | str, ...]
    values: tuple[float, float] | None = None
    limits: tuple[Number | Range | None, ...] | None = None
    excludes: tuple[Number, ...] = ()


class Dimension(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The inclusive range of one dynamic dimension, in elements."""

    min: int
    max: int


class CanarySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an artifact is compared with the eager model before it is served.

    `tolerance` is the largest accepted relative error (norm of the difference over norm of the eager output);
    None takes the one that fits the output's dtype, see `ts_handlers.backends.compare.TOLERANCES`. `seed` draws the
    input.
    """

    tolerance: float | None = None
    seed: int = 0


class CompileSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TorchServe's ``pt2: {compile: ...}`` section: the arguments of `torch.compile`.

    `options` are those of Inductor. With a TensorRT backend they are Torch-TensorRT's and are read into
    `Settings.tensorrt`; see `ts_handlers.settings.torch_compile`.
    """

    enable: bool = True
    backend: str = "inductor"
    mode: str | None = None
    options: dict[str, str | int | float | bool | list[str]] = msgspec.field(default_factory=dict)
    dynamic: bool | None = None
    fullgraph: bool = False


class GenerateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decode steps of transformers' ``generate`` with a static cache.

    `length` is the cache's length in tokens, prompt and new tokens together, and `batch` the range of the sequences
    that are generated at once, beams counted.
    """

    length: int
    batch: Dimension = Dimension(1, 1)


class SubmodelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A module below the handler, which is compiled by itself.

    Attributes
    ----------
    path:
        Where it is after the handler's `initialize`: attributes, keys or indices from the handler on, as
        ``pipe.unet``.
    method:
        The method whose calls are answered by the artifact.
    arguments:
        Arguments that are no tensors and have these values in the calls that the artifact answers.
    generate:
        Compile the decode steps of ``generate`` in place of calls with declared inputs.
    inputs, dimensions, warmup, outside:
        As in `Settings`.
    backends, on_miss, canary, tensorrt:
        As in `Settings`, whose own they are where they are None.
    """

    path: str
    method: str = "forward"
    arguments: dict[str, bool | int | float | str | None] = msgspec.field(default_factory=dict)
    generate: GenerateSettings | None = None
    inputs: tuple[InputSpec, ...] = ()
    dimensions: dict[str, Dimension] = msgspec.field(default_factory=dict)
    warmup: tuple[dict[str, int], ...] = ()
    outside: Literal["refuse", "eager"] = "eager"
    backends: tuple[str, ...] | None = None
    on_miss: Literal["compile", "background", "fail", "eager"] | None = None
    canary: CanarySettings | None = None
    tensorrt: TensorRTSettings | None = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a user can set; see docs/settings.md for the same list in prose.

    Attributes
    ----------
    store:
        Root of the artifact store; None takes ``TS_HANDLERS_CACHE``, then ``$XDG_CACHE_HOME/ts_handlers``.
    backends:
        The fallback order, best first: one that fails falls to the next one, with its reason counted.
    on_miss:
        ``compile`` blocks until built, ``background`` serves eagerly while a child process builds, ``fail`` makes a
        miss an error, ``eager`` serves eagerly.
    strict:
        Raise instead of falling to the next backend.
    inputs, dimensions:
        The model's input signature. Requests outside it are refused, see `outside`.
    outside:
        What happens to a request outside the declared ranges: ``refuse`` (HTTP 400) or ``eager`` (right but slow;
        the eager model is built at the first such request).
    samples:
        Files with request bodies, relative to the model's folder, or mappings of a request's fields to such files.
        Where `inputs` is empty, the handler's own `preprocess` turns them into calls of the model, which say what it
        takes.
    observe:
        What is noted of calls where neither inputs nor samples say what the model takes; False notes nothing.
    warmup:
        Sizes to run before READY, one mapping of dimension name to size per run. The first one is also the size
        that the compiler optimises for. ``observed`` takes the sizes that calls had most often.
    non_finite:
        What `ts_handlers.CompiledHandler` does with NaN and infinity in an answer, which JSON does not have: None
        writes null, ``refuse`` refuses the request.
    dtype:
        Floating-point dtype to which the model is cast after loading; None keeps the model's own.
    mmap:
        Map the weights file instead of reading it. ``auto`` maps files that TorchServe extracted for itself and
        reads files that somebody else may overwrite in place (``no-archive`` folders).
    key_files_ignored:
        Glob patterns of archive files that do not change the compiled model, beside the built-in list.
    key_environment, key_files:
        Environment variables, and files or folders, that shape the model in a way that is not seen when it is made.
        Relative paths are below the archive's folder.
    verify:
        ``changed`` hashes entries and weights again only when they may have changed since they were last hashed;
        ``always`` hashes them at every start.
    models:
        Modules below the handler that are compiled by themselves, by names of the user's; see
        `ts_handlers.settings.submodels`.
    guard, background, remote, trust, space, tensorrt, contexts, result_cache:
        See `ts_handlers.settings.sections`.
    """

    store: str | None = None
    backends: tuple[str, ...] = DEFAULT_BACKENDS
    on_miss: Literal["compile", "background", "fail", "eager"] = "compile"
    strict: bool = False
    inputs: tuple[InputSpec, ...] = ()
    dimensions: dict[str, Dimension] = msgspec.field(default_factory=dict)
    outside: Literal["refuse", "eager"] = "refuse"
    non_finite: Literal["refuse"] | None = None
    samples: tuple[str | dict[str, str], ...] = ()
    observe: ObserveSettings | bool = ObserveSettings()
    warmup: tuple[dict[str, int], ...] | Literal["observed"] = ()
    dtype: FloatDtype | None = None
    mmap: Literal["auto", "always", "never"] = "auto"
    key_files_ignored: tuple[str, ...] = ()
    key_environment: tuple[str, ...] = ()
    key_files: tuple[str, ...] = ()
    verify: Literal["changed", "always"] = "changed"
    canary: CanarySettings = CanarySettings()
    compile: CompileSettings = CompileSettings()
    guard: GuardSettings = GuardSettings()
    background: BackgroundSettings = BackgroundSettings()
    remote: RemoteSettings | None = None
    trust: TrustSettings = TrustSettings()
    space: SpaceSettings = SpaceSettings()
    tensorrt: TensorRTSettings = TensorRTSettings()
    contexts: ContextSettings = ContextSettings()
    result_cache: ResultCacheSettings | None = None
    models: dict[str, SubmodelSettings] = msgspec.field(default_factory=dict)

    @property
    def warmup_sizes(self) -> tuple[dict[str, int], ...]:
        """The sizes of `warmup`; none while those of ``observed`` are not known."""
        return () if isinstance(self.warmup, str) else self.warmup

    @property
    def sample_files(self) -> tuple[str, ...]:
        """The files of `samples`, each once."""
        fields = ({"body": each} if isinstance(each, str) else each for each in self.samples)
        return tuple(dict.fromkeys(file for each in fields for file in each.values()))

    @property
    def observing(self) -> ObserveSettings | None:
        """What is noted of calls, or None."""
        if isinstance(self.observe, bool):
            return ObserveSettings() if self.observe else None
        return self.observe
