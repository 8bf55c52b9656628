"""Torch-TensorRT's engines in an entry: which engine belongs to which graph, and the files that hold them.

Torch-TensorRT's own key for an engine is made of operator names, input shapes and some settings; softmax over another
dimension, another literal, another edge or other weights share a key with it. Here the whole graph is in the key, and
the entry's own key, which holds the model, its weights, the GPU and every version.

A file is named after its key and made by one rename::

    8 bytes   b"TSHENG1\\n"
    32 bytes  SHA-256 of the rest
    rest      the blob, which is Torch-TensorRT's business
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import operator
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.graph_digest import canonical_graph, canonical_value

logger = logging.getLogger(__name__)

MAGIC = b"TSHENG1\n"
_HEADER = len(MAGIC) + hashlib.sha256().digest_size

# Settings that say where and when engines are built, not what they compute.
NOT_IN_ENGINE = frozenset(
    {
        "cache_built_engines",
        "reuse_cached_engines",
        "timing_cache_path",
        "lazy_engine_init",
        "pass_through_build_failures",
        "dryrun",
    }
)
# Collections whose order does not count, whatever type the user wrote them in.
_UNORDERED = frozenset({"torch_executed_ops", "autocast_excluded_nodes", "autocast_excluded_ops", "enabled_precisions"})


class EngineFiles:
    """The engines of one entry, and what was found among them.

    `save` and `load` never raise: a cache that cannot be written or read costs time, not answers.

    Attributes
    ----------
    hits:
        How many times an engine was found.
    missed:
        Keys of engines that were asked for and not found.
    saved:
        How many engines were handed over; each was built in this process.
    """

    def __init__(self, directory: Path, *, writable: bool) -> None:
        self._directory = directory
        self._writable = writable
        self.hits = 0
        self.missed: set[str] = set()
        self.saved = 0

    def save(self, key: str, blob: bytes) -> None:
        """Keep an engine; a file appears whole or not at all."""
        self.saved += 1
        if not self._writable:
            return
        temporary = None
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._directory, suffix=".tmp")
            with os.fdopen(descriptor, "wb") as file:
                file.write(MAGIC + hashlib.sha256(blob).digest())
                file.write(blob)
            os.replace(temporary, self.path(key))
        except OSError as error:
            logger.warning("an engine could not be kept in %s: %s", self._directory, error)
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def load(self, key: str) -> bytes | None:
        """The engine, or None where it is missing or there is any doubt about it."""
        blob = self._read(key)
        if blob is None:
            self.missed.add(key)
        else:
            self.hits += 1
        return blob

    def refuse(self, key: str) -> None:
        """Count an engine that was found and could not be used as missed."""
        self.hits -= 1
        self.missed.add(key)

    def path(self, key: str) -> Path:
        """Where the engine of a key lies."""
        return self._directory / f"{key}.engine"

    def _read(self, key: str) -> bytes | None:
        try:
            data = self.path(key).read_bytes()
        except OSError:
            return None
        blob = data[_HEADER:]
        if blob and data[:_HEADER] == MAGIC + hashlib.sha256(blob).digest():
            return blob
        logger.warning("the engine %s is damaged; it is built again", self.path(key))
        return None


def engine_key(identity: str, module: torch.fx.GraphModule, inputs: Sequence[Any], settings: Any) -> str:
    """The key of the engine for a graph, as 64 hexadecimal digits.

    Parameters
    ----------
    identity:
        What the engine depends on beside its graph: model, weights, GPU and versions; the key of the entry.
    module:
        The lowered graph that becomes one engine.
    inputs:
        Its inputs as `torch_tensorrt.Input`.
    settings:
        Torch-TensorRT's `CompilationSettings`.

    Raises
    ------
    BuildError
        The graph or the settings hold something that cannot be compared between processes.
    """
    facts = [identity, canonical_graph(module), [_input(spec) for spec in inputs], _settings(settings)]
    text = json.dumps(facts, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _input(spec: Any) -> Any:
    return canonical_value([spec.shape, spec.dtype, spec.format, spec.tensor_domain, spec.is_shape_tensor])


def _settings(settings: Any) -> dict[str, Any]:
    facts = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in NOT_IN_ENGINE:
            continue
        if field.name == "device":  # never its index
            value = [value.device_type, value.dla_core]
        elif field.name in _UNORDERED and value is not None:
            value = set(value)
        facts[field.name] = canonical_value(value)
    return facts


def make_engine_cache(files: EngineFiles, identity: str) -> Any:
    """A `BaseEngineCache` on `files`, for Torch-TensorRT's option ``custom_engine_cache``; imports Torch-TensorRT.

    Its attribute `operators` counts the operators of the graphs that became engines, found or built.
    """
    from torch_tensorrt.dynamo._engine_cache import BaseEngineCache

    class EngineCache(BaseEngineCache):  # type: ignore[misc]
        def __init__(self) -> None:
            self.operators = 0

        # A static method upstream, where it is called on the instance.
        def get_hash(self, gm: torch.fx.GraphModule, input_specs: Sequence[Any], settings: Any) -> str:
            self.operators += count_operators(gm)
            return engine_key(identity, gm, input_specs, settings)

        def save(self, hash: str, blob: bytes, *args: Any, **kwargs: Any) -> None:
            files.save(hash, blob)

        def load(self, hash: str, *args: Any, **kwargs: Any) -> bytes | None:
            return files.load(hash)

        def check(self, hash: str, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().check(hash, *args, **kwargs)
            except Exception as error:  # unpickling raises anything
                logger.warning("the engine %s cannot be read: %s: %s", hash, type(error).__name__, error)
                files.refuse(hash)
                return None

    return EngineCache()


def count_operators(module: torch.fx.GraphModule) -> int:
    """Operators of a graph and of the graphs that it calls; taking an element out of a tuple is none."""
    count = 0
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            count += 1
        elif node.op == "call_module":
            child = module.get_submodule(str(node.target))
            count += count_operators(child) if isinstance(child, torch.fx.GraphModule) else 0
    return count
