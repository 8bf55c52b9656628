"""Backend `torch_tensorrt`: `torch.compile` through Torch-TensorRT, with every engine in the entry.

For models that the backend `tensorrt` cannot export as one graph (graph breaks, data-dependent control flow). A warm
start imports Torch-TensorRT and traces the model again, as at the first start; each graph then finds its engine in the
entry instead of building it. See `ts_handlers.backends.torch_tensorrt.engine_cache` for what tells engines apart.

Engines are kept whole, with their weights. An engine serves only the weights that it was built with: their digest is
in the key of the entry, and the entry's key is in the key of each engine.

Operators without a converter run in torch; `describe` says how many.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Backend, Built, Description, Target, Workspace, call_module, takes_names
from ts_handlers.backends.tensorrt import library as tensorrt_library
from ts_handlers.backends.tensorrt.options import engine_options, require_gpu
from ts_handlers.backends.torch_compile import compiles_nothing, plain, warmup_sizes
from ts_handlers.backends.torch_tensorrt.engine_cache import EngineCache, EngineFiles, count_operators
from ts_handlers.backends.working_directory import make_working_directory
from ts_handlers.errors import BuildError, LoadError
from ts_handlers.execution.base import Loaded, Run
from ts_handlers.key import fingerprint
from ts_handlers.key.parts import compute_key
from ts_handlers.model.signature import Signature, Sizes
from ts_handlers.settings import PT2_SECTION, SECTION, Settings

logger = logging.getLogger(__name__)

ENGINES = "engines"

# How Dynamo treats sizes: the declared dimensions are dynamic within their ranges; each warm-up size has engines of its
# own; every dimension is dynamic.
RANGES, STATIC, DYNAMIC = "ranges", "static", "dynamic"

# Settings of Torch-TensorRT that torch.compile ignores, beside those that this backend sets itself.
_IGNORED = ("offload_module_to_cpu", "strip_engine_weights")


class TorchTensorRTBackend:
    """See the module's docstring."""

    name = "torch_tensorrt"
    persistent = True
    needs_eager_module = True

    def bakes_weights(self, target: Target) -> bool:
        """Always: engines that are found must get the weights with which they were built."""
        return True

    def options(self, target: Target) -> dict[str, str]:
        """Every setting that changes an engine, the arguments of `torch.compile`, and the sizes that are compiled."""
        facts = engine_options(target.settings.tensorrt)
        facts["dynamic"] = str(target.settings.compile.dynamic)
        facts["fullgraph"] = str(target.settings.compile.fullgraph)
        facts["warmup"] = json.dumps(warmup_sizes(target), separators=(",", ":"), sort_keys=True)
        return facts

    def toolchain(self, target: Target) -> str:
        """The toolchain of the device with TensorRT, Torch-TensorRT and Python, which pickles each engine's facts."""
        flavour = tensorrt_library.builder_flavour_for(target.settings.tensorrt.flavour)
        package = tensorrt_library.FLAVOURS[flavour].converter
        facts = [fingerprint.toolchain(target.device.type), f"tensorrt={tensorrt_library.version(flavour)}"]
        facts.append(f"torch_tensorrt={fingerprint.distribution_version(package)}")
        facts.append(f"python={fingerprint.python_identity()}")
        return " ".join(facts)

    def build(self, target: Target, workspace: Workspace) -> Built:
        """Compile by running the warm-up, with the engines kept in the workspace, and compare with eager."""
        with workspace.phase("import"):
            options = _options(target)
        import torch._dynamo

        last: Exception | None = None
        for shapes in _ways(target):
            try:
                with workspace.phase("compile"):
                    files = EngineFiles(workspace.directory / ENGINES, writable=True)
                    loaded, call = _compile(target, files, options, shapes)
                with workspace.phase("verify"):
                    partly = _verify(target, loaded, call, shapes)
                loaded.facts["sizes_partly_eager"] = partly
                return Built({"shapes": shapes, "sizes_partly_eager": partly}, loaded)
            except Exception as error:
                last = error
                logger.info("%s with %s shapes: %s", target.source.name, shapes, error)
                shutil.rmtree(workspace.directory / ENGINES, ignore_errors=True)
                torch._dynamo.reset()
        assert last is not None
        raise last

    def load(self, target: Target, directory: Path, description: Description) -> Loaded:
        """Compile again, with the engines from the entry."""
        if not (directory / ENGINES).is_dir():
            raise LoadError("the entry holds no engines")
        files = EngineFiles(directory / ENGINES, writable=False)
        loaded, _ = _compile(target, files, _options(target), description["shapes"])
        if files.missed:
            logger.warning("%s: the entry lacked %d engines; they were built", target.source.name, len(files.missed))
        loaded.facts["sizes_partly_eager"] = description["sizes_partly_eager"]
        return loaded

    def substitute(self, settings: Settings, error: Exception) -> Backend | None:
        """None: the next backend of the fallback order."""
        return None


