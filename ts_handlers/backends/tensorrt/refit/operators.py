"""Which operators may stand between a weight of the model and a weight of the network: those that move or cast values.

Lowering folds what is computed from weights alone. Whether that is a copy cannot be seen by comparing values: `clamp`,
`relu`, rounding or a threshold may change neither the model's weights nor the probe's, and others later. So it is read
off the operators.
"""

from __future__ import annotations

from typing import Any

import torch

from ts_handlers.backends.tensorrt.quantized import is_kept_from_folding
from ts_handlers.errors import RefitError

# By their names in torch.ops.aten; each gives the values that it takes, whatever these are.
_MOVES = {
    "_reshape_copy",
    "_unsafe_view",
    "alias",
    "alias_copy",
    "cat",
    "chunk",
    "clone",
    "contiguous",
    "detach",
    "expand",
    "expand_copy",
    "flatten",
    "flip",
    "lift_fresh_copy",
    "permute",
    "permute_copy",
    "reshape",
    "select",
    "select_copy",
    "slice",
    "slice_copy",
    "split",
    "split_copy",
    "split_with_sizes",
    "split_with_sizes_copy",
    "squeeze",
    "squeeze_copy",
    "stack",
    "t",
    "t_copy",
    "transpose",
    "transpose_copy",
    "unbind",
    "unflatten",
    "unsqueeze",
    "unsqueeze_copy",
    "view",
    "view_copy",
}
_CASTS = {"_to_copy", "to"}


def refuse_functions(program: Any, moving: set[str]) -> None:
    """Refuse a program that computes something from its weights alone, other than by moving and casting them.

    Parameters
    ----------
    program:
        A decomposed `torch.export.ExportedProgram`.
    moving:
        Names in its state of the weights that a refit replaces.

    Raises
    ------
    RefitError
        With the operator.
    """
    signature = program.graph_signature
    sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    user = set(signature.user_inputs)
    constant: set[Any] = set()
    derived: dict[Any, bool] = {}  # from weights alone; and whether a cast has rounded the values
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if sources.get(node.name) in moving:
                derived[node] = False
            elif node.name not in user:
                constant.add(node)
        elif node.op == "call_function" and all(n in derived or n in constant for n in node.all_input_nodes):
            taken = [n for n in node.all_input_nodes if n in derived]
            if not taken:
                constant.add(node)
                continue
            value = node.meta.get("val")
            if not isinstance(value, (tuple, list)) and not (
                isinstance(value, torch.Tensor) and value.is_floating_point()
            ):
                raise RefitError(f"the model decides something by its weights alone ({node.target})")
            if not is_kept_from_folding(node.target):  # else a layer, which computes when the plan runs
                derived[node] = _is_rounded(node, taken[0], any(derived[n] for n in taken))


def _is_rounded(node: Any, taken: Any, before: bool) -> bool:
    """Whether the values of a node have been rounded by a cast; `before` says it of what the node takes.

    Raises
    ------
    RefitError
        The node is no copy of what it takes, or a cast after one that has rounded, which no single cast gives.
    """
    name = node.target.__name__.partition(".")[0]
    if name == "getitem":
        return before
    if getattr(node.target, "namespace", None) != "aten" or name not in _MOVES | _CASTS:
        raise RefitError(
            f"{node.target} of weights alone is folded: a weight of the network cannot be computed from the model's "
            "weights by copying"
        )
    if name in _MOVES:
        return before
    old, new = taken.meta["val"].dtype, node.meta["val"].dtype
    if old != new and before:
        raise RefitError(
            f"a weight is rounded and then cast to {new}: a weight of the network cannot be computed from the model's "
            "weights by one cast"
        )
    return before or torch.promote_types(old, new) != new
