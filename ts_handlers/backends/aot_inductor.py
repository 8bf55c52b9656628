"""Backend `aot_inductor`: an exported program compiled ahead of time, run by torch's C++ loader.

The entry holds shared libraries (and, for a GPU, device code) but not the weights: those are taken from the archive by
name when the artifact is loaded, so an entry is a few megabytes and outlives a fine-tune. Loading imports neither
`torch._inductor` nor `torch._dynamo` nor the model's own Python files.

Building walks a ladder, because not every model exports with every range:

1. ``dynamic``: all declared dimensions dynamic, sizes 0 and 1 not specialised (``backed_size_oblivious``);
2. ``dynamic+ones``: dimensions dynamic from 2, and one more variant for each combination of dimensions of size 1;
3. ``static``: one variant for each declared warm-up size.

Every step is checked against the eager model at the ends of its ranges before it is accepted. On a GPU it is tried
with linear layers merged first (`aot_inductor_linears`), and with the layers as they are if that does not work.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from ts_handlers import fingerprint
from ts_handlers.archive_files import Tensors
from ts_handlers.backends.aot_inductor_container import Container, TorchRunner, open_library
from ts_handlers.backends.base import Built, Description, Loaded, Phase, Request
from ts_handlers.errors import BuildError, InputError, LoadError, ModelError
from ts_handlers.exported_source import ExportedSource
from ts_handlers.settings import Dimension, InputSpec
from ts_handlers.signature import Signature, Sizes
from ts_handlers.structure import unflatten

if TYPE_CHECKING:
    from ts_handlers.backends.aot_inductor_export import Variant
    from ts_handlers.backends.aot_inductor_graphs import GraphSlots

logger = logging.getLogger(__name__)

EXTRAS = "constants.pt"
MERGES_LINEARS = ("cuda",)
"""Types of devices on which merged linear layers are faster; see docs/decisions/0021-merged-linears.md."""


class AotInductorBackend:
    """See the module's docstring."""

    name = "aot_inductor"
    persistent = True

    def bakes_weights(self, request: Request) -> bool:
        """Only for exported programs, whose file is the only source of the weights."""
        return not request.source.weights_by_name

    def options(self, request: Request) -> dict[str, str]:
        """The `torch.compile` mode and options, which are options of Inductor."""
        compile_settings = request.settings.compile
        facts = {f"inductor.{name}": json.dumps(value) for name, value in compile_settings.options.items()}
        if compile_settings.mode is not None:
            facts["mode"] = compile_settings.mode
        if request.device.type == "cpu":
            facts["threads"] = str(torch.get_num_threads())  # Inductor writes it into the OpenMP pragmas
        if self._merges_linears(request):
            facts["linears"] = "merged"
        if request.signature is not None and request.signature.dimensions:
            facts["optimised_for"] = ",".join(f"{k}={v}" for k, v in sorted(request.example_sizes.items()))
        return facts

    def _merges_linears(self, request: Request) -> bool:
        """Whether linear layers are merged where they can be; those of exported programs stay as they are."""
        return request.device.type in MERGES_LINEARS and not self.bakes_weights(request)

    def toolchain(self, request: Request) -> str:
        """torch, C library and CUDA; not the compiler, which a machine that only loads does not need."""
        return fingerprint.toolchain(request.device.type)

    def build(self, request: Request, directory: Path, phase: Phase) -> Built:
        """Export, compile, check against eager, and leave the shared libraries in `directory`."""
        if isinstance(request.source, ExportedSource):
            return _build_exported(request, request.source, directory, phase)
        from ts_handlers.backends.aot_inductor_export import export_ladder, forget_traces

        signature = request.require_signature()
        module = request.eager()
        reasons = []
        for step, variants in export_ladder(signature, request):
            for merged in (set[str](), None) if self._merges_linears(request) else (None,):
                for path in directory.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                try:
                    description = _build_step(request, module, signature, variants, directory, phase, merged)
                except (ModelError, MemoryError):
                    raise
                except Exception as error:
                    how = f"{step} with merged linear layers" if merged else step
                    reason = f"{how}: {type(error).__name__}: {_first_line(error)}"
                    logger.info("%s does not export this way: %s", request.source.name, reason)
                    reasons.append(reason)
                    if merged:
                        continue
                    break
                forget_traces()
                description["step"] = step
                description["steps_failed"] = reasons
                return Built(description)
        raise BuildError("no way of exporting this model works: " + "; ".join(reasons))

    def load(self, request: Request, directory: Path, description: Description) -> Loaded:
        """Load the shared libraries in place and give them the weights by name."""
        signature = _signature_of(description)
        constants = _constants(request, directory, description)
        variants = description["variants"]
        fixed = [variant["fixed"] for variant in variants]
        output = description["output"]
        ensure_loadable()
        graphs = _graph_slots(request, directory, variants, constants)
        libraries: list[Container | TorchRunner] = []
        if graphs is None:
            libraries = [_load_library(request, directory, variant, constants) for variant in variants]
            runs = [library.run for library in libraries]
        else:
            runs = [functools.partial(graphs.run, index) for index in range(len(variants))]
        only = runs[0] if len(runs) == 1 else None

        def run(tensors: list[torch.Tensor]) -> Any:
            infer = only or runs[_choose_variant(fixed, signature, tensors)]
            return unflatten(infer(tensors), output)

        facts = {
            "step": description.get("step"),
            "variants": [variant["name"] for variant in variants],
            "ranges": {name: [d.min, d.max] for name, d in signature.dimensions.items()},
            "weights_from": description["weights_from"],
            "merged_linears": sum(len(s["shape"]) == 2 for s in description["constants"].values() if "parts" in s),
        }
        loaded = Loaded(
            run=run,
            signature=signature,
            sizes=fixed if description.get("step") == "static" else None,
            variants=len(variants),
            facts=facts,
            adjusts_threads=request.device.type == "cpu",
            frees_interpreter=request.device.type == "cpu" and all(isinstance(each, Container) for each in libraries),
        )
        if graphs is not None:
            loaded.pool, loaded.seal = graphs.pool, functools.partial(graphs.seal, facts)
        return loaded


