"""Merging linear layers that read the same tensor into one product: query, key and value; gate and up.

A graph pass on an exported program, before it is compiled. The merged weight is a parameter of its own, and what it is
put together from is told to the caller, who fills it from the archive by name. Imported on a build only; see
docs/decisions/0021-merged-linears.md.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

PREFIX = "merged."  # of the names of merged weights; what a program has itself lies under another name
ALIGNMENT = 16  # bytes: vectorized loads of what reads a part of the product, and the products' own
PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.bmm,
    torch.ops.aten.addmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.matmul,
    torch.ops.aten.einsum,
    torch.ops.aten.conv1d,
    torch.ops.aten.conv2d,
    torch.ops.aten.conv3d,
    torch.ops.aten.convolution,
    torch.ops.aten.scaled_dot_product_attention,
}

Parts = dict[str, list[str]]  # name of a merged weight -> names of the weights in it, one after the other


@dataclasses.dataclass(frozen=True)
class _Layer:
    node: Any
    weight: Any
    bias: Any | None

    @property
    def placeholders(self) -> list[Any]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def merge_linears(program: Any, allowed: Collection[str]) -> Parts:
    """Merge what can be merged, in place.

    Layers are merged when they read the same tensor and no other product stands between them, so that no result waits
    long for its use. Left alone are weights that something else uses too, and what is changed in place.

    Parameters
    ----------
    program:
        An exported program, as `torch.export.export` made it: not decomposed.
    allowed:
        Names of the weights and biases that may be merged.

    Returns
    -------
    The names of the merged weights and biases with those of their parts, which lie one after the other along
    dimension 0. Empty when nothing was merged.
    """
    groups = list(_groups(program, _mergeable_weights(program, allowed)))
    parts: Parts = {}
    for group in groups:
        parts.update(_merge(program, group))
    if groups:
        program.graph.lint()
        program.graph_module.recompile()
    return parts


def _mergeable_weights(program: Any, allowed: Collection[str]) -> dict[Any, torch.Tensor]:
    """The placeholders of weights that one node alone uses, with the weights."""
    names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    found = {}
    for node in program.graph.nodes:
        if node.op != "placeholder" or len(node.users) != 1 or names[node.name] not in allowed:
            continue
        tensor = program.state_dict.get(names[node.name])
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.numel():
            found[node] = tensor
    return found


def _groups(program: Any, weights: dict[Any, torch.Tensor]) -> Iterator[list[_Layer]]:
    """Layers to merge. Outputs are left alone because a part of a product has other strides than a whole tensor."""
    nodes = list(program.graph.nodes)
    changed = {memory for node in nodes if _changes_inputs(node) for memory in map(_memory, node.all_input_nodes)}
    outputs = {_memory(node) for node in nodes[-1].all_input_nodes}
    pending: dict[Any, list[_Layer]] = {}
    read: Any = None

    def finished() -> Iterator[list[_Layer]]:
        yield from (group for group in pending.values() if len(group) > 1)
        pending.clear()

    for node in nodes:
        if node.target is torch.ops.aten.linear.default:
            if node.args[0] is not read:
                yield from finished()
                read = node.args[0]
            layer = _Layer(*_arguments(node))
            if _memory(read) in changed | {None} or _memory(node) in changed | outputs | {None}:
                continue
            if all(placeholder in weights for placeholder in layer.placeholders) and _fits(layer, weights):
                weight = weights[layer.weight]
                pending.setdefault((layer.bias is None, weight.dtype, weight.device), []).append(layer)
        elif _ends_groups(node):
            yield from finished()
            read = None
    yield from finished()


def _arguments(node: Any) -> tuple[Any, Any, Any | None]:
    names = ("input", "weight", "bias")
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return node, arguments["weight"], arguments.get("bias")


def _fits(layer: _Layer, weights: dict[Any, torch.Tensor]) -> bool:
    weight = weights[layer.weight]
    if weight.dim() != 2 or (weight.shape[0] * weight.itemsize) % ALIGNMENT:
        return False
    return layer.bias is None or weights[layer.bias].shape == weight.shape[:1]


def _ends_groups(node: Any) -> bool:
    """Whether a node is a product of another kind, or has a sub-graph, which may hold one and may change its inputs."""
    kind = node.target
    return getattr(kind, "overloadpacket", None) in PRODUCTS or isinstance(kind, torch._ops.HigherOrderOperator)


def _changes_inputs(node: Any) -> bool:
    return getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _memory(node: Any) -> int | None:
    """What tensors that share memory have in common; None where a node is not one tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


def _merge(program: Any, group: list[_Layer]) -> Parts:
    """Replace the layers of a group by one and its parts; the names of the new weights with those of their parts."""
    graph, first = program.graph, group[0].node
    sizes = [int(layer.weight.meta["val"].shape[0]) for layer in group]
    parts: Parts = {}
    merged = []
    for column in zip(*(layer.placeholders for layer in group), strict=True):
        placeholder, name, names = _join_placeholders(program, column)
        merged.append(placeholder)
        parts[name] = names
    read = first.args[0]
    value = read.meta["val"]
    with graph.inserting_before(first):
        product = graph.call_function(torch.ops.aten.linear.default, (read, *merged))
        split = graph.call_function(torch.ops.aten.split_with_sizes.default, (product, sizes, -1))
        pieces = [graph.call_function(operator.getitem, (split, index)) for index in range(len(group))]
    whole = value.new_empty((*value.shape[:-1], sum(sizes)))
    values = whole.split(sizes, -1)
    for node, fake in [(product, whole), (split, list(values)), *zip(pieces, values, strict=True)]:
        node.meta = {**first.meta, "val": fake}
        node.meta.pop("tensor_meta", None)
    for layer, piece in zip(group, pieces, strict=True):
        layer.node.replace_all_uses_with(piece)
        graph.erase_node(layer.node)
        for placeholder in layer.placeholders:
            graph.erase_node(placeholder)
    return parts


def _join_placeholders(program: Any, placeholders: tuple[Any, ...]) -> tuple[Any, str, list[str]]:
    """A placeholder for weights one after the other, in their place in the signature; its weight's name, and theirs."""
    specs = program.graph_signature.input_specs
    positions = {spec.arg.name: index for index, spec in enumerate(specs)}
    replaced = [specs[positions[placeholder.name]] for placeholder in placeholders]
    names = [spec.target for spec in replaced]
    merged = PREFIX + names[0]
    with torch.no_grad():
        tensor = torch.cat([program.state_dict.pop(name) for name in names])
    program.state_dict[merged] = torch.nn.Parameter(tensor, requires_grad=False)
    with program.graph.inserting_before(placeholders[0]):
        joined = program.graph.placeholder(f"p_{merged.replace('.', '_')}")
    joined.meta = dict(placeholders[0].meta)
    joined.meta.pop("tensor_meta", None)
    joined.meta["val"] = placeholders[0].meta["val"].new_empty(tensor.shape)
    specs[positions[placeholders[0].name]] = InputSpec(
        InputKind.PARAMETER, TensorArgument(name=joined.name), merged, None
    )
    for spec in replaced[1:]:
        specs.remove(spec)
    return joined, merged, names
