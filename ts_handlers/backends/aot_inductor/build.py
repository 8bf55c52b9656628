"""Building for the backend `aot_inductor`: one export step after the other, until one agrees with eager.

Imported on a build only.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from ts_handlers.backends.aot_inductor import linears
from ts_handlers.backends.aot_inductor.compile import (
    Variant,
    compile_program,
    export_steps,
    forget_traces,
    refuse_folded_weights,
)
from ts_handlers.backends.aot_inductor.container import open_library
from ts_handlers.backends.aot_inductor.load import EXTRAS, NUMBERS, ensure_loadable, load_artifact
from ts_handlers.backends.base import Built, Description, Target, Workspace
from ts_handlers.backends.compare import compare_sizes
from ts_handlers.backends.export import PREFIX, FlatModel, export_program, live_weights, output_structure
from ts_handlers.backends.index_limits import find_limits, merge_limits
from ts_handlers.backends.operators import called_operators, find_registrar
from ts_handlers.errors import BuildError, ModelError, one_line, without_frames
from ts_handlers.guard.failures import is_passing
from ts_handlers.model.archive_files import Tensors
from ts_handlers.model.exported import ExportedSource
from ts_handlers.model.exported_program import describe_program
from ts_handlers.model.module_state import numbers_of
from ts_handlers.model.signature import Signature
from ts_handlers.settings import Settings
from ts_handlers.system.files import RememberingWriter, bounded_name

logger = logging.getLogger(__name__)


def build(target: Target, workspace: Workspace, merge: bool, takes_step: Callable[[Settings, str], bool]) -> Built:
    """Export, compile, check against eager, and leave the shared libraries in the workspace.

    With `merge` each step is tried with linear layers merged first, and with the layers as they are if that fails.
    `takes_step` tells from its name whether a step is tried.
    """
    signature = target.require_signature()
    module = target.eager()
    reasons: list[str] = []
    last: Exception | None = None
    directory = workspace.directory
    for step, variants in export_steps(signature, target):
        if not takes_step(target.settings, step):
            reasons.append(f"{step}: not tried here")
            continue
        for merged in (set[str](), None) if merge else (None,):
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            try:
                description = _build_step(target, module, signature, variants, workspace, merged)
            except (ModelError, MemoryError):
                raise
            except Exception as error:
                last = without_frames(error)  # whose frames hold what failed
                if is_passing(error):  # another way would meet the same
                    raise BuildError(f"{step}: {type(error).__name__}: {one_line(error)}") from last
                how = f"{step} with merged linear layers" if merged else step
                reason = f"{how}: {type(error).__name__}: {_first_line(error)}"
                logger.info("%s does not export this way: %s", target.source.name, reason)
                reasons.append(reason)
                target.placed_weights.clear()  # merged ones would stay beside those that the next step places
                if merged:
                    continue
                break
            forget_traces()
            description["step"] = step
            description["steps_failed"] = reasons
            return Built(description)
    raise BuildError("no way of exporting this model works: " + "; ".join(reasons)) from last


def _build_step(
    target: Target,
    module: torch.nn.Module,
    signature: Signature,
    variants: list[Variant],
    workspace: Workspace,
    merged: set[str] | None,
) -> Description:
    """One export step. `merged` gets the names of the variants whose linear layers are merged; None merges none."""
    example = target.example_sizes
    directory = workspace.directory
    description: Description = {"variants": [], "constants": {}, "weights_from": "archive"}
    extras: Tensors = {}
    structure = output_structure(target, module, signature, [{**example, **fixed} for _, fixed, _, _ in variants])
    for variant in variants:
        name, fixed, ranges, _ = variant
        with workspace.phase("export"):
            exported = _export(target, module, signature, variant, description, merged)
        merge_limits(description, find_limits(exported.program, signature))
        files, fqns = _compile(exported, target, workspace, name)
        description["variants"].append({"name": name, "fixed": fixed, "ranges": ranges, **files})
        _describe_constants(exported, fqns, target.source.weights(), description, extras)
    if description["weights_from"] == "module":
        logger.warning(
            "%s changes its weights while it is built, so a warm start has to build the eager model",
            target.source.name,
        )
    with RememberingWriter(directory / EXTRAS) as file:
        torch.save(extras, cast(Any, file))
        file.check()
    (directory / NUMBERS).write_text(json.dumps(numbers_of(module)), "utf-8")
    description["output"] = structure
    description["inputs"] = _inputs_description(signature)
    _describe_operators(target, directory, description)
    with workspace.phase("verify"):
        accepted = _verify(target, signature, directory, description, variants)
    description["dimensions"] = accepted
    return description


@dataclasses.dataclass(frozen=True)
class _Exported:
    """A variant's program, its parameters, buffers and constants by name, and the merged ones with their parts."""

    program: Any
    constants: dict[str, torch.Tensor]
    parts: linears.Parts