def _build_step(
    request: Request,
    module: torch.nn.Module,
    signature: Signature,
    variants: list[Variant],
    directory: Path,
    phase: Phase,
    merged: set[str] | None,
) -> Description:
    """One step. `merged` gets the names of the variants whose linear layers are merged; None leaves them apart."""
    from ts_handlers.backends.aot_inductor_export import (
        PREFIX,
        FlatModel,
        compile_program,
        export_program,
        live_weights,
        output_structure,
        refuse_folded_weights,
    )
    from ts_handlers.backends.aot_inductor_linears import merge_linears

    example = request.example_sizes
    description: Description = {"variants": [], "constants": {}, "weights_from": "archive"}
    extras: Tensors = {}
    weights = request.source.weights()
    structure = output_structure(request, module, signature, [{**example, **fixed} for _, fixed, _, _ in variants])
    for name, fixed, ranges, oblivious in variants:
        flat = FlatModel(module, signature.names).eval()
        sizes = {**example, **fixed}
        inputs = tuple(tensor.to(request.device) for tensor in signature.generate(sizes, seed=1))
        with phase("export"):
            program = export_program(flat, inputs, signature, ranges, oblivious)
            constants = {**program.state_dict, **program.constants}
            archived = {fqn for fqn in live_weights(program) if fqn.removeprefix(PREFIX) in weights}
            if not all(_same(constants[fqn], weights[fqn.removeprefix(PREFIX)]) for fqn in archived):
                description["weights_from"] = "module"
            parts: dict[str, list[str]] = {}
            if merged is not None and description["weights_from"] == "archive":
                merged.add(name)
                parts = merge_linears(program, archived)
                constants.update(program.state_dict)
                if not parts:
                    merged.remove(name)
        try:
            with phase("compile"):
                files = compile_program(program, request, directory / name, baked=False)
            ensure_loadable()
            library = open_library(directory / name / files["library"], request.device)
            fqns = set(library.constant_names().values())
            refuse_folded_weights(program, fqns)
        finally:
            for fqn in parts:  # what is left of the trace would keep their memory during the check
                constants[fqn].untyped_storage().resize_(0)
        description["variants"].append({"name": name, "fixed": fixed, "ranges": ranges, **files})
        for fqn in sorted(fqns):
            tensor = constants[fqn].detach()
            stored = fqn.removeprefix(PREFIX)
            spec = {
                "name": stored,
                "dtype": str(tensor.dtype)[6:],
                "shape": list(tensor.shape),
                "stride": list(tensor.stride()),
                "extra": stored not in weights and fqn not in parts,
            }
            if fqn in parts:
                spec["parts"] = [
                    {"name": part.removeprefix(PREFIX), "shape": list(constants[part].shape)} for part in parts[fqn]
                ]
            if description["constants"].setdefault(fqn, spec) != spec:
                raise BuildError(f"the variants put {fqn!r} together from different weights")
            if spec["extra"]:
                extras[stored] = tensor.cpu()
    if description["weights_from"] == "module":
        logger.warning(
            "%s changes its weights while it is built, so a warm start has to build the eager model",
            request.source.name,
        )
    torch.save(extras, directory / EXTRAS)
    description["output"] = structure
    description["inputs"] = _inputs_description(signature)
    with phase("verify"):
        accepted = _verify(request, signature, directory, description, variants)
    description["dimensions"] = accepted
    return description


