"""The canonical form of graphs: names do not count, everything else does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from ts_handlers.backends.torch_tensorrt.engine_cache import count_operators
from ts_handlers.backends.torch_tensorrt.graph_digest import canonical_graph, canonical_value
from ts_handlers.errors import BuildError


def relu(x: Any) -> Any:
    return torch.relu(x)


def tanh(x: Any) -> Any:
    return torch.tanh(x)


class Holder(torch.nn.Module):
    """Attributes for ``get_attr``."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def traced(function: Callable[..., Any]) -> list[Any]:
    return canonical_graph(torch.fx.symbolic_trace(function))


def with_attribute(value: Any, name: str = "weight") -> list[Any]:
    graph = Graph()
    graph.output(graph.call_function(operator.add, (graph.placeholder("x"), graph.get_attr(name))))
    return canonical_graph(GraphModule(Holder(**{name: value}), graph))


def test_names_do_not_count() -> None:
    def one(x: Any, y: Any) -> Any:
        z = torch.relu(x)
        return z - y

    assert traced(one) == traced(lambda a, b: torch.relu(a) - b)
    assert with_attribute(torch.ones(3)) == with_attribute(torch.ones(3), "other")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x, y: x - y, lambda x, y: y - x),
        (lambda x, y: x + 1, lambda x, y: x + 2),
        (lambda x, y: x + 1, lambda x, y: x + 1.0),
        (lambda x, y: x + 1, lambda x, y: x + True),
        (lambda x, y: x + 0.0, lambda x, y: x + -0.0),
        (lambda x, y: x[1:], lambda x, y: x[:1]),
        (lambda x, y: x[0], lambda x, y: x["0"]),
        (lambda x, y: torch.softmax(x, dim=0), lambda x, y: torch.softmax(x, dim=1)),
        (lambda x, y: x.to(torch.float16), lambda x, y: x.to(torch.bfloat16)),
        (lambda x, y: x.sum(), lambda x, y: x.mean()),
        (lambda x, y: (x, y), lambda x, y: (y, x)),
        (lambda x, y: x + y, lambda x, y: x + x),
    ],
)
def test_everything_else_counts(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    assert traced(one) == traced(one)
    assert traced(one) != traced(other)


def test_weights_count_by_their_bytes() -> None:
    left, right = torch.ones(3), torch.ones(3)
    assert with_attribute(left) == with_attribute(right)
    right[1] += 1e-6  # far below the tolerance of Torch-TensorRT's matching
    assert with_attribute(left) != with_attribute(right)
    assert with_attribute(left) != with_attribute(left.double())
    assert with_attribute(left) != with_attribute(left.reshape(3, 1))


def test_graphs_inside_graphs_count() -> None:
    inner = [torch.fx.symbolic_trace(function) for function in (relu, tanh)]
    assert with_attribute(inner[0]) == with_attribute(torch.fx.symbolic_trace(relu))
    assert with_attribute(inner[0]) != with_attribute(inner[1])


def test_keyword_order_sets_and_device_indices_do_not_count() -> None:
    assert traced(lambda x: torch.sum(x, dim=0, keepdim=True)) == traced(lambda x: torch.sum(x, keepdim=True, dim=0))
    assert canonical_value({"b", "a"}) == canonical_value({"a", "b"})
    assert canonical_value(torch.device("cuda:0")) == canonical_value(torch.device("cuda:1"))
    assert canonical_value(torch.device("cuda:0")) != canonical_value(torch.device("cpu"))


@pytest.mark.parametrize("target", [lambda x: x, object()])
def test_what_has_no_name_is_refused(target: Any) -> None:
    with pytest.raises(BuildError, match="cannot be compared between processes"):
        canonical_value(target)


def test_operators_are_counted_in_graphs_inside_too() -> None:
    inner = torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    graph = Graph()
    called = graph.call_module("inner", (graph.placeholder("x"),))
    graph.output(graph.call_function(operator.getitem, (graph.call_function(torch.relu, (called,)), 0)))
    assert count_operators(GraphModule(Holder(inner=inner), graph)) == 3
