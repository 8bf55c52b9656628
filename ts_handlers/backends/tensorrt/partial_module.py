"""Graphs that TensorRT takes only in part: Torch-TensorRT's own module, saved and reloaded whole.

Its remaining operators run in torch, which `describe` reports as the fraction in TensorRT. Loading it imports
Torch-TensorRT, which takes seconds; `partial: module` is for models that no other backend serves better.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Built, Description, Target, Workspace
from ts_handlers.backends.index_limits import with_limits
from ts_handlers.backends.tensorrt.profiles import covered_signature
from ts_handlers.errors import BuildError
from ts_handlers.execution.base import Loaded
from ts_handlers.model.signature import Signature
from ts_handlers.model.structure import unflatten

FILE = "module.pt2"


def build_module(
    target: Target,
    workspace: Workspace,
    program: Any,
    ranges: Any,
    settings: Any,
    description: Description,
    partial: Any,
) -> Built:
    """Compile with Torch-TensorRT's partitioner and save its module.

    Parameters
    ----------
    program, ranges:
        What was exported, and for which ranges; a module has one profile.
    partial:
        The `PartialConversionError` that says how much converts.
    """
    import torch_tensorrt

    from ts_handlers.backends.compare import compare_sizes
    from ts_handlers.backends.tensorrt.profiles import input_ranges

    if len(description["profiles"]) > 1:
        raise BuildError("tensorrt.ranges with several elements needs a graph that converts whole; this one does not")
    if target.settings.tensorrt.float32_accumulation:
        raise BuildError("tensorrt.float32_accumulation needs a graph that converts whole; this one does not")
    signature = target.require_signature()
    specs = input_ranges(signature, ranges, program)
    inputs = [
        torch_tensorrt.Input(shape=spec.max, dtype=spec.dtype, name=spec.name)
        if spec.min == spec.max
        else torch_tensorrt.Input(
            min_shape=spec.min, opt_shape=spec.opt, max_shape=spec.max, dtype=spec.dtype, name=spec.name
        )
        for spec in specs
    ]
    examples = [
        tensor.to(target.device) for tensor in signature.generate({n: r.opt for n, r in ranges.items()}, seed=1)
    ]
    options = {name: value for name, value in vars(settings).items() if name not in ("dryrun",)}
    with workspace.phase("convert"):
        compiled = torch_tensorrt.dynamo.compile(program, arg_inputs=inputs, **options)
        torch_tensorrt.save(
            compiled,
            str(workspace.directory / FILE),
            output_format="exported_program",
            arg_inputs=examples,
            dynamic_shapes=_dynamic_shapes(signature, ranges, program),
        )
    description["module"] = FILE
    description["in_tensorrt"] = [partial.converted, partial.total]
    loaded = load_module(target, workspace.directory, description)
    with workspace.phase("verify"):
        compare_sizes(target, loaded, loaded.signature.corner_sizes(), what="module of Torch-TensorRT")
    return Built(description)


def _dynamic_shapes(signature: Signature, ranges: Any, program: Any) -> dict[str, dict[int, Any]]:
    """The dynamic axes of each input of the program, by its name in the graph."""
    dims = {name: torch.export.Dim(name, min=r.min, max=r.max) for name, r in ranges.items() if r.min != r.max}
    return {
        name: {axis: dims[size] for axis, size in enumerate(spec.shape) if size in dims}
        for name, spec in zip(program.graph_signature.user_inputs, signature.inputs, strict=True)
    }


def load_module(target: Target, directory: Path, description: Description) -> Loaded:
    """Load what `build_module` saved."""
    from ts_handlers.backends.tensorrt.torch_tensorrt_import import import_torch_tensorrt

    import_torch_tensorrt()
    module = torch.export.load(directory / description["module"]).module()
    output = description["output"]

    def run(tensors: list[torch.Tensor]) -> Any:
        with torch.inference_mode():
            answers = module(*tensors)
        return unflatten(list(answers) if isinstance(answers, (tuple, list)) else [answers], output)

    facts = {"module": True, "in_tensorrt": description["in_tensorrt"]}
    # Torch-TensorRT's runtime has one execution context for each engine, and no lock round all of it.
    signature = with_limits(covered_signature(target.require_signature(), description["profiles"]), description)
    return Loaded(run=run, signature=signature, facts=facts, reentrant=False)