def _same(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a model's weight is the archive's, in the model's dtype."""
    return torch.equal(stored.to(tensor.dtype), tensor.detach().cpu())


def _inputs_description(signature: Signature) -> list[dict[str, Any]]:
    return [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "values": s.values} for s in signature.inputs]


def _verify(
    request: Request, signature: Signature, directory: Path, description: Description, variants: list[Variant]
) -> dict[str, list[int]]:
    """Compare with eager at the ends of the ranges (or at every static size); returns the ranges."""
    from ts_handlers.warmup import compare_sizes

    ranges = {name: [d.min, d.max] for name, d in signature.dimensions.items()}
    description["dimensions"] = ranges
    single = copy.copy(request)  # contexts and their CUDA graphs would only cost memory here
    contexts = msgspec.structs.replace(request.settings.contexts, count=1, cuda_graphs=False)
    single.settings = msgspec.structs.replace(request.settings, contexts=contexts)
    loaded = BACKEND.load(single, directory, description)
    static = all(not variant_ranges for _, _, variant_ranges, _ in variants)
    cases = [fixed for _, fixed, _, _ in variants] if static else signature.corner_sizes()
    compare_sizes(request, loaded, cases)
    return ranges


def _build_exported(request: Request, source: ExportedSource, directory: Path, phase: Phase) -> Built:
    """Compile an exported program as it is, with its weights inside."""
    from ts_handlers.backends.aot_inductor_export import compile_program
    from ts_handlers.backends.exported import describe_program

    with phase("export"):
        program = source.program
        inputs, dimensions, structure = describe_program(program, request.signature)
    signature = Signature(inputs, dimensions)
    with phase("compile"):
        files = compile_program(program, request, directory / "exported", baked=True)
    variant = {
        "name": "exported",
        "fixed": {},
        "ranges": {n: (d.min, d.max) for n, d in dimensions.items()},
        **files,
    }
    description: Description = {
        "variants": [variant],
        "constants": {},
        "weights_from": "artifact",
        "output": structure,
        "inputs": _inputs_description(signature),
        "dimensions": {name: [d.min, d.max] for name, d in dimensions.items()},
        "step": "exported",
    }
    return Built(description)


def _signature_of(description: Description) -> Signature:
    inputs = [
        InputSpec(
            name=spec["name"],
            dtype=spec["dtype"],
            shape=tuple(spec["shape"]),
            values=None if spec.get("values") is None else tuple(spec["values"]),
        )
        for spec in description["inputs"]
    ]
    return Signature(inputs, {name: Dimension(*bounds) for name, bounds in description["dimensions"].items()})


def _constants(request: Request, directory: Path, description: Description) -> Tensors:
    """Every constant by the name that the artifact uses, with the dtype, shape, stride and device it was built for."""
    if not description["constants"]:
        return {}
    if description["weights_from"] == "module":
        weights = {name: tensor.detach() for name, tensor in request.eager().state_dict().items()}
    else:
        weights = request.source.weights()
    extras: Tensors = torch.load(directory / EXTRAS, weights_only=True, map_location="cpu")
    constants = {}
    for fqn, spec in description["constants"].items():
        pool = extras if spec["extra"] else weights
        tensors = [_checked(pool, part) for part in spec.get("parts", [spec])]
        if pool is extras or description["weights_from"] == "module":
            constants[fqn] = _placed(tensors, spec, request.device)
            continue
        names = tuple(part["name"] for part in spec.get("parts", [spec]))
        kind = (names, spec["dtype"], *spec["shape"], *spec["stride"])
        if kind not in request.placed_weights:
            request.placed_weights[kind] = _placed(tensors, spec, request.device)
        constants[fqn] = request.placed_weights[kind]
    if request.device.type == "cuda":
        torch.cuda.synchronize(request.device)
    return constants


