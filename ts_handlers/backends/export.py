"""Exporting a model with `torch.export`, for the backends that compile one whole graph; imported on a build only.

A compiled graph takes and returns flat lists of tensors. `FlatModel` gives the model that form, `output_structure` says
how its output was nested, and `export_program` exports it with dynamic dimensions.
"""

from __future__ import annotations

from typing import Any

import torch

from ts_handlers.backends.base import Target, call_module, takes_names
from ts_handlers.errors import BuildError, ChangedInputError, one_line
from ts_handlers.model.signature import Signature, Sizes
from ts_handlers.model.structure import OutputStructure, flatten

PREFIX = "model."
"""What `FlatModel` puts before the names of a model's parameters and buffers."""


class FlatModel(torch.nn.Module):
    """The model with flat lists of tensors in and out.

    Attributes
    ----------
    copies_inputs:
        Whether the model gets copies: it changes its inputs in place, and a compiled graph must not.
    """

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.copies_inputs = False
        self._names = names
        self._by_name = takes_names(model, names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.clone() for tensor in tensors] if self.copies_inputs else list(tensors)
        return tuple(flatten(call_module(self.model, self._names, inputs, self._by_name))[0])


def output_structure(
    target: Target, module: torch.nn.Module, signature: Signature, sizes_list: list[Sizes]
) -> OutputStructure:
    """How the eager model's output is nested, as `ts_handlers.model.structure` describes it.

    Parameters
    ----------
    sizes_list:
        The sizes at which the model runs; it also runs at the smallest ones.

    Raises
    ------
    BuildError
        The structure depends on the input, or the model changes its attributes or tensors while it runs.
    """
    smallest = {name: dimension.min for name, dimension in signature.dimensions.items()}
    by_name = takes_names(module, signature.names)
    structures = []
    for sizes in [*sizes_list, {**sizes_list[0], **smallest}]:
        tensors = [tensor.to(target.device) for tensor in signature.generate(sizes, seed=1)]
        with torch.no_grad():
            structures.append(flatten(call_module(module, signature.names, tensors, by_name))[1])
    changed = target.kept.changes()
    if changed:  # a graph has the values of the moment when it was traced
        raise BuildError(f"the model changes its own state while it runs: {one_line(', '.join(changed), 200)}")
    if any(structure != structures[0] for structure in structures):
        raise BuildError("the structure of the model's output changes with its input, which an artifact cannot do")
    return structures[0]


def export_program(
    flat: FlatModel,
    inputs: tuple[torch.Tensor, ...],
    signature: Signature,
    ranges: dict[str, tuple[int, int]],
    oblivious: bool,
) -> Any:
    """Export a model with the dimensions in `ranges` dynamic; one that changes its inputs works on copies of them.

    Parameters
    ----------
    inputs:
        Example tensors on the model's device, one for each input of `signature`, in order.
    ranges:
        (smallest, largest) size of each dynamic dimension; others are fixed at the examples' sizes.
    oblivious:
        Do not specialise sizes 0 and 1.

    Returns
    -------
    A `torch.export.ExportedProgram`, not decomposed.

    Raises
    ------
    BuildError
        The model changes its state.
    Exception
        torch.export raises many kinds when it cannot export the model with these ranges.
    """
    import torch.fx.experimental._config

    from ts_handlers.model.exported_program import refuse_mutations

    symbolic_config: Any = torch.fx.experimental._config

    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in ranges.items()}
    shapes = tuple(
        {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str) and size in dims}
        for spec in signature.inputs
    )

    def export() -> Any:
        with symbolic_config.patch(backed_size_oblivious=oblivious), torch.no_grad():
            exported = torch.export.export(flat, inputs, dynamic_shapes=(shapes,), strict=False)
        refuse_mutations(exported)
        return exported

    try:
        program = export()
    except ChangedInputError:
        flat.copies_inputs = True
        program = export()
    _name_constants(program)
    return program


def _name_constants(program: Any) -> None:
    """Make buffers of tensors that are attributes or stand in the code: the compiler forgets the names of others."""
    from torch.export.graph_signature import InputKind

    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.CONSTANT_TENSOR:
            spec.kind, spec.persistent = InputKind.BUFFER, False


def live_weights(program: Any) -> set[str]:
    """Names of the parameters and buffers on which the output depends."""
    signature = program.graph_signature
    sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {sources[name] for name in live_placeholders(program.graph) if name in sources}


def live_placeholders(graph: Any) -> set[str]:
    """Names of the placeholders on which the output depends; exported graphs keep code that nobody uses."""
    pending = [node for node in graph.nodes if node.op == "output"]
    seen = set(pending)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                pending.append(node)
    return {node.name for node in seen if node.op == "placeholder"}
