"""Backend `tensorrt`: plans built through Torch-TensorRT and run by the TensorRT API, in either flavour.

The entry holds the plan and, with TensorRT for RTX, the kernels that were compiled at its first run. Loading imports
neither Torch-TensorRT nor the compiler nor the model's own Python files. A plan holds its weights, so new weights need
a new plan; with ``refit: true`` it takes them from the archive, where that can be proven right.

Files of an entry::

    plan.engine    the serialised engine, with one optimization profile for each range
    plan.cache     TensorRT for RTX's runtime cache for it
    module.pt2     instead of a plan, with ``partial: module``: Torch-TensorRT's module, saved whole
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ts_handlers import fingerprint
from ts_handlers.archive_files import Tensors
from ts_handlers.backends import tensorrt_library, tensorrt_refit
from ts_handlers.backends.base import Built, Description, Loaded, Phase, Request, Run
from ts_handlers.backends.tensorrt_outputs import take
from ts_handlers.errors import BuildError, CanaryError, InputError, RefitError
from ts_handlers.settings import Dimension
from ts_handlers.settings.sections import Range, TensorRTSettings
from ts_handlers.signature import Signature, Sizes
from ts_handlers.structure import unflatten

logger = logging.getLogger(__name__)

Ranges = dict[str, Range]
Bounds = dict[str, list[int]]  # (min, opt, max) by dimension name, as in the manifest
PLAN, CACHE = "plan.engine", "plan.cache"
EXACT_PROFILES = 4


class TensorRTBackend:
    """See the module's docstring."""

    name = "tensorrt"
    persistent = True

    def refits(self, request: Request) -> bool:
        """Whether plans shall take their weights from the archive."""
        return request.settings.tensorrt.refit and request.source.weights_by_name

    def bakes_weights(self, request: Request) -> bool:
        """TensorRT folds and rearranges weights; a plan that is refitted takes others."""
        return not self.refits(request)

    def options(self, request: Request) -> dict[str, str]:
        """Every setting of the section that changes the plan, with the ranges it is built for."""
        facts = engine_options(request.settings.tensorrt)
        if self.refits(request):
            facts["refit"] = "True"
        facts["partial"] = request.settings.tensorrt.partial
        profiles = [_canonical(ranges) for ranges in profile_ranges(request)]
        facts["profiles"] = json.dumps(profiles, separators=(",", ":"))
        return facts

    def toolchain(self, request: Request) -> str:
        """The toolchain of the device with the TensorRT flavour and its version."""
        flavour = tensorrt_library.choose_flavour(request.settings.tensorrt.flavour)
        return f"{fingerprint.toolchain(request.device.type)} tensorrt={tensorrt_library.version(flavour)}"

    def build(self, request: Request, directory: Path, phase: Phase) -> Built:
        """Export, convert, build the plans, check them against eager, and leave them in `directory`."""
        from ts_handlers.backends.aot_inductor_export import FlatModel, output_structure
        from ts_handlers.backends.tensorrt_build import Conversion, PartialConversionError, compilation_settings
        from ts_handlers.backends.tensorrt_quantized import quantized_layers, require_precision

        require_gpu(request)
        flavour = tensorrt_library.builder_flavour_for(request.settings.tensorrt.flavour)
        with phase("import"):
            settings = compilation_settings(request.settings.tensorrt, torch.cuda.current_device())
        signature = request.require_signature()
        module = request.eager()
        profiles = profile_ranges(request)
        whole = _hull(profiles)
        description: Description = {"flavour": flavour, "profiles": [_canonical(ranges) for ranges in profiles]}
        sizes = [_part(ranges, "opt") for ranges in profiles]
        description["output"] = output_structure(request, module, signature, sizes)
        flat = FlatModel(module, signature.names).eval()
        with phase("export"):
            program = export_range(flat, signature, whole, request.device)
        inputs = [input_ranges(signature, ranges, program) for ranges in profiles]
        timing_cache = _timing_cache(request, flavour)
        try:
            with phase("convert"):
                conversion = Conversion(
                    program,
                    input_ranges(signature, whole, program),
                    inputs,
                    settings,
                    float32_accumulation=request.settings.tensorrt.float32_accumulation,
                )
            description["quantized"] = quantized_layers(conversion.network.definition)
            require_precision(request.settings.tensorrt.precision, description["quantized"])
        except PartialConversionError as error:
            if request.settings.tensorrt.partial == "next":
                raise
            from ts_handlers.backends.tensorrt_module import build_module

            if self.refits(request):
                description["refit"] = refused(request, "not every operator is in TensorRT")
            return build_module(request, directory, phase, program, whole, settings, description, error)
        if self.refits(request):
            from ts_handlers.backends.tensorrt_refit_build import build_refittable

            try:
                return build_refittable(request, directory, phase, conversion, flat, timing_cache, description)
            except RefitError as error:
                logger.warning("%s: the plan is for these weights only: %s", request.source.name, error)
                description["refit"] = refused(request, str(error))
        with phase("convert"):
            plan = conversion.network.build(timing_cache)
        del module, flat, program, conversion
        write_plan(plan, directory, description)
        with phase("verify"):
            return Built(description, verify(request, directory, description))

    def load(self, request: Request, directory: Path, description: Description) -> Loaded:
        """Deserialise the plans, give them the weights where they take them, and create the execution contexts."""
        require_gpu(request)
        if "module" in description:
            tensorrt_refit.plan_weights(request, description)  # refuses other weights than its own
            from ts_handlers.backends.tensorrt_module import load_module

            return load_module(request, directory, description)
        return _load(request, directory, description)[0]


