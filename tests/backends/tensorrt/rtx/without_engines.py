"""Lets Torch-TensorRT's torch.compile run without a GPU; import this after `without_gpu`.

Its own tracing, lowering, partitioning, its use of the engine cache, and TensorRT's builder are real. What needs
the driver is stood in for: plans are built with fixed weights, no engine is deserialised, and torch runs the graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_tensorrt.dynamo._compiler as compiler
from torch_tensorrt.dynamo.conversion import _conversion
from torch_tensorrt.dynamo.conversion._conversion import SerializedInterpreterResult, infer_module_output_dtypes
from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

from ts_handlers.backends.torch_tensorrt import backend as torch_tensorrt_jit

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


def interpret_module_to_result(
    module: torch.fx.GraphModule, inputs: Sequence[Any], settings: Any, engine_cache: Any = None
) -> SerializedInterpreterResult:
    """Torch-TensorRT's function of this name without deserialising what it built."""
    plan = build(module, inputs, settings)
    plans.append(len(plan))
    known = {"serialized_engine": plan, "input_names": ["x"], "output_names": ["y"]}
    return SerializedInterpreterResult(**{name: known.get(name) for name in SerializedInterpreterResult._fields})


def convert_module(
    module: torch.fx.GraphModule, inputs: Sequence[Any], settings: Any, name: str, engine_cache: Any
) -> Engine:
    """`torch_tensorrt.dynamo.conversion.convert_module` without running anything."""
    result = _conversion.interpret_module_to_result(module, inputs, settings, engine_cache=engine_cache)
    assert len(result.serialized_engine) > 1000
    assert result.input_names == ["x"]
    return Engine(module)


def build(module: torch.fx.GraphModule, inputs: Sequence[Any], settings: Any) -> bytes:
    """The plan as Torch-TensorRT builds it."""
    assert settings.immutable_weights
    interpreter = TRTInterpreter(
        module, inputs, output_dtypes=infer_module_output_dtypes(module), compilation_settings=settings
    )
    interpreter._construct_trt_network_def()
    data = interpreter.builder.build_serialized_network(interpreter.ctx.net, interpreter._populate_trt_builder_config())
    assert data is not None
    return bytes(memoryview(data))


_conversion.interpret_module_to_result = interpret_module_to_result
compiler.convert_module = convert_module
compiler.to_torch_device = lambda device: torch.device("cpu")  # where operators without a converter go
torch_tensorrt_jit.require_gpu = lambda request: None
