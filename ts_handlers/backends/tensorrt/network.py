"""From an exported program to a TensorRT plan, with Torch-TensorRT's converters; imported on a build only.

Torch-TensorRT lowers the program and writes the TensorRT network; the plan is then built here, with the TensorRT API,
because Torch-TensorRT would deserialise it only to serialise it again, runs what it cannot build in eager mode without
saying so, and drops options that it does not know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ts_handlers.backends.tensorrt import quantized
from ts_handlers.backends.tensorrt.accumulation import accumulate_in_float32
from ts_handlers.backends.tensorrt.inputs import InputRange
from ts_handlers.backends.tensorrt.library import builder_flavour, import_tensorrt
from ts_handlers.backends.tensorrt.outputs import OutputMarker, Place
from ts_handlers.backends.tensorrt.torch_tensorrt_import import import_torch_tensorrt
from ts_handlers.errors import BuildError, SettingsError
from ts_handlers.settings import PT2_SECTION, SECTION
from ts_handlers.settings.sections import TensorRTSettings
from ts_handlers.system.files import write_atomically

# Fields of CompilationSettings that this backend sets itself, and the setting that governs each.
GOVERNED = {
    "device": "the worker's GPU",
    "pass_through_build_failures": "always on: a failed build takes the next backend",
    "require_full_compilation": "partial",
    "disable_tf32": "tf32",
    "workspace_size": "workspace_mb",
    "optimization_level": "optimization_level",
    "hardware_compatible": "always off: an entry is found by the name of its GPU",
    "enable_autocast": "precision",
    "immutable_weights": "always on: a plan belongs to its weights",
    "timing_cache_path": "kept in the store",
    "cache_built_engines": "the store keeps the plans",
    "reuse_cached_engines": "the store keeps the plans",
    "lazy_engine_init": "the store keeps the plans",
    "use_python_runtime": "plans are run by the TensorRT API",
    "dynamically_allocate_resources": "contexts",
    "dryrun": "not useful here",
}
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """A serialised engine, its tensors in the order of the program, and how much of the graph it holds.

    `returns` says where every output of the program is, see `ts_handlers.backends.tensorrt.outputs`. `converted` and
    `total` count operators after lowering.
    """

    data: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    returns: tuple[Place, ...]
    converted: int
    total: int


class PartialConversionError(BuildError):
    """Not every operator of the graph has a TensorRT converter."""

    def __init__(self, converted: int, total: int, missing: Sequence[str]) -> None:
        self.converted, self.total = converted, total
        super().__init__(
            f"{converted} of {total} operators convert to TensorRT; missing: {', '.join(sorted(missing)[:5])}. Take "
            f"another backend for this model, or set {SECTION}.tensorrt.partial: module"
        )


def compilation_settings(settings: TensorRTSettings, device_index: int) -> Any:
    """Torch-TensorRT's `CompilationSettings` for our settings.

    Raises
    ------
    SettingsError
        `options` names a field that this version of Torch-TensorRT does not have, or one that another setting governs.
    """
    torch_tensorrt = import_torch_tensorrt()
    from torch_tensorrt.dynamo._settings import CompilationSettings

    known = {field.name for field in dataclasses.fields(CompilationSettings)}
    for name, value in settings.options.items():
        where = f"{SECTION}.tensorrt.options.{name} (or {PT2_SECTION}.options.{name})"
        if name in GOVERNED:
            raise SettingsError(f"{where}: cannot be set here (value: {value!r}); governed by: {GOVERNED[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known - set(GOVERNED)), n=1)
            remedy = f"did you mean {close[0]!r}?" if close else "see torch_tensorrt.dynamo.CompilationSettings"
            raise SettingsError(
                f"{where}: Torch-TensorRT {torch_tensorrt.__version__} has no such option (value: {value!r}); {remedy}"
            )
    chosen: dict[str, Any] = {
        "device": torch_tensorrt.Device(gpu_id=device_index),
        "pass_through_build_failures": True,
        "assume_dynamic_shape_support": True,
        "disable_tf32": not settings.tf32,
        "workspace_size": 0 if settings.workspace_mb is None else settings.workspace_mb * MIB,
        "optimization_level": settings.optimization_level,
        "hardware_compatible": False,
        "immutable_weights": True,
        "enable_autocast": settings.precision == "autocast",
        **settings.options,
    }
    return CompilationSettings(**{name: value for name, value in chosen.items() if name in known})


class Network:
    """A TensorRT network made from a lowered graph.

    Parameters
    ----------
    graph:
        From `lower`.
    inputs:
        Its inputs in order, with the ranges over all profiles.
    profiles:
        The inputs of each optimization profile. All share the plan's weights; TensorRT chooses kernels for each.
    settings:
        From `compilation_settings`.

    Raises
    ------
    PartialConversionError
        An operator has no converter.
    BuildError
        The model cannot be a plan.
    """

    def __init__(
        self, graph: Any, inputs: Sequence[InputRange], profiles: Sequence[Sequence[InputRange]], settings: Any
    ) -> None:
        from torch_tensorrt import Input
        from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes
        from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

        self.graph = graph
        names = [node.target for node in graph.graph.nodes if node.op == "placeholder"]
        if len(names) != len(inputs):
            raise BuildError(f"the lowered graph has {len(names)} inputs, the model {len(inputs)}")
        specs = [_input(Input, name, spec) for name, spec in zip(names, inputs, strict=True)]
        dynamic = [spec.min != spec.max for spec in inputs]
        self._converted, self._total = _count_convertible(graph, settings)
        self.interpreter: Any = TRTInterpreter(
            graph, specs, output_dtypes=infer_module_output_dtypes(graph), compilation_settings=settings
        )
        missing = self.interpreter.validate_conversion()
        if missing or self._converted < self._total:
            raise PartialConversionError(self._converted, self._total, missing)
        marker = OutputMarker(self.interpreter)
        self.interpreter._construct_trt_network_def()
        self._returns = marker.places
        if self.interpreter.ctx.requires_output_allocator:
            raise BuildError("the shapes of this model's outputs depend on its data, which a plan cannot preallocate")
        if any(dynamic):  # Torch-TensorRT makes one profile only
            self.interpreter.optimization_profiles = [
                _profile(
                    self.interpreter.builder,
                    [(n, r) for n, r, varies in zip(names, ranges, dynamic, strict=True) if varies],
                )
                for ranges in profiles
            ]

    @property
    def definition(self) -> Any:
        """TensorRT's ``INetworkDefinition``."""
        return self.interpreter.ctx.net

    def build(self, timing_cache: Path | None, flags: Sequence[str] = ()) -> Plan:
        """Build the plan.

        Parameters
        ----------
        timing_cache:
            File of measured kernel times, shared by the builds of a store; None, or a flavour that does not measure,
            keeps none.
        flags:
            Names of TensorRT's ``BuilderFlag`` to set in addition.

        Raises
        ------
        BuildError
            TensorRT refuses the network; the message holds its errors.
        """
        config = self.interpreter._populate_trt_builder_config()
        for flag in flags:
            config.set_flag(getattr(import_tensorrt(builder_flavour()).BuilderFlag, flag))
        with _timing_cache(config, timing_cache), _collected_errors() as errors:
            data = self.interpreter.builder.build_serialized_network(self.definition, config)
        if data is None:
            raise BuildError("TensorRT built no plan: " + ("; ".join(errors) or "it gave no reason"))
        inputs, outputs = tuple(self.interpreter._input_names), tuple(self.interpreter._output_names)
        return Plan(bytes(memoryview(data)), inputs, outputs, self._returns, self._converted, self._total)