class WeightsInside(TensorRTBackend):
    """The same where `refit` cannot be had: plans for one set of weights each, found by their digest."""

    def refits(self, request: Request) -> bool:
        """Never."""
        return False


def refused(request: Request, reason: str) -> dict[str, str]:
    """What a description says under ``refit`` of a plan that holds its weights."""
    return {"refused": reason, "weights_digest": request.source.weights_digest()}


def write_plan(plan: Any, directory: Path, description: Description) -> None:
    """Leave a `tensorrt_build.Plan` in an entry."""
    (directory / PLAN).write_bytes(plan.data)
    description["inputs"], description["outputs"] = list(plan.inputs), list(plan.outputs)
    description["returns"] = [list(place) for place in plan.returns]
    description["in_tensorrt"] = [plan.converted, plan.total]


def engine_options(settings: TensorRTSettings) -> dict[str, str]:
    """The settings of the section that change every engine, for the key."""
    facts = {
        "precision": settings.precision,
        "tf32": str(settings.tf32),
        "float32_accumulation": str(settings.float32_accumulation),
        "workspace_mb": str(settings.workspace_mb),
        "optimization_level": str(settings.optimization_level),
        "hardware_compatible": str(settings.hardware_compatible),
    }
    facts.update({f"tensorrt.{name}": json.dumps(value) for name, value in settings.options.items()})
    return facts


def profile_ranges(request: Request) -> list[Ranges]:
    """The ranges of each optimization profile: those of the settings, or what warm-up and dimensions declare.

    In the latter case there is one profile for exactly each of the first warm-up sizes, whose kernels are faster than
    those for a range, and one for everything; see docs/decisions/0008-tensorrt-plans.md.
    """
    signature = request.require_signature()
    settings: TensorRTSettings = request.settings.tensorrt
    example = request.example_sizes
    declared = {n: Range(d.min, example[n], d.max) for n, d in signature.dimensions.items()}
    if settings.ranges:
        return [{**declared, **dict(ranges)} for ranges in settings.ranges]
    exact: list[Ranges] = []
    for sizes in request.settings.warmup[:EXACT_PROFILES]:
        ranges = {name: Range(size, size, size) for name, size in {**example, **sizes}.items()}
        if ranges not in exact and ranges != declared:
            exact.append(ranges)
    return [*exact, declared]


def _hull(profiles: Sequence[Ranges]) -> Ranges:
    """The smallest ranges that hold those of every profile."""
    return {
        name: Range(min(p[name].min for p in profiles), profiles[0][name].opt, max(p[name].max for p in profiles))
        for name in profiles[0]
    }


