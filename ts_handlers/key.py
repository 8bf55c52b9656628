"""The cache key: an ordered list of named parts, and a digest over them.

`PARTS` is the single truth of the key: logging, explaining and testing walk the same list. Two keys are compared part
by part, so a miss can say which part missed.

Driver, host name, time and this package's version are recorded in the manifest, not keyed. The device's index is never
keyed. Environment variables enter by the allow-list `ENVIRONMENT`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ts_handlers import fingerprint
from ts_handlers.cache_key import FORMAT as FORMAT
from ts_handlers.cache_key import CacheKey as CacheKey
from ts_handlers.cache_key import explain as explain

if TYPE_CHECKING:
    from ts_handlers.backends.base import Backend, Request

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


def _options(backend: Backend, request: Request) -> str:
    facts = dict(backend.options(request))
    if request.settings.dtype is not None:
        facts["dtype"] = request.settings.dtype
    facts.update({name: os.environ[name] for name in ENVIRONMENT if name in os.environ})
    facts["float32_matmul"] = torch.get_float32_matmul_precision()
    return " ".join(f"{name}={facts[name]}" for name in sorted(facts))


def _weights(backend: Backend, request: Request) -> str:
    baked = backend.bakes_weights(request) or not request.source.weights_by_name
    return request.source.weights_digest() if baked else "outside"


PARTS: tuple[tuple[str, Callable[[Backend, Request], str]], ...] = (
    ("format", lambda backend, request: FORMAT),
    ("backend", lambda backend, request: backend.name),
    ("options", _options),
    ("model", lambda backend, request: request.model_digest),
    ("weights", _weights),
    ("inputs", lambda backend, request: request.inputs_identity()),
    ("device", lambda backend, request: fingerprint.device_identity(request.device)),
    ("toolchain", lambda backend, request: backend.toolchain(request)),
)


def compute_key(backend: Backend, request: Request) -> CacheKey:
    """The key under which `backend`'s artifact for `request` is stored."""
    return CacheKey(tuple((name, part(backend, request)) for name, part in PARTS))
