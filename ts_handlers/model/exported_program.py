"""Reading the input signature and output structure out of a `torch.export.ExportedProgram`."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import torch.utils._pytree as pytree

from ts_handlers.errors import BuildError, ChangedInputError
from ts_handlers.model.exported_declaration import compare_inputs
from ts_handlers.model.signature import Signature
from ts_handlers.model.structure import OutputStructure, flatten
from ts_handlers.settings import Dimension, InputSpec

LARGEST = 2**31 - 1  # for a dimension that the program leaves unbounded
_SIZE = r"L(\[[^\]]+\])+\.size\(\)\[\d+\]"
_CHECKED = re.compile(rf"{_SIZE} == {_SIZE}|(\d+ <=? )?{_SIZE}( <=? \d+)?|{_SIZE} >=? \d+")
"""Guards that `Signature` checks: equal sizes, and ranges."""


def describe_program(
    program: Any, declared: Signature | None
) -> tuple[tuple[InputSpec, ...], dict[str, Dimension], OutputStructure]:
    """Inputs, dynamic dimensions and output structure of a program.

    Parameters
    ----------
    program:
        The loaded program.
    declared:
        The signature from the settings, which may be narrower than the program's own and is then what holds; None takes
        the program's own.

    Raises
    ------
    BuildError
        The program takes nested inputs, changes its state, has a dimension that is an expression, or is right for some
        sizes of its ranges only.
    SettingsError
        The program does not take what is declared.
    """
    refuse_mutations(program)
    guards = [code for code in getattr(program, "_guards_code", None) or [] if not _CHECKED.fullmatch(code.strip())]
    if guards:
        raise BuildError(
            f"the exported program holds only where {' and '.join(guards[:3])}, which an artifact does not check; "
            "export it with torch.export.Dim, whose ranges say for which sizes it is right"
        )
    inputs, dimensions = program_inputs(program)
    if declared is not None:
        compare_inputs(inputs, dimensions, declared)
        inputs, dimensions = declared.inputs, declared.dimensions
    return inputs, dimensions, _structure(program)


def program_inputs(program: Any) -> tuple[tuple[InputSpec, ...], dict[str, Dimension]]:
    """The program's own inputs and dynamic dimensions.

    Raises
    ------
    BuildError
        It takes nested inputs, or has a dimension that is an expression.
    """
    names, _ = exported_input_names(program)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    user_inputs = [nodes[name] for name in program.graph_signature.user_inputs]
    if len(names) != len(user_inputs):
        raise BuildError(
            "the exported program takes nested inputs; export a wrapper whose forward() takes tensors only"
        )
    symbols: dict[Any, str] = {}
    dimensions: dict[str, Dimension] = {}
    inputs = []
    for name, node in zip(names, user_inputs, strict=True):
        tensor = node.meta["val"]
        if not isinstance(tensor, torch.Tensor):
            raise BuildError(f"input {name!r} of the exported program is a {type(tensor).__name__}, not a tensor")
        shape = tuple(
            size if isinstance(size, int) else _symbol(program, size, symbols, dimensions) for size in tensor.shape
        )
        dtype: Any = str(tensor.dtype)[6:]
        inputs.append(InputSpec(name=name, dtype=dtype, shape=shape))
    return tuple(inputs), dimensions


def refuse_mutations(program: Any) -> None:
    """Refuse a program that changes its state or its inputs.

    `torch.export.export` leaves in-place operations in the graph and then lists no mutation in the signature (torch
    2.13); only the functional form tells an in-place activation from a changed buffer.

    Raises
    ------
    BuildError, ChangedInputError
        With the names of what is changed: of state, or of inputs alone.
    """
    signature = program.graph_signature
    if _has_mutable_operations(program.graph_module):
        with torch.no_grad():
            signature = program.run_decompositions({}).graph_signature
    state = [*signature.buffers_to_mutate.values(), *getattr(signature, "parameters_to_mutate", {}).values()]
    if state:
        raise BuildError(f"the model changes its own state while it runs ({', '.join(sorted(set(state)))})")
    if signature.user_inputs_to_mutate:
        inputs = ", ".join(sorted(set(signature.user_inputs_to_mutate.values())))
        raise ChangedInputError(f"the model changes its inputs in place ({inputs})")


def _has_mutable_operations(graph_module: Any) -> bool:
    return any(
        getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        for module in graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    )


def _symbol(program: Any, size: Any, symbols: dict[Any, str], dimensions: dict[str, Dimension]) -> str:
    expression = size.node.expr
    if not expression.is_Symbol:
        raise BuildError(f"a dimension of the exported program is the expression {expression}; export plain ones")
    if expression not in symbols:
        bounds = program.range_constraints.get(expression)
        low = max(1, int(bounds.lower)) if bounds is not None else 1
        high = LARGEST if bounds is None or not str(bounds.upper).isdigit() else min(LARGEST, int(bounds.upper))
        name = f"dim{len(symbols)}"
        symbols[expression] = name
        dimensions[name] = Dimension(low, high)
    return symbols[expression]


def _structure(program: Any) -> OutputStructure:
    spec = program.call_spec.out_spec
    leaves = [torch.zeros(()) for _ in range(spec.num_leaves)]
    constants = {
        index: argument.value
        for index, argument in enumerate(
            output.arg for output in program.graph_signature.output_specs if output.kind.name == "USER_OUTPUT"
        )
        if type(argument).__name__ == "ConstantArgument"
    }
    values: list[Any] = [constants.get(index, leaf) for index, leaf in enumerate(leaves)]
    _, structure = flatten(pytree.tree_unflatten(values, spec))
    return structure


def exported_input_names(program: Any) -> tuple[list[str], list[str]]:
    """Names of an exported program's inputs in order, and those among them that it takes as keywords."""
    spec = program.call_spec.in_spec
    positional, keywords = spec.children() if hasattr(spec, "children") else spec.children_specs
    forward = inspect.signature(program.module().forward)
    names = [name for name, parameter in forward.parameters.items() if parameter.kind.name != "VAR_POSITIONAL"]
    keyword_names = list(keywords.context or [])
    taken = [name for name in names if name not in keyword_names][: positional.num_leaves]
    return [*taken, *keyword_names], keyword_names