class Conversion:
    """An exported program and its network.

    Parameters
    ----------
    program:
        A `torch.export.ExportedProgram` with flat tensors in and out.
    inputs, profiles, settings:
        As those of `Network`.
    float32_accumulation:
        See `ts_handlers.backends.tensorrt.accumulation`.
    """

    def __init__(
        self,
        program: Any,
        inputs: Sequence[InputRange],
        profiles: Sequence[Sequence[InputRange]],
        settings: Any,
        *,
        float32_accumulation: bool = False,
    ) -> None:
        self._arguments = (inputs, profiles, settings)
        self._float32_accumulation = float32_accumulation
        quantized.prepare(program)
        self.program = decompose(program, settings)
        self.network = self.with_state({})

    def with_state(self, state: Mapping[str, torch.Tensor]) -> Network:
        """A network whose weights of these names have these values; the program keeps its own."""
        inputs, profiles, settings = self._arguments
        module = self.program.module()
        module.load_state_dict(state, strict=False, assign=True)
        if self._float32_accumulation:
            accumulate_in_float32(module)
        return Network(lower(module, settings), inputs, profiles, settings)


def decompose(program: Any, settings: Any) -> Any:
    """The first half of Torch-TensorRT's lowering: a program of operators that have converters."""
    import inspect

    from torch_tensorrt.dynamo.lowering import get_decompositions, pre_export_lowering

    program = pre_export_lowering(program, settings)
    wanted = {
        "enable_experimental_decompositions": settings.enable_experimental_decompositions,
        "decompose_attention": getattr(settings, "decompose_attention", False),
    }
    known = inspect.signature(get_decompositions).parameters
    decompositions = get_decompositions(**{k: v for k, v in wanted.items() if k in known})
    decompositions.setdefault(torch.ops.aten._safe_softmax.default, _safe_softmax)
    return program.run_decompositions(decompositions)


