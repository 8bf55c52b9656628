"""The cache key: an ordered list of named parts, and a digest over them.

`PARTS` is the single truth of the key: logging, explaining and testing walk the same list. Two keys are compared part
by part, so a miss can say which part missed.

Driver, host name, time and this package's version are recorded in the manifest, not keyed. The device's index is never
keyed. Environment variables enter by the allow-list `ENVIRONMENT`, and by what making the model was seen to read
(`ts_handlers.key.outside`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ts_handlers.key import fingerprint
from ts_handlers.key.cache_key import FORMAT, OUTSIDE, CacheKey
from ts_handlers.key.names import NO_NAMES, Names
from ts_handlers.key.outside import Surroundings, declared_names, outside_part
from ts_handlers.settings import Settings

# Variables that change what the compiler generates; everything else in the environment is ignored.
ENVIRONMENT = (
    "TORCHINDUCTOR_CPP_WRAPPER",
    "TORCHINDUCTOR_FREEZING",
    "TORCHINDUCTOR_LAYOUT_OPTIMIZATION",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM",
    "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING",
    "TORCHINDUCTOR_SHAPE_PADDING",
    "NVIDIA_TF32_OVERRIDE",
)


class KeyedSource(Protocol):
    """What a key asks of a source; `ts_handlers.model.base.ModelSource` is one."""

    weights_by_name: bool
    surroundings: Surroundings

    def weights_digest(self) -> str:
        """Digest of the weights' values."""


class KeyedModel(Protocol):
    """What a key asks of a model on a device; `ts_handlers.backends.base.Target` is one."""

    @property
    def source(self) -> KeyedSource:
        """Where the model comes from."""

    @property
    def settings(self) -> Settings:
        """The user's settings."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def model_digest(self) -> str:
        """Digest of the model without the values of its weights."""

    def inputs_identity(self) -> str:
        """The key's part for the inputs."""


class KeyedBackend(Protocol):
    """What a key asks of a backend; `ts_handlers.backends.base.Backend` says what the methods return."""

    name: str

    def bakes_weights(self, target: Any) -> bool:
        """Whether the artifact holds the weights' values."""

    def options(self, target: Any) -> dict[str, str]:
        """Options that change the artifact."""

    def toolchain(self, target: Any) -> str:
        """Versions on which the artifact depends."""


def _options(backend: KeyedBackend, target: KeyedModel) -> str:
    facts = dict(backend.options(target))
    if target.settings.dtype is not None:
        facts["dtype"] = target.settings.dtype
    facts.update({name: os.environ[name] for name in ENVIRONMENT if name in os.environ})
    facts["float32_matmul"] = torch.get_float32_matmul_precision()
    return " ".join(f"{name}={facts[name]}" for name in sorted(facts))


def _weights(backend: KeyedBackend, target: KeyedModel) -> str:
    baked = backend.bakes_weights(target) or not target.source.weights_by_name
    return target.source.weights_digest() if baked else "outside"


PARTS: tuple[tuple[str, Callable[[KeyedBackend, KeyedModel], str]], ...] = (
    ("format", lambda backend, target: FORMAT),
    ("backend", lambda backend, target: backend.name),
    ("options", _options),
    ("model", lambda backend, target: target.model_digest),
    ("weights", _weights),
    ("inputs", lambda backend, target: target.inputs_identity()),
    ("device", lambda backend, target: fingerprint.device_identity(target.device)),
    ("toolchain", lambda backend, target: backend.toolchain(target)),
)


def compute_key(backend: KeyedBackend, target: KeyedModel, names: Names = NO_NAMES) -> CacheKey:
    """The key under which `backend`'s artifact for `target` is stored.

    Parameters
    ----------
    names:
        What making the eager model is known to read (`ts_handlers.key.outside`). They, and those that the settings
        declare, enter with their values as the last part; without any there is no such part.
    """
    parts = tuple((name, part(backend, target)) for name, part in PARTS)
    surroundings, settings = target.source.surroundings, target.settings
    names |= declared_names(surroundings, settings.key_environment, settings.key_files)
    return CacheKey((*parts, (OUTSIDE, outside_part(surroundings, names))) if names else parts)
