"""Torch-TensorRT's engines in an entry: which engine belongs to which graph, and the files that hold them.

Torch-TensorRT's own key for an engine is made of operator names, input shapes and some settings; softmax over another
dimension, another literal, another edge or other weights share a key with it. Here the whole graph is in the key, and
the entry's own key, which holds the model, its weights, the GPU and every version.

A file is named after its key and made by one rename::

    8 bytes   b"TSHENG1\\n"
    32 bytes  SHA-256 of the rest
    rest      MessagePack: the fields of Torch-TensorRT's `SerializedInterpreterResult`, the engine with its weights
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from ts_handlers.backends.torch_tensorrt.graph_digest import canonical_graph, canonical_value
from ts_handlers.system.files import atomic_file
from ts_handlers.system.patching import replaced_attribute

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
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_file(self.path(key), mode=0o600) as file:
                file.write(MAGIC + hashlib.sha256(blob).digest())
                file.write(blob)
        except OSError as error:
            logger.warning("an engine could not be kept in %s: %s", self._directory, error)

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


class EngineCache:
    """Engines for the graphs that Torch-TensorRT converts, each found by `engine_key` or built and kept.

    Parameters
    ----------
    files:
        Where the engines lie.
    identity:
        As for `engine_key`.

    Attributes
    ----------
    operators:
        Operators of the graphs that became engines, found or built.
    """

    def __init__(self, files: EngineFiles, identity: str) -> None:
        self._files = files
        self._identity = identity
        self.operators = 0

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Let conversions inside the block find their engines here.

        Torch-TensorRT's hook for caches, `BaseEngineCache`, takes the weights out of an engine and puts them back by
        comparing values, which leaves some out (docs/decisions/0017-engine-cache.md). So whole engines with their
        weights are kept, one step further out.
        """
        from torch_tensorrt.dynamo.conversion import _conversion

        build = _conversion.interpret_module_to_result

        def interpret(
            module: torch.fx.GraphModule, inputs: Sequence[Any], settings: Any, *args: Any, **more: Any
        ) -> Any:
            self.operators += count_operators(module)
            key = engine_key(self._identity, module, inputs, settings)
            found = self._load(key)
            if found is not None:
                shapes = _conversion.extract_symbolic_shape_expressions(module)
                return _conversion.SerializedInterpreterResult(symbolic_shape_expressions=shapes, **found)
            built = build(module, inputs, settings, *args, **more)
            facts = {**built._asdict(), "weight_name_map": None}  # for refitting, which is never done
            kept = {name: facts[name] for name in built._fields if name != "symbolic_shape_expressions"}
            self._files.save(key, msgspec.msgpack.encode(kept))
            return built

        with replaced_attribute(_conversion, "interpret_module_to_result", interpret):
            yield

    def _load(self, key: str) -> dict[str, Any] | None:
        blob = self._files.load(key)
        if blob is None:
            return None
        try:
            return msgspec.msgpack.decode(blob, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            logger.warning("the engine %s cannot be read: %s", key, error)
            self._files.refuse(key)
            return None


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