def _export(
    target: Target,
    module: torch.nn.Module,
    signature: Signature,
    variant: Variant,
    description: Description,
    merged: set[str] | None,
) -> _Exported:
    """Export a variant, and merge its linear layers where `merged` is a set; notes where the weights come from."""
    name, fixed, ranges, oblivious = variant
    weights = target.source.weights()
    flat = FlatModel(module, signature.names).eval()
    sizes = {**target.example_sizes, **fixed}
    inputs = tuple(tensor.to(target.device) for tensor in signature.generate(sizes, seed=1))
    program = export_program(flat, inputs, signature, ranges, oblivious)
    constants = {**program.state_dict, **program.constants}
    archived = {fqn for fqn in live_weights(program) if fqn.removeprefix(PREFIX) in weights}
    if not all(_same(constants[fqn], weights[fqn.removeprefix(PREFIX)]) for fqn in archived):
        description["weights_from"] = "module"
    parts: linears.Parts = {}
    if merged is not None and description["weights_from"] == "archive":
        merged.add(name)  # before merging: a merge that fails counts too
        parts = linears.merge_linears(program, archived)
        constants.update(program.state_dict)
        if not parts:
            merged.remove(name)
    return _Exported(program, constants, parts)


def _compile(exported: _Exported, target: Target, workspace: Workspace, name: str) -> tuple[dict[str, str], set[str]]:
    """Compile a variant; returns the description of its files, and the names of the weights that they take."""
    directory = workspace.directory / bounded_name(name)
    try:
        with workspace.phase("compile"):
            files = compile_program(exported.program, target, directory, baked=False)
        ensure_loadable()
        fqns = set(open_library(directory / files["library"], target.device).constant_names().values())
        refuse_folded_weights(exported.program, fqns)
    finally:
        for fqn in exported.parts:  # what is left of the trace would keep their memory during the check
            exported.constants[fqn].untyped_storage().resize_(0)
    return files, fqns


def _describe_constants(
    exported: _Exported, fqns: set[str], weights: Tensors, description: Description, extras: Tensors
) -> None:
    """Describe how each weight is put together from the archive's; `extras` gets those that it does not have."""
    constants, parts = exported.constants, exported.parts
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
    for fqn in sorted(live_weights(exported.program) - fqns - set(exported.program.state_dict)):
        if fqn in constants:  # what the compiler has folded into the code, though it is told not to
            extras[fqn.removeprefix(PREFIX)] = constants[fqn].detach().cpu()
            description.setdefault("folded", []).append(fqn.removeprefix(PREFIX))


def _describe_operators(target: Target, directory: Path, description: Description) -> None:
    """Say what registers the operators that the libraries call by name, where torch does not have them itself."""
    libraries = [directory / variant["name"] / variant["library"] for variant in description["variants"]]
    names = called_operators(libraries)
    if any(not name.removeprefix("torch.ops.").startswith(("aten::", "aten.")) for name in names):
        registrar = find_registrar(target, names)
        if registrar is not None:
            description["operators"] = registrar


def _same(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a model's weight is the archive's, in the model's dtype."""
    return torch.equal(stored.to(tensor.dtype), tensor.detach().cpu())


def _inputs_description(signature: Signature) -> list[dict[str, Any]]:
    return [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "values": s.values} for s in signature.inputs]


def _verify(
    target: Target, signature: Signature, directory: Path, description: Description, variants: list[Variant]
) -> dict[str, list[int]]:
    """Compare with eager at the ends of the ranges (or at every static size); returns the ranges that were shown."""
    description["dimensions"] = {name: [d.min, d.max] for name, d in signature.dimensions.items()}
    # Contexts and their CUDA graphs would only cost memory here.
    contexts = msgspec.structs.replace(target.settings.contexts, count=1, cuda_graphs=False)
    single = dataclasses.replace(target, settings=msgspec.structs.replace(target.settings, contexts=contexts))
    loaded = load_artifact(single, directory, description)
    static = all(not variant_ranges for _, _, variant_ranges, _ in variants)
    cases = [fixed for _, fixed, _, _ in variants] if static else signature.corner_sizes()
    compare_sizes(target, loaded, cases)
    return {name: [d.min, d.max] for name, d in loaded.signature.dimensions.items()}


def build_exported(target: Target, source: ExportedSource, workspace: Workspace) -> Built:
    """Compile an exported program as it is, with its weights inside."""
    with workspace.phase("export"):
        program = source.program
        inputs, dimensions, structure = describe_program(program, target.signature)
    signature = Signature(inputs, dimensions)
    with workspace.phase("compile"):
        files = compile_program(program, target, workspace.directory / "exported", baked=True)
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
    merge_limits(description, find_limits(program, signature))
    _describe_operators(target, workspace.directory, description)
    return Built(description)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0], 300) if lines else ""
