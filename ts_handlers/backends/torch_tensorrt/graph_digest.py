"""A canonical form of an fx graph: equal for graphs that compute the same in the same way, different for all others.

Names of nodes and of symbols do not count, nor does the order of keyword arguments; everything else does: operators,
every argument with its type, edges, constants and weights by the digest of their bytes, and what is known of the
inputs. It holds no memory address and does not depend on PYTHONHASHSEED.

    ["call_function", "aten.add.Tensor", [["node", 0], ["int", "1"]], {}]
"""

from __future__ import annotations

import enum
import json
from typing import Any

import torch

from ts_handlers.errors import BuildError
from ts_handlers.key import fingerprint

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_TORCH = (torch.dtype, torch.layout, torch.memory_format)


def canonical_graph(module: torch.fx.GraphModule) -> list[Any]:
    """The graph as nested lists of strings, for `json.dumps`.

    Raises
    ------
    BuildError
        The graph holds something that cannot be compared between processes.
    """
    return _Canonical().graph(module)


def canonical_value(value: Any) -> Any:
    """The same for a value beside a graph: numbers, strings, dtypes, enumerations, operators, and collections of them.

    Examples
    --------
    >>> canonical_value({1, 2}) == canonical_value({2, 1}), canonical_value(1) == canonical_value(True)
    (True, False)
    """
    return _Canonical().value(value)


class _Canonical:
    """Remembers positions of nodes, and symbols in the order in which they appear."""

    def __init__(self) -> None:
        self._positions: dict[torch.fx.Node, int] = {}
        self._symbols: dict[Any, Any] = {}

    def graph(self, module: torch.fx.GraphModule) -> list[Any]:
        """All nodes in order."""
        rows = []
        for node in module.graph.nodes:
            rows.append(self._node(module, node))
            self._positions[node] = len(self._positions)
        return rows

    def _node(self, module: torch.fx.GraphModule, node: torch.fx.Node) -> list[Any]:
        arguments = [self.value(node.args), self.value(node.kwargs)]
        if node.op == "placeholder":  # its target is its name
            return [node.op, self._metadata(node), *arguments]
        if node.op in ("get_attr", "call_module"):
            return [node.op, self._attribute(module, str(node.target)), *arguments]
        target = str(node.target) if isinstance(node.target, str) else _function(node.target)
        return [node.op, target, *arguments]

    def _metadata(self, node: torch.fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            strides = value.stride() if value.layout == torch.strided else ()
            return ["tensor", str(value.dtype), value.device.type, self.value(value.shape), self.value(strides)]
        return self.value(value)

    def _attribute(self, module: torch.nn.Module, path: str) -> Any:
        value: Any = module
        for name in path.split("."):
            value = getattr(value, name)
        return self.value(value)

    def value(self, value: Any) -> Any:
        """One argument; see `canonical_value`."""
        if isinstance(value, torch.fx.Node):
            return ["node", self._positions[value]]
        if isinstance(value, enum.Enum):
            return ["enum", type(value).__qualname__, value.name]
        if isinstance(value, _PLAIN):
            return [type(value).__name__, repr(value)]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._symbolic(value)
        if isinstance(value, _TORCH):
            return ["torch", str(value)]
        if isinstance(value, torch.device):  # never its index: what was built on cuda:0 serves on cuda:1
            return ["device", value.type]
        if isinstance(value, torch.Tensor):
            return ["weights", _digest(value)]
        if isinstance(value, torch.fx.GraphModule):
            return ["graph", self.graph(value)]
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        if isinstance(value, slice):
            return ["slice", self.value([value.start, value.stop, value.step])]
        if isinstance(value, dict):
            return {str(key): self.value(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
        if isinstance(value, (set, frozenset)):
            return ["set", *sorted((self.value(item) for item in value), key=json.dumps)]
        return ["function", _function(value)]

    def _symbolic(self, value: Any) -> list[Any]:
        """A symbolic number: its expression with symbols numbered by appearance, its range and its example."""
        import sympy  # type: ignore[import-untyped]

        expression, environment = value.node.expr, value.node.shape_env
        for symbol in sorted(getattr(expression, "free_symbols", ()), key=str):
            self._symbols.setdefault(symbol, sympy.Symbol(f"n{len(self._symbols)}", integer=True, positive=True))
        text = str(expression.xreplace(self._symbols)) if hasattr(expression, "xreplace") else str(expression)
        bounds = environment.bound_sympy(expression) if environment is not None else None
        limits = [] if bounds is None else [str(bounds.lower), str(bounds.upper)]
        return ["symbolic", text, *limits, str(value.node.hint) if value.node.has_hint() else "none"]


def _function(target: Any) -> str:
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return str(target)
    name = getattr(target, "__qualname__", None)
    if not callable(target) or name is None or "<" in name:
        raise BuildError(
            f"the graph holds {target!r} ({type(target).__qualname__}), which cannot be compared between processes; "
            "take another backend for this model"
        )
    return f"{getattr(target, '__module__', '')}.{name}"


def _digest(tensor: torch.Tensor) -> str:
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

    if isinstance(tensor, FakeTensor):
        raise BuildError("the graph holds a constant without its values, so its engine cannot be told from another's")
    with unset_fake_temporarily():
        return fingerprint.digest_tensors({"": tensor})