def _options(target: Target) -> dict[str, Any]:
    """Torch-TensorRT's settings by name, all of them, since it drops what it does not know and fills in the rest."""
    from ts_handlers.backends.tensorrt.network import compilation_settings

    require_gpu(target)
    section = target.settings.tensorrt
    for name in _IGNORED:
        if name in section.options:
            raise BuildError(f"Torch-TensorRT ignores {name} in torch.compile; remove it from {PT2_SECTION}.options")
    if section.precision in ("int8", "fp8"):
        raise BuildError(
            f"{SECTION}.tensorrt.precision: {section.precision} is for the backend tensorrt, which checks it"
        )
    if section.precision == "autocast":
        raise BuildError(
            "Torch-TensorRT ignores autocast in torch.compile; cast the model with "
            f"{SECTION}.dtype instead of {SECTION}.tensorrt.precision"
        )
    if section.float32_accumulation:
        raise BuildError(f"{SECTION}.tensorrt.float32_accumulation is for the backend tensorrt only; remove it")
    settings = compilation_settings(section, torch.cuda.current_device())
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    # The default is a file in the temporary folder that all users share, written without a lock.
    options["timing_cache_path"] = str(make_working_directory() / "timing.cache")
    return options


def _ways(target: Target) -> list[str]:
    """How to treat sizes, best first."""
    dynamic = target.settings.compile.dynamic
    if dynamic is not None:
        return [DYNAMIC if dynamic else STATIC]
    varies = any(d.min != d.max for d in target.require_signature().dimensions.values())
    return [RANGES, STATIC] if varies else [STATIC]


def _compile(target: Target, files: EngineFiles, options: dict[str, Any], shapes: str) -> tuple[Loaded, Run]:
    """Run every warm-up size, and once more to see that nothing is left to compile.

    Returns
    -------
    The artifact, which compiles nothing, and the same call in a form that compiles what is missing.
    """
    from torch._dynamo.utils import counters
    from torch_tensorrt.dynamo.backend.backends import torch_tensorrt_backend

    signature = target.require_signature()
    module = target.eager()
    by_name = takes_names(module, signature.names)
    cache = EngineCache(files, compute_key(BACKEND, target).digest)
    in_torch: list[int | None] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        compiled = torch_tensorrt_backend(graph, inputs, options=options)
        in_torch.append(count_operators(compiled) if isinstance(compiled, torch.fx.GraphModule) else None)
        return compiled

    compiled = torch.compile(
        module,
        backend=backend,
        dynamic={RANGES: None, STATIC: False, DYNAMIC: True}[shapes],
        fullgraph=target.settings.compile.fullgraph,
    )

    def call(tensors: list[torch.Tensor]) -> Any:
        # One mode for warm-up and requests: tensors made in inference mode would compile again.
        with torch.inference_mode(False), torch.no_grad():
            return call_module(compiled, signature.names, [plain(tensor) for tensor in tensors], by_name)

    def run(tensors: list[torch.Tensor]) -> Any:
        with compiles_nothing():
            return call(tensors)

    sizes = _sizes(target, shapes)
    breaks = sum(counters["graph_break"].values())
    with cache.serving():
        _compile_sizes(target, call, sizes, shapes)
    if not cache.operators:
        raise BuildError(
            f"no engine was built: {len(in_torch)} graphs with {[n or 0 for n in in_torch]} operators, none with "
            f"{options['min_block_size']} that convert (min_block_size in {PT2_SECTION}.options); take another backend"
        )
    _require_compiled(target, call, sizes)
    facts = {
        "flavour": tensorrt_library.version(tensorrt_library.builder_flavour()),
        "shapes": shapes,
        "engine_cache_hit": files.hits,
        "engine_cache_miss": len(files.missed),
        "engines_built": files.saved,
        "graphs": len(in_torch),
        "graph_breaks": sum(counters["graph_break"].values()) - breaks,
        "in_tensorrt": _fraction(target, cache.operators, in_torch),
    }
    if shapes == STATIC:
        facts["compiled"] = sizes  # others run eagerly
    loaded = Loaded(
        run=run,
        signature=signature,
        sizes=sizes if shapes == STATIC else None,
        variants=len(sizes) if shapes == STATIC else 1,
        facts=facts,
        warmed_up=True,
        # Torch-TensorRT's runtime has one execution context for each engine, and no lock round all of it.
        reentrant=False,
    )
    return loaded, call


