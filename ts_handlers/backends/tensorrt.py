"""Backend `tensorrt`: plans built through Torch-TensorRT and run by the TensorRT API, in either flavour.

The entry holds the plan and, with TensorRT for RTX, the kernels that were compiled at its first run. Loading imports
neither Torch-TensorRT nor the compiler nor the model's own Python files. A plan holds its weights, so new weights need
a new plan.

Files of an entry::

    plan-<n>.engine    the serialised engine of the n-th range
    plan-<n>.cache     TensorRT for RTX's runtime cache for it
    module.pt2         instead of plans, with ``partial: module``: Torch-TensorRT's module, saved whole
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from ts_handlers import fingerprint
from ts_handlers.backends import tensorrt_library
from ts_handlers.backends.base import Built, Description, Loaded, Phase, Request
from ts_handlers.errors import BuildError, CanaryError, InputError
from ts_handlers.settings import Dimension
from ts_handlers.settings.sections import ContextSettings, Range, TensorRTSettings
from ts_handlers.signature import Signature, Sizes
from ts_handlers.structure import unflatten

logger = logging.getLogger(__name__)

Ranges = dict[str, Range]


class TensorRTBackend:
    """See the module's docstring."""

    name = "tensorrt"
    persistent = True

    def bakes_weights(self, request: Request) -> bool:
        """Always: TensorRT folds and rearranges weights."""
        return True

    def options(self, request: Request) -> dict[str, str]:
        """Every setting of the section that changes the plan, with the ranges it is built for."""
        settings = request.settings.tensorrt
        facts = {
            "precision": settings.precision,
            "tf32": str(settings.tf32),
            "workspace_mb": str(settings.workspace_mb),
            "optimization_level": str(settings.optimization_level),
            "hardware_compatible": str(settings.hardware_compatible),
            "partial": settings.partial,
            "plans": json.dumps([_canonical(ranges) for ranges in plan_ranges(request)], separators=(",", ":")),
        }
        facts.update({f"tensorrt.{name}": json.dumps(value) for name, value in settings.options.items()})
        return facts

    def toolchain(self, request: Request) -> str:
        """The toolchain of the device with the TensorRT flavour and its version."""
        flavour = tensorrt_library.choose_flavour(request.settings.tensorrt.flavour)
        return f"{fingerprint.toolchain(request.device.type)} tensorrt={tensorrt_library.version(flavour)}"

    def build(self, request: Request, directory: Path, phase: Phase) -> Built:
        """Export, convert, build the plans, check them against eager, and leave them in `directory`."""
        from ts_handlers.backends.aot_inductor_export import FlatModel, output_structure
        from ts_handlers.backends.tensorrt_build import PartialConversionError, compilation_settings

        _require_gpu(request)
        flavour = tensorrt_library.choose_flavour(request.settings.tensorrt.flavour)
        with phase("import"), tensorrt_library.ready_for_torch_tensorrt(flavour):
            settings = compilation_settings(request.settings.tensorrt, torch.cuda.current_device())
        signature = request.require_signature()
        module = request.eager()
        chosen = plan_ranges(request)
        description: Description = {"flavour": flavour, "plans": []}
        sizes = [_part(ranges, "opt") for ranges in chosen]
        description["output"] = output_structure(request, module, signature, sizes)
        flat = FlatModel(module, signature.names).eval()
        for number, ranges in enumerate(chosen):
            with phase("export"):
                program = export_range(flat, signature, ranges, request.device)
            try:
                with phase("convert"):
                    plan = _convert(program, signature, ranges, settings, request)
            except PartialConversionError as error:
                if request.settings.tensorrt.partial == "next":
                    raise
                from ts_handlers.backends.tensorrt_module import build_module

                return build_module(request, directory, phase, signature, chosen, settings, description, error)
            file = f"plan-{number}.engine"
            (directory / file).write_bytes(plan.data)
            description["plans"].append(
                {
                    "file": file,
                    "cache": None,
                    "inputs": list(plan.inputs),
                    "outputs": list(plan.outputs),
                    "ranges": _canonical(ranges),
                    "in_tensorrt": [plan.converted, plan.total],
                }
            )
        del module, flat
        with phase("verify"):
            _verify(request, signature, directory, description)
        return Built(description)

    def load(self, request: Request, directory: Path, description: Description) -> Loaded:
        """Deserialise the plans and create the execution contexts."""
        _require_gpu(request)
        if "module" in description:
            from ts_handlers.backends.tensorrt_module import load_module

            return load_module(request, directory, description)
        loaded, _ = _load(request, directory, description, request.settings.contexts)
        return loaded


def plan_ranges(request: Request) -> list[Ranges]:
    """The ranges of each plan: those of the settings, or one over the declared dimensions."""
    signature = request.require_signature()
    settings: TensorRTSettings = request.settings.tensorrt
    if settings.ranges:
        fixed = {n: Range(d.min, d.min, d.max) for n, d in signature.dimensions.items()}
        return [{**fixed, **dict(ranges)} for ranges in settings.ranges]
    example = request.example_sizes
    return [{n: Range(d.min, example[n], d.max) for n, d in signature.dimensions.items()}]


def _canonical(ranges: Ranges) -> dict[str, list[int]]:
    return {name: [r.min, r.opt, r.max] for name, r in sorted(ranges.items())}


def _part(ranges: Ranges, part: str) -> Sizes:
    return {name: getattr(r, part) for name, r in ranges.items()}


def _require_gpu(request: Request) -> None:
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