def _checked(pool: Tensors, spec: Description) -> torch.Tensor:
    """A weight by its name, with the shape that the artifact was built for."""
    if spec["name"] not in pool:
        raise LoadError(f"the archive's weights lack {spec['name']!r}, which the artifact needs")
    tensor = pool[spec["name"]].detach()
    if list(tensor.shape) != spec["shape"]:
        raise LoadError(
            f"weight {spec['name']!r} has shape {list(tensor.shape)}, the artifact was built for {spec['shape']}"
        )
    return tensor


def _placed(tensors: list[torch.Tensor], spec: Description, device: torch.device) -> torch.Tensor:
    """A constant with the dtype, shape and strides of the artifact; the only tensor itself if it has them.

    Several tensors are laid one after the other along dimension 0, each copied once, to its place on the device.
    """
    dtype = getattr(torch, spec["dtype"])
    if len(tensors) == 1:
        tensors = [tensors[0].to(device, dtype)]
        if list(tensors[0].stride()) == spec["stride"]:
            return tensors[0]
    fitting = torch.empty_strided(spec["shape"], spec["stride"], dtype=dtype, device=device)
    places = torch.split(fitting, [len(tensor) for tensor in tensors]) if len(tensors) > 1 else (fitting,)
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)
    return fitting


def _load_library(
    request: Request, directory: Path, variant: Description, constants: Tensors, single_threaded: bool = False
) -> Container | TorchRunner:
    path = directory / variant["name"] / variant["library"]
    library = open_library(path, request.device, request.settings.contexts.count, single_threaded)
    if constants:
        names = library.constant_names()
        missing = sorted(set(names.values()) - set(constants))
        if missing:  # running without them would kill the process
            raise LoadError(f"the artifact needs constants that its manifest does not list: {', '.join(missing[:5])}")
        library.use_constants({name: constants[fqn] for name, fqn in names.items()})
    return library


def _graph_slots(
    request: Request, directory: Path, variants: list[Description], constants: Tensors
) -> GraphSlots | None:
    """Slots with CUDA graphs, where they are wanted and possible."""
    contexts = request.settings.contexts
    if not contexts.cuda_graphs or request.device.type != "cuda":
        return None
    from ts_handlers.backends.aot_inductor_graphs import GraphSlots

    slots = []
    for _ in range(contexts.count):
        libraries = [
            _load_library(request, directory, variant, constants, single_threaded=True) for variant in variants
        ]
        usable = [library for library in libraries if isinstance(library, Container)]
        if len(usable) < len(libraries):
            logger.warning("%s: no CUDA graphs: it has operators that torch itself has to call", request.source.name)
            return None
        slots.append(usable)
    return GraphSlots(slots, contexts, request.device)


def _choose_variant(fixed: list[Sizes], signature: Signature, tensors: list[torch.Tensor]) -> int:
    """The variant for these sizes: the one that fixes most of them."""
    sizes = signature.sizes(tensors)
    fitting = [i for i, wanted in enumerate(fixed) if all(sizes[name] == size for name, size in wanted.items())]
    if not fitting:
        known = "; ".join(map(str, fixed))
        raise InputError(f"no artifact was built for sizes {sizes}; built are {known}: add the sizes to warmup")
    return max(fitting, key=lambda index: len(fixed[index]))


@functools.cache
def ensure_loadable() -> None:
    """Put the C++ standard library into the global symbol scope before the first artifact is loaded.

    libtorch_cpu of some builds (seen with torch 2.11.0+cu130, built with GCC 13.3) exports its own weak copies of
    std::regex; a shared library that AOTInductor compiled with another compiler then mixes both and every load ends
    in a segmentation fault. With libstdc++ promoted to the global scope the fault is gone; see
    docs/decisions/0003-libstdcxx-global.md: it also works after torch has been imported, which is the case in a
    TorchServe worker.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError):
        ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[0])[:300] if lines else ""


BACKEND = AotInductorBackend()
