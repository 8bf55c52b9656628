"""Loading for the backend `aot_inductor`: shared libraries in place, with the archive's weights by name."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ts_handlers.backends.aot_inductor.container import Container, TorchRunner, open_library
from ts_handlers.backends.base import Description, Target
from ts_handlers.backends.index_limits import limit_facts, with_limits
from ts_handlers.errors import InputError, LoadError
from ts_handlers.execution.base import Held, Loaded
from ts_handlers.model.archive_files import Tensors
from ts_handlers.model.signature import Signature, Sizes
from ts_handlers.model.structure import unflatten
from ts_handlers.settings import Dimension, InputSpec

if TYPE_CHECKING:
    from ts_handlers.backends.aot_inductor.graphs import GraphSlots

logger = logging.getLogger(__name__)

EXTRAS = "constants.pt"
"""Tensors of the model that are not among the archive's weights, by name."""
NUMBERS = "numbers.json"
"""The numbers among the model's attributes, which the code holds."""


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
    dimensions = {name: Dimension(*bounds) for name, bounds in description["dimensions"].items()}
    static = static_sizes(description)
    if static is not None:
        # Entries of earlier versions claim what was declared; what holds are the sizes that each variant fixes.
        for name in dimensions:
            found = [sizes[name] for sizes in static]
            dimensions[name] = Dimension(min(found), max(found))
    return with_limits(Signature(inputs, dimensions), description)


def static_sizes(description: Description) -> list[Sizes] | None:
    """The only sizes that an artifact answers, when each variant has fixed ones; None where some are dynamic."""
    fixed: list[Sizes] = [variant["fixed"] for variant in description["variants"]]
    complete = all(set(sizes) == set(description["dimensions"]) for sizes in fixed)
    return fixed if description["dimensions"] and complete else None


def _coverage(declared: Signature | None, static: list[Sizes] | None) -> dict[str, Any]:
    """For `describe`, what was declared and which sizes are compiled, where these are not all."""
    ranges = {} if declared is None else {name: [d.min, d.max] for name, d in declared.dimensions.items()}
    if static is None or len(static) >= math.prod(high - low + 1 for low, high in ranges.values()):
        return {}
    return {"declared": ranges, "compiled": static}


def place_weights(target: Target, directory: Path, description: Description) -> Tensors:
    """Every constant by the name that the artifact uses, with the dtype, shape, stride and device it was built for."""
    if not description["constants"]:
        return {}
    if description["weights_from"] == "module":
        weights = {name: tensor.detach() for name, tensor in target.eager().state_dict().items()}
    else:
        weights = target.source.weights()
    extras: Tensors = torch.load(directory / EXTRAS, weights_only=True, map_location="cpu")
    constants = {}
    for fqn, spec in description["constants"].items():
        pool = extras if spec["extra"] else weights
        tensors = [_checked(pool, part) for part in spec.get("parts", [spec])]
        if pool is extras or description["weights_from"] == "module":
            constants[fqn] = _placed(tensors, spec, target.device)
            continue
        names = tuple(part["name"] for part in spec.get("parts", [spec]))
        kind = (names, spec["dtype"], *spec["shape"], *spec["stride"])
        if kind not in target.placed_weights:
            target.placed_weights[kind] = _placed(tensors, spec, target.device)
        constants[fqn] = target.placed_weights[kind]
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return constants


def _held(directory: Path, description: Description, constants: Tensors) -> Held | None:
    """What `ts_handlers.startup.constants` compares with the eager model of new weights."""
    if description["weights_from"] == "artifact":
        return None
    specs = description["constants"]
    taken = [part["name"] for spec in specs.values() if not spec["extra"] for part in spec.get("parts", [spec])]
    folded: Tensors = {}
    if description.get("folded"):
        extras = torch.load(directory / EXTRAS, weights_only=True, map_location="cpu")
        folded = {name: extras[name] for name in description["folded"]}
    return Held(
        constants={spec["name"]: constants[fqn] for fqn, spec in specs.items() if spec["extra"]},
        folded=folded,
        weights=tuple(taken) if description["weights_from"] == "archive" else (),
        numbers=functools.partial(_read_numbers, directory / NUMBERS),
    )


