"""Lets Torch-TensorRT's torch.compile run without a GPU; import this after `without_gpu`.

Its own tracing, lowering, partitioning, its use of the engine cache, and TensorRT's builder are real. What needs
the driver is stood in for: plans are built with fixed weights, no engine is deserialised, and torch runs the graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch_tensorrt.dynamo._compiler as compiler
from torch_tensorrt import Input
from torch_tensorrt.dynamo._settings import settings_are_compatible
from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes
from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

from ts_handlers.backends import torch_tensorrt_jit

plans: list[int] = []
"""Sizes in bytes of the plans that were built."""


class Engine(torch.nn.Module):
    """Stands where `TorchTensorRTModule` stands."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self._run = graph.forward  # not a child: torch runs these operators only here

    def forward(self, *inputs: Any) -> Any:
        return self._run(*inputs)

    def set_output_tensors_as_unowned(self, unowned: bool) -> None:
        """Memory of outputs is torch's here."""


def convert_module(
    module: torch.fx.GraphModule, inputs: Sequence[Any], settings: Any, name: str, engine_cache: Any
) -> Engine:
    """`torch_tensorrt.dynamo.conversion.convert_module` without running anything."""
    key = engine_cache.get_hash(module, inputs, settings)
    found = engine_cache.check(key)
    if found is None:
        plan = build(module, inputs, settings)
        plans.append(len(plan))
        engine_cache.check(key)  # upstream asks again before it inserts
        engine_cache.insert(key, (plan, ["x"], ["y"], inputs, settings, False, False))
    else:
        plan, _, _, known, built_with, *_ = found
        assert len(plan) > 1000
        assert settings_are_compatible(settings, built_with) == (True, set())
        assert all(Input.equivalent_spec(*pair) for pair in zip(known, inputs, strict=True))
    return Engine(module)


def build(module: torch.fx.GraphModule, inputs: Sequence[Any], settings: Any) -> bytes:
    """The plan as Torch-TensorRT builds it, but with fixed weights: for others the builder needs a GPU."""
    settings = dataclasses.replace(settings, immutable_weights=True)
    interpreter = TRTInterpreter(
        module, inputs, output_dtypes=infer_module_output_dtypes(module), compilation_settings=settings
    )
    interpreter._construct_trt_network_def()
    data = interpreter.builder.build_serialized_network(interpreter.ctx.net, interpreter._populate_trt_builder_config())
    assert data is not None
    return bytes(memoryview(data))


compiler.convert_module = convert_module
compiler.to_torch_device = lambda device: torch.device("cpu")  # where operators without a converter go
torch_tensorrt_jit.require_gpu = lambda request: None