def _convert(program: Any, signature: Signature, ranges: Ranges, settings: Any, request: Request) -> Any:
    from ts_handlers.backends.tensorrt_build import convert

    cache = None
    if request.shared_folder is not None:
        device = fingerprint.device_slug(request.device)
        flavour = tensorrt_library.choose_flavour(request.settings.tensorrt.flavour)
        cache = request.shared_folder / "timing" / f"{tensorrt_library.version(flavour)}-{device}.cache"
    return convert(program, input_ranges(signature, ranges, program), settings, cache)


def _load(
    request: Request, directory: Path, description: Description, contexts: ContextSettings
) -> tuple[Loaded, list[Any]]:
    from ts_handlers.backends.tensorrt_runtime import TensorRTEngine
    from ts_handlers.serving.runner import EngineRunner
    from ts_handlers.serving.torch_device import TorchDevice

    signature = request.require_signature()
    plans = description["plans"]
    engines: list[Any] = [
        TensorRTEngine(
            description["flavour"],
            (directory / plan["file"]).read_bytes(),
            name=_label(plan["ranges"]),
            inputs=plan["inputs"],
            outputs=plan["outputs"],
            device=request.device,
            runtime_cache=directory / plan["cache"] if plan["cache"] else None,
            cuda_graphs=contexts.cuda_graphs,
        )
        for plan in plans
    ]
    device: Any = TorchDevice(request.device)
    runner = EngineRunner(engines, contexts, device)
    output = description["output"]
    several = len(plans) > 1

    def run(tensors: list[torch.Tensor]) -> Any:
        index = choose_plan(plans, signature.check(tensors)) if several else 0
        return unflatten(runner.run(index, tensors), output)

    facts = {
        "flavour": tensorrt_library.version(description["flavour"]),
        "plans": [{"ranges": plan["ranges"], "in_tensorrt": plan["in_tensorrt"]} for plan in plans],
        "contexts": contexts.count,
        "scratch": contexts.scratch,
        "memory": runner.memory(),
    }
    loaded = Loaded(
        run=run,
        signature=_covered(signature, plans),
        sizes=_canary_sizes(plans),
        variants=len(plans),
        facts=facts,
        pool=runner.pool,
    )
    return loaded, engines


def choose_plan(plans: Sequence[dict[str, Any]], sizes: Sizes) -> int:
    """The plan whose ranges hold these sizes, closest to what it was optimised for.

    Raises
    ------
    InputError
        No plan was built for these sizes.
    """

    def distance(ranges: dict[str, list[int]]) -> float:
        return sum(abs(sizes[name] - opt) / max(high - low, 1) for name, (low, opt, high) in ranges.items())

    def holds(ranges: dict[str, list[int]]) -> bool:
        return all(low <= sizes[name] <= high for name, (low, _, high) in ranges.items())

    fitting = [(distance(plan["ranges"]), index) for index, plan in enumerate(plans) if holds(plan["ranges"])]
    if not fitting:
        known = "; ".join(_label(plan["ranges"]) for plan in plans)
        raise InputError(f"no TensorRT plan was built for sizes {sizes}; built are {known}: extend tensorrt.ranges")
    return min(fitting)[1]


def _label(ranges: dict[str, list[int]]) -> str:
    return ",".join(f"{name}={low}..{high}" for name, (low, _, high) in sorted(ranges.items())) or "static"


def _covered(signature: Signature, plans: Sequence[dict[str, Any]]) -> Signature:
    """The declared signature narrowed to the smallest box round all plans."""
    dimensions = {}
    for name in signature.dimensions:
        lows = [plan["ranges"][name][0] for plan in plans]
        highs = [plan["ranges"][name][2] for plan in plans]
        dimensions[name] = Dimension(min(lows), max(highs))
    return Signature(signature.inputs, dimensions)


def _canary_sizes(plans: Sequence[dict[str, Any]]) -> list[Sizes]:
    """What each plan was optimised for, then the smallest sizes of all."""
    sizes = [{name: r[1] for name, r in plan["ranges"].items()} for plan in plans]
    smallest = {name: r[0] for name, r in plans[0]["ranges"].items()}
    return sizes if smallest in sizes else [*sizes, smallest]


def _verify(request: Request, signature: Signature, directory: Path, description: Description) -> None:
    """Compare every plan with eager at the ends of its ranges, and keep the kernels compiled on the way."""
    from ts_handlers.backends.eager import eager_run
    from ts_handlers.warmup import compare_outputs

    one = msgspec.structs.replace(request.settings.contexts, count=1, scratch="private", cuda_graphs=False)
    loaded, engines = _load(request, directory, description, one)
    eager = eager_run(request, signature.names)
    for plan in description["plans"]:
        ends = [sorted(set(bounds)) for bounds in plan["ranges"].values()]
        for corner in itertools.product(*ends):
            sizes = dict(zip(plan["ranges"], corner, strict=True))
            tensors = [tensor.to(request.device) for tensor in signature.generate(sizes, seed=2)]
            try:
                compare_outputs(loaded.run(tensors), eager(tensors), request.settings.canary.tolerance)
            except (CanaryError, RuntimeError) as error:
                raise BuildError(f"at {sizes} the plan differs from eager: {error}") from error
    for number, (plan, engine) in enumerate(zip(description["plans"], engines, strict=True)):
        cache = engine.runtime_cache()
        if cache:
            plan["cache"] = f"plan-{number}.cache"
            (directory / plan["cache"]).write_bytes(cache)


BACKEND = TensorRTBackend()