def _compile_sizes(target: Target, call: Run, sizes: Sequence[Sizes], shapes: str) -> None:
    """Run every size, with nothing that would run eagerly without saying so."""
    limits: dict[str, Any] = {"recompile_limit": 8 * len(sizes), "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(**limits):
        for tensors in _inputs(target, sizes):
            if shapes == RANGES:
                _mark_ranges(target.require_signature(), tensors)
            call(tensors)


def _require_compiled(target: Target, call: Run, sizes: Sequence[Sizes]) -> None:
    """Raise `BuildError` where a size that has run would be compiled again."""
    for one, tensors in zip(sizes, _inputs(target, sizes), strict=True):
        reason = _run_compiled(call, tensors)
        if reason is not None:
            raise BuildError(f"at {one} the model would be compiled again at each request: {reason}")


def _inputs(target: Target, sizes: Sequence[Sizes]) -> list[list[torch.Tensor]]:
    signature = target.require_signature()
    return [[tensor.to(target.device) for tensor in signature.generate(one, seed=1)] for one in sizes]


def _mark_ranges(signature: Signature, tensors: list[torch.Tensor]) -> None:
    """Tell Dynamo the ranges of the declared dimensions: they become the engine's optimization profile.

    Size 1 has graphs of its own, because Dynamo specialises it.
    """
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        for axis, name in enumerate(spec.shape):
            if isinstance(name, str) and tensor.shape[axis] > 1:
                dimension = signature.dimensions[name]
                if dimension.min != dimension.max:
                    torch._dynamo.mark_dynamic(tensor, axis, min=max(2, dimension.min), max=dimension.max)


def _sizes(target: Target, shapes: str) -> list[Sizes]:
    """Sizes to run: those of `warmup_sizes`, and with ranges a second one for each dimension.

    What comes after a graph break is dynamic only in dimensions of which Dynamo has seen two sizes.
    """
    sizes = warmup_sizes(target)
    if shapes == RANGES:
        for name, dimension in target.require_signature().dimensions.items():
            example = target.example_sizes[name]
            other = dimension.max if dimension.max != example else max(2, dimension.min)
            wanted = {**target.example_sizes, name: other}
            if wanted not in sizes:
                sizes.insert(1, wanted)
    return sizes


def _run_compiled(call: Run, tensors: list[torch.Tensor]) -> str | None:
    """Run as a request is, with nothing allowed to compile; returns what would have compiled, or None."""
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            call(tensors)
    except RuntimeError as error:
        return str(error)
    return None


def _fraction(target: Target, in_tensorrt: int, in_torch: Sequence[int | None]) -> list[int | None]:
    """Operators in TensorRT, and operators in all graphs; None where a graph could not be counted."""
    counts = [count for count in in_torch if count is not None]
    total = in_tensorrt + sum(counts) if len(counts) == len(in_torch) else None
    if total is None:
        logger.warning("%s: %d operators in TensorRT, others in torch", target.source.name, in_tensorrt)
    elif in_tensorrt < total:
        logger.warning("%s: %d of %d operators in TensorRT", target.source.name, in_tensorrt, total)
    return [in_tensorrt, total]


def _verify(target: Target, loaded: Loaded, call: Run, shapes: str) -> list[Sizes]:
    """Compare with eager at the ends of the ranges; returns the sizes for which not everything was compiled.

    Engines of static shapes are compared at their own sizes.
    """
    from ts_handlers.backends.compare import compare_sizes

    cases = warmup_sizes(target) if shapes == STATIC else loaded.signature.corner_sizes()
    compare_sizes(target, loaded, cases)
    inputs = zip(cases, _inputs(target, cases), strict=True)
    partly = [sizes for sizes, tensors in inputs if _run_compiled(call, tensors) is not None]
    if partly:
        logger.warning("%s: at these sizes a part is not compiled and runs eagerly: %s", target.source.name, partly)
    return partly


BACKEND = TorchTensorRTBackend()
