"""Makes TensorRT sum the products of 16-bit layers in float32.

TensorRT for RTX sums them in 16 bits, and takes casts round a product away again, which is what Torch-TensorRT's
``use_fp32_acc`` inserts. It leaves a product alone whose weights are float32 in the plan: that costs time and twice the
memory for these weights. The layers' inputs and outputs keep their 16 bits, as in torch.
"""

from __future__ import annotations

from typing import Any

import torch

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    {
        _aten.linear.default,
        _aten.addmm.default,
        _aten.mm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.matmul.default,
        _aten.convolution.default,
    }
)
_SHORT = (torch.float16, torch.bfloat16)


def accumulate_in_float32(module: torch.fx.GraphModule) -> int:
    """Compute the matrix products and convolutions of a graph in float32, in place; casts of weights fold later.

    Parameters
    ----------
    module:
        A decomposed graph whose nodes have example values (``meta["val"]``).

    Returns
    -------
    How many were changed.
    """
    graph = module.graph
    found = [node for node in graph.nodes if node.target in _PRODUCTS and _dtype(node) in _SHORT]
    for node in found:
        with graph.inserting_before(node):
            node.args = tuple(_cast(graph, argument, torch.float32) for argument in node.args)
        dtype = _dtype(node)
        users = list(node.users)
        node.meta = {**node.meta, "val": node.meta["val"].to(torch.float32)}
        with graph.inserting_after(node):
            back = _cast(graph, node, dtype)
        for user in users:
            user.replace_input_with(node, back)
    graph.lint()
    module.recompile()
    return len(found)


def _dtype(node: torch.fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _cast(graph: torch.fx.Graph, argument: Any, dtype: torch.dtype | None) -> Any:
    """A node with the value of `argument` in another dtype; anything but a floating-point tensor stays as it is."""
    if not isinstance(argument, torch.fx.Node) or _dtype(argument) not in (*_SHORT, torch.float32):
        return argument
    if _dtype(argument) == dtype:
        return argument
    node = graph.call_function(_aten._to_copy.default, (argument,), {"dtype": dtype})
    node.meta["val"] = argument.meta["val"].to(dtype)
    return node