def lower(module: Any, settings: Any) -> Any:
    """The second half, which also folds constants: the graph module from which a network is made."""
    from torch_tensorrt.dynamo.lowering import post_lowering

    with quantized.kept_from_folding():
        return post_lowering(module, settings)


def _safe_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What attention becomes here and there, from operators that have converters: 0 in rows that are masked whole."""
    masked = scores.amax(dim, keepdim=True) == float("-inf")
    return torch.where(masked, 0.0, torch.softmax(scores, dim, dtype=dtype))


def _count_convertible(graph: Any, settings: Any) -> tuple[int, int]:
    from torch_tensorrt.dynamo.partitioning import get_graph_converter_support

    converted, total = get_graph_converter_support(graph, settings.torch_executed_ops)
    return int(converted), int(total)


def _profile(builder: Any, inputs: Sequence[tuple[str, InputRange]]) -> Any:
    profile = builder.create_optimization_profile()
    for name, spec in inputs:
        profile.set_shape(name, spec.min, spec.opt, spec.max)
    return profile


def _input(kind: Any, name: str, spec: InputRange) -> Any:
    if spec.min == spec.max:
        return kind(shape=spec.max, dtype=spec.dtype, name=name)
    return kind(min_shape=spec.min, opt_shape=spec.opt, max_shape=spec.max, dtype=spec.dtype, name=name)


@contextlib.contextmanager
def _timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    """Let the builder use and extend a file of measured kernel times; one build at a time, written by renaming.

    A file that TensorRT does not accept (another version's) is replaced.
    """
    measures = "tensorrt_rtx" not in type(config).__module__  # TensorRT for RTX compiles its kernels when they run
    if path is None or not measures:
        yield
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        known = path.read_bytes() if path.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
        yield
        data = bytes(memoryview(config.get_timing_cache().serialize()))
        write_atomically(path, data, mode=0o600)


@contextlib.contextmanager
def _collected_errors() -> Iterator[list[str]]:
    """What Torch-TensorRT's logger says at level ERROR inside the block."""
    import logging

    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage()[:300])

    collector = Collector(level=logging.ERROR)
    target = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]")
    target.addHandler(collector)
    try:
        yield messages
    finally:
        target.removeHandler(collector)