def _read_numbers(path: Path) -> dict[str, str]:
    """Empty for entries of earlier versions."""
    if not path.exists():
        return {}
    numbers: dict[str, str] = json.loads(path.read_text("utf-8"))
    return numbers


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
    target: Target, directory: Path, variant: Description, constants: Tensors, single_threaded: bool = False
) -> Container | TorchRunner:
    path = directory / variant["name"] / variant["library"]
    library = open_library(path, target.device, target.settings.contexts.count, single_threaded)
    if constants:
        names = library.constant_names()
        missing = sorted(set(names.values()) - set(constants))
        if missing:  # running without them would kill the process
            raise LoadError(f"the artifact needs constants that its manifest does not list: {', '.join(missing[:5])}")
        library.use_constants({name: constants[fqn] for name, fqn in names.items()})
    return library


def _graph_slots(target: Target, directory: Path, variants: list[Description], constants: Tensors) -> GraphSlots | None:
    """Slots with CUDA graphs, where they are wanted and possible."""
    contexts = target.settings.contexts
    if not contexts.cuda_graphs or target.device.type != "cuda":
        return None
    from ts_handlers.backends.aot_inductor.graphs import GraphSlots

    slots = []
    for _ in range(contexts.count):
        libraries = [_load_library(target, directory, variant, constants, single_threaded=True) for variant in variants]
        usable = [library for library in libraries if isinstance(library, Container)]
        if len(usable) < len(libraries):
            logger.warning("%s: no CUDA graphs: it has operators that torch itself has to call", target.source.name)
            return None
        slots.append(usable)
    return GraphSlots(slots, contexts, target.device)


def choose_variant(fixed: list[Sizes], signature: Signature, tensors: list[torch.Tensor]) -> int:
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


def load_artifact(target: Target, directory: Path, description: Description) -> Loaded:
    """Load the shared libraries in place and give them the weights by name."""
    signature = _signature_of(description)
    constants = place_weights(target, directory, description)
    variants = description["variants"]
    fixed = [variant["fixed"] for variant in variants]
    output = description["output"]
    ensure_loadable()
    paths = [directory / variant["name"] / variant["library"] for variant in variants]
    if any(path.with_suffix(".json").exists() for path in paths):  # operators that torch's runner calls for the library
        from ts_handlers.backends.operators import ensure_operators

        ensure_operators(target, description, paths)
    graphs = _graph_slots(target, directory, variants, constants)
    libraries: list[Container | TorchRunner] = []
    if graphs is None:
        libraries = [_load_library(target, directory, variant, constants) for variant in variants]
        runs = [library.run for library in libraries]
    else:
        runs = [functools.partial(graphs.run, index) for index in range(len(variants))]
    static = static_sizes(description)
    only = runs[0] if len(runs) == 1 and static is None else None

    def run(tensors: list[torch.Tensor]) -> Any:
        infer = only or runs[choose_variant(fixed, signature, tensors)]
        return unflatten(infer(tensors), output)

    facts = {
        "step": description.get("step"),
        "variants": [variant["name"] for variant in variants],
        "ranges": {name: [d.min, d.max] for name, d in signature.dimensions.items()},
        **_coverage(target.signature, static),
        **limit_facts(description, target.signature),
        "weights_from": description["weights_from"],
        "merged_linears": sum(len(s["shape"]) == 2 for s in description["constants"].values() if "parts" in s),
    }
    return Loaded(
        run=run,
        signature=signature,
        sizes=fixed if description.get("step") == "static" else static,
        variants=len(variants),
        facts=facts,
        adjusts_threads=target.device.type == "cpu",
        frees_interpreter=target.device.type == "cpu" and all(isinstance(each, Container) for each in libraries),
        pool=None if graphs is None else graphs.pool,
        end_warmup=functools.partial(_stop_recording, graphs, facts),
        held=_held(directory, description, constants),
    )


def _stop_recording(graphs: GraphSlots | None, facts: dict[str, Any]) -> None:
    if graphs is not None:
        graphs.stop_recording(facts)