def _canonical(ranges: Ranges) -> Bounds:
    return {name: [r.min, r.opt, r.max] for name, r in sorted(ranges.items())}


def _part(ranges: Ranges, part: str) -> Sizes:
    return {name: getattr(r, part) for name, r in ranges.items()}


def require_gpu(request: Request) -> None:
    """Raise `BuildError` unless the model runs on a CUDA GPU."""
    if request.device.type != "cuda":
        raise BuildError(f"TensorRT needs a CUDA GPU, the worker runs on {request.device.type}; take another backend")


def export_range(flat: torch.nn.Module, signature: Signature, ranges: Ranges, device: torch.device) -> Any:
    """Export with the plan's dynamic dimensions, sizes 1 not specialised where the model allows it."""
    from ts_handlers.backends.aot_inductor_export import export_program

    dynamic = {name: (r.min, r.max) for name, r in ranges.items() if r.min != r.max}
    # An example at the end of a range makes torch.export take the size for a constant.
    example = {name: r.opt if r.min < r.opt or r.min == r.max else r.max for name, r in ranges.items()}
    inputs = tuple(tensor.to(device) for tensor in signature.generate(example, seed=1))
    try:
        return export_program(flat, inputs, signature, dynamic, oblivious=True)  # type: ignore[arg-type]
    except Exception as error:
        logger.info("exporting with sizes 1 left open failed (%s); trying without", error)
    return export_program(flat, inputs, signature, dynamic, oblivious=False)  # type: ignore[arg-type]


def input_ranges(signature: Signature, ranges: Ranges, program: Any) -> list[Any]:
    """The program's inputs with their shapes at the ends and the middle of the ranges."""
    from ts_handlers.backends.tensorrt_build import InputRange

    def shape(spec: Any, part: str) -> tuple[int, ...]:
        return tuple(getattr(ranges[size], part) if isinstance(size, str) else size for size in spec.shape)

    return [
        InputRange(name, getattr(torch, spec.dtype), shape(spec, "min"), shape(spec, "opt"), shape(spec, "max"))
        for name, spec in zip(program.graph_signature.user_inputs, signature.inputs, strict=True)
    ]


def _timing_cache(request: Request, flavour: str) -> Path | None:
    if request.shared_folder is None:
        return None
    device = fingerprint.device_slug(request.device)
    return request.shared_folder / "timing" / f"{tensorrt_library.version(flavour)}-{device}.cache"


def _load(
    request: Request, directory: Path, description: Description, state: Tensors | None = None
) -> tuple[Loaded, Any]:
    """The plan on the device, and its engine; `state` is instead of the archive's weights."""
    from ts_handlers.backends.tensorrt_runtime import TensorRTEngine
    from ts_handlers.serving.runner import EngineRunner
    from ts_handlers.serving.torch_device import TorchDevice

    signature = request.require_signature()
    contexts = request.settings.contexts
    profiles = description["profiles"]
    weights = tensorrt_refit.plan_weights(request, description, state)
    engine: Any = TensorRTEngine(
        description["flavour"],
        directory / PLAN,
        name=" | ".join(_label(ranges) for ranges in profiles),
        inputs=description["inputs"],
        outputs=description["outputs"],
        device=request.device,
        weights=weights,
        runtime_cache=directory / CACHE,
        cuda_graphs=contexts.cuda_graphs,
        output_bytes=description.get("output_bytes"),
    )
    device: Any = TorchDevice(request.device)
    runner = EngineRunner([engine], contexts, device)
    output = description["output"]
    returns = description.get("returns") or [["output", n] for n in range(len(description["outputs"]))]  # older entries
    several = len(profiles) > 1

    def run(tensors: list[torch.Tensor]) -> Any:
        index = choose_profile(profiles, signature.sizes(tensors)) if several else 0
        return unflatten(take(returns, runner.run(index, tensors), tensors), output)

    facts = {
        "weights_from": "plan" if weights is None else "archive",
        "flavour": tensorrt_library.version(description["flavour"]),
        "profiles": profiles,
        "in_tensorrt": description["in_tensorrt"],
        "quantized": description["quantized"],
        "contexts": contexts.count,
        "scratch": contexts.scratch,
        "memory": runner.memory(),
    }
    if "refused" in description.get("refit", {}):
        facts["refit_refused"] = description["refit"]["refused"]
    loaded = Loaded(
        run=run,
        signature=_covered(signature, profiles),
        sizes=_canary_sizes(profiles),
        variants=len(profiles),
        facts=facts,
        pool=runner.pool,
    )
    if engine.recorder is not None:
        loaded.seal = functools.partial(engine.recorder.seal, facts)
    return loaded, engine


