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

import json
import logging
from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Backend, Built, Description, Target, Workspace
from ts_handlers.backends.index_limits import find_limits, merge_limits
from ts_handlers.backends.tensorrt import library as tensorrt_library
from ts_handlers.backends.tensorrt import weights as tensorrt_refit
from ts_handlers.backends.tensorrt.options import engine_options, require_gpu
from ts_handlers.backends.tensorrt.plan import load_plan, verify, write_plan
from ts_handlers.backends.tensorrt.profiles import (
    Ranges,
    bounds_of,
    enclosing_ranges,
    input_ranges,
    profile_ranges,
    sizes_at,
)
from ts_handlers.errors import BuildError, FailedBeforeError, RefitError
from ts_handlers.execution.base import Loaded
from ts_handlers.key import fingerprint
from ts_handlers.model.signature import Signature
from ts_handlers.settings import Settings

logger = logging.getLogger(__name__)

TIMING_CACHES = "timing"
"""Folder of measured kernel times, in the folder that the builds of a store share."""


class TensorRTBackend:
    """See the module's docstring."""

    name = "tensorrt"
    persistent = True
    needs_eager_module = False

    def refits(self, target: Target) -> bool:
        """Whether plans shall take their weights from the archive."""
        return target.settings.tensorrt.refit and target.source.weights_by_name

    def bakes_weights(self, target: Target) -> bool:
        """TensorRT folds and rearranges weights; a plan that is refitted takes others."""
        return not self.refits(target)

    def options(self, target: Target) -> dict[str, str]:
        """Every setting of the section that changes the plan, with the ranges it is built for."""
        facts = engine_options(target.settings.tensorrt)
        if self.refits(target):
            facts["refit"] = "True"
        facts["partial"] = target.settings.tensorrt.partial
        profiles = [bounds_of(ranges) for ranges in profile_ranges(target)]
        facts["profiles"] = json.dumps(profiles, separators=(",", ":"))
        return facts

    def toolchain(self, target: Target) -> str:
        """The toolchain of the device with the TensorRT flavour and its version."""
        flavour = tensorrt_library.choose_flavour(target.settings.tensorrt.flavour)
        return f"{fingerprint.toolchain(target.device.type)} tensorrt={tensorrt_library.version(flavour)}"

    def build(self, target: Target, workspace: Workspace) -> Built:
        """Export, convert, build the plans, check them against eager, and leave them in `directory`."""
        from ts_handlers.backends.export import FlatModel, output_structure
        from ts_handlers.backends.tensorrt.network import Conversion, PartialConversionError, compilation_settings
        from ts_handlers.backends.tensorrt.quantized import quantized_layers, require_precision

        require_gpu(target)
        flavour = tensorrt_library.builder_flavour_for(target.settings.tensorrt.flavour)
        with workspace.phase("import"):
            settings = compilation_settings(target.settings.tensorrt, torch.cuda.current_device())
        signature = target.require_signature()
        module = target.eager()
        profiles = profile_ranges(target)
        whole = enclosing_ranges(profiles)
        description: Description = {"flavour": flavour, "profiles": [bounds_of(ranges) for ranges in profiles]}
        sizes = [sizes_at(ranges, "opt") for ranges in profiles]
        description["output"] = output_structure(target, module, signature, sizes)
        flat = FlatModel(module, signature.names).eval()
        with workspace.phase("export"):
            program = export_range(flat, signature, whole, target.device)
        merge_limits(description, find_limits(program, signature))
        inputs = [input_ranges(signature, ranges, program) for ranges in profiles]
        timing_cache = _timing_cache(target, workspace.shared, flavour)
        try:
            with workspace.phase("convert"):
                conversion = Conversion(
                    program,
                    input_ranges(signature, whole, program),
                    inputs,
                    settings,
                    float32_accumulation=target.settings.tensorrt.float32_accumulation,
                )
            description["quantized"] = quantized_layers(conversion.network.definition)
            require_precision(target.settings.tensorrt.precision, description["quantized"])
        except PartialConversionError as error:
            if target.settings.tensorrt.partial == "next":
                raise
            from ts_handlers.backends.tensorrt.partial_module import build_module

            if self.refits(target):
                description["refit"] = refused(target, "not every operator is in TensorRT")
            return build_module(target, workspace, program, whole, settings, description, error)
        if self.refits(target):
            from ts_handlers.backends.tensorrt.refit.build import build_refittable

            try:
                return build_refittable(target, workspace, conversion, flat, timing_cache, description)
            except RefitError as error:
                logger.warning("%s: the plan is for these weights only: %s", target.source.name, error)
                description["refit"] = refused(target, str(error))
        with workspace.phase("convert"):
            plan = conversion.network.build(timing_cache)
        del module, flat, program, conversion
        write_plan(plan, workspace.directory, description)
        with workspace.phase("verify"):
            return Built(description, verify(target, workspace.directory, description))

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        """Deserialise the plans, give them the weights where they take them, and create the execution contexts."""
        require_gpu(target)
        if "module" in description:
            tensorrt_refit.plan_weights(target, description)  # refuses other weights than its own
            from ts_handlers.backends.tensorrt.partial_module import load_module

            return load_module(target, directory, description)
        return load_plan(target, directory, description)[0]

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        """A plan with its weights inside, for one that is refitted, unless nothing could be built at all."""
        unbuildable = error.unbuildable if isinstance(error, FailedBeforeError) else isinstance(error, BuildError)
        return WEIGHTS_INSIDE if settings.tensorrt.refit and not unbuildable else None


class WeightsInside(TensorRTBackend):
    """The same where `refit` cannot be had: plans for one set of weights each, found by their digest."""

    def refits(self, target: Target) -> bool:
        """Never."""
        return False

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        """None: the next backend of the fallback order."""
        return None


def refused(target: Target, reason: str) -> dict[str, str]:
    """What a description says under ``refit`` of a plan that holds its weights."""
    return {"refused": reason, "weights_digest": target.source.weights_digest()}


def export_range(flat: torch.nn.Module, signature: Signature, ranges: Ranges, device: torch.device) -> Any:
    """Export with the plan's dynamic dimensions, sizes 1 not specialised where the model allows it."""
    from ts_handlers.backends.export import export_program

    dynamic = {name: (r.min, r.max) for name, r in ranges.items() if r.min != r.max}
    # An example at the end of a range makes torch.export take the size for a constant.
    example = {name: r.opt if r.min < r.opt or r.min == r.max else r.max for name, r in ranges.items()}
    inputs = tuple(tensor.to(device) for tensor in signature.generate(example, seed=1))
    try:
        return export_program(flat, inputs, signature, dynamic, oblivious=True)  # type: ignore[arg-type]
    except Exception as error:
        logger.info("exporting with sizes 1 left open failed (%s); trying without", error)
    return export_program(flat, inputs, signature, dynamic, oblivious=False)  # type: ignore[arg-type]


def _timing_cache(target: Target, shared: Path | None, flavour: str) -> Path | None:
    if shared is None:
        return None
    device = fingerprint.device_slug(target.device)
    return shared / TIMING_CACHES / f"{tensorrt_library.version(flavour)}-{device}.cache"


BACKEND = TensorRTBackend()
WEIGHTS_INSIDE = WeightsInside()