def choose_profile(profiles: Sequence[Bounds], sizes: Sizes) -> int:
    """The profile that holds these sizes and is narrowest, or among equals closest to what it was optimised for.

    Raises
    ------
    InputError
        The plan was not built for these sizes.
    """

    def rank(index: int) -> tuple[int, int]:
        ranges = profiles[index]
        width = sum(high - low for low, _, high in ranges.values())
        return width, sum(abs(sizes[name] - opt) for name, (_, opt, _) in ranges.items())

    def holds(ranges: Bounds) -> bool:
        return all(low <= sizes[name] <= high for name, (low, _, high) in ranges.items())

    fitting = [index for index, ranges in enumerate(profiles) if holds(ranges)]
    if not fitting:
        known = "; ".join(_label(ranges) for ranges in profiles)
        raise InputError(f"the TensorRT plan was not built for sizes {sizes}, only for {known}: extend tensorrt.ranges")
    return min(fitting, key=rank)


def _label(ranges: Bounds) -> str:
    return ",".join(f"{name}={low}..{high}" for name, (low, _, high) in sorted(ranges.items())) or "static"


def _covered(signature: Signature, profiles: Sequence[Bounds]) -> Signature:
    """The declared signature narrowed to the smallest box round all profiles."""
    dimensions = {}
    for name in signature.dimensions:
        lows, _, highs = zip(*(ranges[name] for ranges in profiles), strict=True)
        dimensions[name] = Dimension(min(lows), max(highs))
    return Signature(signature.inputs, dimensions)


def _canary_sizes(profiles: Sequence[Bounds]) -> list[Sizes]:
    """What each profile was optimised for, then the smallest sizes of the first one."""
    sizes = [{name: opt for name, (_, opt, _) in ranges.items()} for ranges in profiles]
    smallest = {name: low for name, (low, _, _) in profiles[0].items()}
    return sizes if smallest in sizes else [*sizes, smallest]


def verify(
    request: Request,
    directory: Path,
    description: Description,
    eager: Run | None = None,
    state: Tensors | None = None,
) -> Loaded:
    """Compare the plan with eager at the ends of every profile, and keep the kernels compiled on the way.

    `state` is instead of the archive's weights, and `eager` computes with it.
    """
    from ts_handlers.backends.eager import eager_run
    from ts_handlers.warmup import compare_outputs

    signature = request.require_signature()
    loaded, engine = _load(request, directory, description, state)
    description["output_bytes"] = engine.output_bytes
    eager = eager or eager_run(request, signature.names)
    corners = [
        dict(zip(ranges, corner, strict=True))
        for ranges in description["profiles"]
        for corner in itertools.product(*(sorted(set(bounds)) for bounds in ranges.values()))
    ]
    with contextlib.nullcontext() if engine.recorder is None else engine.recorder.paused():
        for sizes in corners:
            tensors = [tensor.to(request.device) for tensor in signature.generate(sizes, seed=2)]
            try:
                compare_outputs(loaded.run(tensors), eager(tensors), request.settings.canary.tolerance)
            except (CanaryError, RuntimeError) as error:
                raise BuildError(f"at {sizes} the plan differs from eager: {error}") from error
    cache = engine.runtime_cache()
    if cache:
        (directory / CACHE).write_bytes(cache)
    return loaded


BACKEND = TensorRTBackend()
WEIGHTS_INSIDE = WeightsInside()
